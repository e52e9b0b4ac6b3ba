"""Who is turned away, and what becomes of loads and workers that fail. Pure."""

from __future__ import annotations

from functools import partial

from msgspec.structs import replace

from shimpy.errors import GgufError, HeldBackError, LoadError, QueueFullError, ShimpyError
from shimpy.scheduler import policy
from shimpy.scheduler.books import Books
from shimpy.scheduler.effects import Effect, note
from shimpy.scheduler.exits import WorkerExit
from shimpy.scheduler.states import ModelQueue, Request, Resident, Retry
from shimpy.units import format_duration


def refusal(books: Books, queue: ModelQueue, request: Request, now: float) -> ShimpyError | None:
    """Return why a new request is rejected at once; None: it is not."""
    if request.model.shape is None:
        return GgufError(f"{queue.key} can't be used: {request.model.error}")
    if now < queue.held_until_s:
        return _held_back(queue, now)
    if queue.waiting or not books.can_grant(queue, request):
        return _full(queue, books.limits.max_queue)
    return None


def _full(queue: ModelQueue, max_queue: int) -> QueueFullError | None:
    n_waiting = len(queue.waiting)
    if n_waiting < max_queue:
        return None
    capacity = queue.resident.capacity if queue.resident is not None else 1
    wait_s = policy.retry_after_s(
        n_waiting=n_waiting, capacity=capacity, mean_lease_s=queue.mean_lease_s
    )
    return QueueFullError(
        f"{n_waiting} requests wait for {queue.key} already, as many as max_queue allows; "
        f"try again in {format_duration(wait_s)}",
        retry_after_s=wait_s,
    )


def _held_back(queue: ModelQueue, now: float) -> HeldBackError:
    wait_s = queue.held_until_s - now
    return HeldBackError(
        f"{queue.key} is held back for another {format_duration(wait_s)}: its workers died "
        f"{queue.n_deaths} times in a row; the last one {queue.last_death}",
        retry_after_s=wait_s,
    )


def reject_held_back(books: Books, queue: ModelQueue, now: float) -> list[Effect]:
    """Reject everyone who waits for a model if it is held back now."""
    if now >= queue.held_until_s:
        return []
    return books.reject_waiting(queue, partial(_held_back, queue, now))


def end_load(
    books: Books, resident: Resident, reason: str, now: float, *, out_of_memory: bool
) -> list[Effect]:
    """Arrange one more try after a lack of memory, or reject everyone who waits."""
    queue, move = books.queues[resident.key], resident.move
    if out_of_memory and resident.lower_rungs and (queue.waiting or move is not None):
        if queue.waiting:
            queue.retry = Retry(rungs=resident.lower_rungs, purpose=resident.purpose, reason=reason)
        elif move is not None and now >= queue.held_until_s:
            smallest = resident.lower_rungs[-1]
            queue.move = replace(move, rungs=resident.lower_rungs, claim=smallest)
        return [note("retry", queue.key, f"{reason}; trying a smaller placement", now)]
    message = f"{queue.key} could not be loaded: {reason}"
    effects: list[Effect] = [note("load_failed", queue.key, message, now)]
    return effects + books.reject_waiting(
        queue, partial(LoadError, message, out_of_memory=out_of_memory)
    )


def count_death(queue: ModelQueue, end: WorkerExit, now: float) -> list[Effect]:
    """Count a worker that died unasked; after several in a row the model is held back."""
    queue.n_deaths += 1
    queue.last_death = end.reason
    effects: list[Effect] = [
        note("died", queue.key, f"its worker {end.reason}", now, cause=end.kind.value)
    ]
    hold_s = policy.hold_s(queue.n_deaths)
    if hold_s > 0:
        queue.held_until_s = now + hold_s
        effects.append(note("held", queue.key, _held_back(queue, now).message, now))
    return effects
