"""Who waits, who holds a lease, which workers there are: the core's state. Pure.

`Books` has the moves that keep its parts consistent, and the few conditions that several
decisions share. What to do when is decided in `core` and `placing`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Literal

import msgspec

from shimpy.errors import ShimpyError
from shimpy.placement.placement import PlanOptions, Rung
from shimpy.registry.model import Model
from shimpy.scheduler import policy
from shimpy.scheduler.effects import Effect, Grant, Reject, StartWorker, StopWorker, note
from shimpy.scheduler.states import (
    EventKind,
    ModelQueue,
    Move,
    Phase,
    Purpose,
    Request,
    RequestId,
    Resident,
    WorkerId,
)

# Weight of the newest lease in the running mean of their lengths.
_MEAN_WEIGHT = 0.2


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """The settings that the core keeps to."""

    keep_alive_s: float
    # Requests that may wait for one model.
    max_queue: int
    # Threads of every worker; None: busy workers share the cores.
    n_threads: int | None = None
    # Models that are never evicted once they are loaded, by name.
    pinned: frozenset[str] = frozenset()
    # RAM that each model may park idle caches in.
    parked_bytes: int = 0
    # How often free memory is looked at while models are loaded, in seconds; 0: never.
    replan_interval_s: float = 0.0


class Books:
    """Every request is in at most one place: waiting in its model's queue, or holding a lease."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.queues: dict[str, ModelQueue] = {}
        self.residents: dict[WorkerId, Resident] = {}
        self.waiting: dict[RequestId, ModelQueue] = {}
        # With the time of the grant.
        self.leases: dict[RequestId, tuple[Resident, float]] = {}
        # Models that somebody has pinned or unpinned, whatever the limits say.
        self._pins: dict[str, bool] = {}
        # From the last snapshot of the hardware.
        self.n_cores = 1
        self._last_worker = 0

    # --- requests -------------------------------------------------------------------------

    def queue_of(self, request: Request) -> ModelQueue:
        """Return the queue of a request's model, a new one if there is none."""
        key = str(request.model.name)
        return self.queues.setdefault(key, ModelQueue(key=key))

    def enqueue(self, queue: ModelQueue, request: Request) -> None:
        """Put a request at the end of its queue."""
        queue.waiting.append(request)
        self.waiting[request.id] = queue

    def dequeue(self, request: RequestId) -> ModelQueue | None:
        """Take a request out of its queue and return that; None: it does not wait."""
        queue = self.waiting.pop(request, None)
        if queue is not None:
            queue.waiting = deque(other for other in queue.waiting if other.id != request)
            self._forget_wishes(queue)
        return queue

    def can_grant(self, queue: ModelQueue, request: Request) -> bool:
        """Whether the queue's resident can take a request right now."""
        resident = queue.resident
        return (
            resident is not None
            and resident.phase is Phase.READY
            and len(resident.leases) < resident.capacity
            and (resident.yields_to is None or request.id < resident.yields_to)
            and policy.serves(resident, request)
        )

    def grant_waiting(self, queue: ModelQueue, now: float) -> list[Effect]:
        """Grant from the front of the queue as long as its resident can take the next one."""
        effects: list[Effect] = []
        resident = queue.resident
        while queue.waiting and resident and self.can_grant(queue, queue.waiting[0]):
            request = queue.waiting.popleft()
            del self.waiting[request.id]
            self.leases[request.id] = resident, now
            resident.leases.add(request.id)
            if request.keep_alive_s is not None:
                resident.keep_alive_s = request.keep_alive_s
            assert resident.ready_s is not None, "only a loaded model is granted"
            load_s = max(0.0, resident.ready_s - request.arrived_s)
            effects.append(Grant(request=request.id, worker=resident.worker, load_s=load_s))
        if effects:
            self.unblock(queue)
        return effects

    def reject_waiting(
        self,
        queue: ModelQueue,
        make_error: Callable[[], ShimpyError],
        *,
        like: Request | None = None,
    ) -> list[Effect]:
        """Reject all that wait for a model, or those that want the same as `like`."""
        rejected = [r for r in queue.waiting if like is None or _want_the_same(r, like)]
        for request in rejected:
            del self.waiting[request.id]
        queue.waiting = deque(r for r in queue.waiting if r.id in self.waiting)
        self._forget_wishes(queue)
        return [Reject(request=request.id, error=make_error()) for request in rejected]

    def release(self, request: RequestId, now: float) -> Resident | None:
        """End a lease and return whose it was; None: it is gone already."""
        resident, granted_s = self.leases.pop(request, (None, 0.0))
        if resident is not None:
            resident.leases.discard(request)
            resident.idle_since_s = now
            queue = self.queues[resident.key]
            queue.mean_lease_s += _MEAN_WEIGHT * (now - granted_s - queue.mean_lease_s)
        return resident

    def unblock(self, queue: ModelQueue) -> None:
        """Begin a new count of the queue's patience."""
        queue.blocked_since_s = None
        queue.is_impatient = False

    def _forget_wishes(self, queue: ModelQueue) -> None:
        """With nobody left who waits, nothing is waited for."""
        if not queue.waiting:
            self.unblock(queue)
            queue.retry = None

    # --- residents ------------------------------------------------------------------------

    @property
    def pending(self) -> list[ModelQueue]:
        """The queues whose model waits to be placed."""
        return [queue for queue in self.queues.values() if self.needs_placing(queue)]

    def needs_placing(self, queue: ModelQueue) -> bool:
        """Whether requests wait that no worker, present or stopping, is going to serve."""
        if not queue.waiting:
            return False
        resident = queue.resident
        if resident is None:
            return True
        return resident.is_idle and not policy.serves(resident, queue.waiting[0])

    def has_waiting(self, resident: Resident) -> bool:
        """Whether requests wait for a resident's model."""
        return bool(self.queues[resident.key].waiting)

    def can_leave(self, resident: Resident) -> bool:
        """Whether a resident may be evicted: nobody uses it, or waits for its load."""
        is_unasked = resident.phase is Phase.LOADING and resident.move is not None
        is_free = resident.is_idle or (is_unasked and not self.has_waiting(resident))
        return is_free and not resident.is_pinned

    def start(
        self,
        queue: ModelQueue,
        rung: Rung,
        purpose: Purpose,
        lower_rungs: tuple[Rung, ...],
        *,
        now: float,
    ) -> StartWorker:
        """Give a queue a resident that loads what its first request wants."""
        keep_alive_s = self.limits.keep_alive_s
        if queue.move is not None:
            keep_alive_s = queue.move.keep_alive_s
        resident = self._new_resident(queue, queue.waiting[0].model, rung, purpose, now)
        resident.keep_alive_s = keep_alive_s
        resident.lower_rungs = lower_rungs
        queue.retry = None
        self.unblock(queue)
        return _started(resident)

    def start_move(
        self, queue: ModelQueue, rung: Rung, lower_rungs: tuple[Rung, ...], *, now: float
    ) -> StartWorker:
        """Give a queue that nobody waits in its resident back, with another placement."""
        move = queue.move
        assert move is not None, "only what is on its way somewhere is moved"
        resident = self._new_resident(queue, move.model, rung, move.purpose, now)
        resident.keep_alive_s = move.keep_alive_s
        resident.lower_rungs = lower_rungs
        resident.move = move
        return _started(resident)

    def _new_resident(
        self, queue: ModelQueue, model: Model, rung: Rung, purpose: Purpose, now: float
    ) -> Resident:
        self._last_worker += 1
        shape = model.shape
        assert shape is not None, "broken models are rejected on arrival"
        n_threads = policy.most_threads(shape, rung.placement, self.n_cores)
        resident = Resident(
            worker=WorkerId(self._last_worker),
            model=model,
            purpose=purpose,
            rung=rung,
            lower_rungs=(),
            keep_alive_s=self.limits.keep_alive_s,
            n_threads=self.limits.n_threads or n_threads,
            started_s=now,
            is_pinned=self.is_pinned(queue.key),
        )
        queue.move = None
        queue.resident = self.residents[resident.worker] = resident
        host = rung.host
        n_left = host.available_bytes - host.total_bytes - host.margin_bytes
        resident.parked_limit = self.parked_limit(n_left) if resident.parks else 0
        return resident

    def parked_limit(self, n_left: int) -> int:
        """Return what each model may park where so many bytes of RAM are left, parked ones too."""
        n_parking = sum(r.parks and r.phase is not Phase.STOPPING for r in self.residents.values())
        return min(self.limits.parked_bytes, policy.parked_share(n_left, n_parking))

    def stop(
        self,
        resident: Resident,
        reason: str,
        now: float,
        *,
        kind: EventKind = "unload",
        cause: str = "",
    ) -> list[Effect]:
        """Stop a worker; nothing if it is being stopped already."""
        if resident.phase is Phase.STOPPING:
            return []
        resident.phase = Phase.STOPPING
        is_urgent = kind in {"evict", "reload", "shrunk"}
        stop = StopWorker(worker=resident.worker, reason=reason, is_urgent=is_urgent)
        return [stop, note(kind, resident.key, reason, now, cause=cause or kind)]

    def begin_move(
        self,
        resident: Resident,
        options: PlanOptions,
        *,
        claim: Rung,
        least: Rung,
        reason: str,
        now: float,
        kind: Literal["shrunk", "moved_up"],
        cause: str,
    ) -> list[Effect]:
        """Stop an idle resident, to load it again with another placement."""
        self.queues[resident.key].move = Move(
            model=resident.model,
            purpose=resident.purpose,
            options=options,
            claim=claim,
            least=least,
            keep_alive_s=resident.keep_alive_s,
            idle_since_s=resident.idle_since_s,
        )
        return self.stop(resident, reason, now, kind=kind, cause=cause)

    def drop_move(
        self, queue: ModelQueue, reason: str, now: float, *, kind: EventKind, cause: str
    ) -> list[Effect]:
        """Leave a model unloaded that was on its way to another placement."""
        if queue.move is None:
            return []
        queue.move = None
        return [note(kind, queue.key, reason, now, cause=cause)]

    @property
    def moving(self) -> list[ModelQueue]:
        """The queues whose model is between two placements while nobody waits for it."""
        return [
            queue for queue in self.queues.values() if queue.move is not None and not queue.waiting
        ]

    def expiring_moves(self) -> list[tuple[ModelQueue, float]]:
        """Return the queues whose model is to be loaded again, and until when that is of use."""
        return [
            (queue, queue.move.idle_since_s + queue.move.keep_alive_s)
            for queue in self.moving
            if queue.move is not None and not queue.resident and not self.is_pinned(queue.key)
        ]

    # --- pins -----------------------------------------------------------------------------

    def is_pinned(self, key: str) -> bool:
        """Whether a model stays loaded whoever needs its memory."""
        return self._pins.get(key, key in self.limits.pinned)

    def pin(self, key: str, *, pinned: bool) -> None:
        """Pin or unpin a model; it wins over the limits."""
        self._pins.pop(key, None)
        if pinned is not (key in self.limits.pinned):
            self._pins[key] = pinned

    def remove(self, worker: WorkerId) -> Resident | None:
        """Forget a worker that has ended, and the leases on it."""
        resident = self.residents.pop(worker, None)
        if resident is not None:
            self.queues[resident.key].resident = None
            for request in resident.leases:
                del self.leases[request]
        return resident

    def tidy(self) -> None:
        """Forget the queues that have nothing to remember."""
        for key in [key for key, queue in self.queues.items() if queue.is_forgettable]:
            del self.queues[key]


def _started(resident: Resident) -> StartWorker:
    return StartWorker(
        worker=resident.worker,
        model=resident.model,
        rung=resident.rung,
        n_threads=resident.n_threads,
        parked_limit=resident.parked_limit,
    )


def _want_the_same(one: Request, other: Request) -> bool:
    return one.options == other.options and one.model.digest == other.model.digest
