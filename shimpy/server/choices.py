"""Several answers in one request: all under one lease, side by side as far as there are slots."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from shimpy.errors import InvalidOptionError
from shimpy.scheduler.lease import Lease
from shimpy.server.events import Event
from shimpy.server.generation import acquire, find_model, generate_on, prepare_request
from shimpy.server.prompts import Prepared
from shimpy.server.record import Record
from shimpy.server.requests import GenerationRequest
from shimpy.server.services import Services

# Each is a sequence of its own in the worker; more would keep others from their turn.
MAX_CHOICES = 64

_Choice = tuple[int, AsyncGenerator[Event, None]]


async def run_choices(
    services: Services, requests: Sequence[GenerationRequest], n: int, record: Record
) -> AsyncGenerator[tuple[int, Event], None]:
    """Yield the events of `n` answers to each request, each with its index, as they come.

    The requests are for one model, with the same options. The answers to the first are 0 to
    n - 1, those to the second n to 2n - 1, and so on; every one of them ends with Finished. The
    first failure ends all.

    Raises:
        InvalidOptionError: more than MAX_CHOICES in all.
        ShimpyError: as `run_generation`.
    """
    check_choices(len(requests), n)
    arrived_s = time.monotonic()
    first = requests[0]
    model = await find_model(services, first.model, record)
    prepared = [await prepare_request(services, model, request) for request in requests]
    choices = [one.choice(index) for one in prepared for index in range(n)]
    async with acquire(services, model, first.options, first.keep_alive_s, record) as lease:
        if len(choices) == 1:
            async with aclosing(generate_on(lease, choices[0], record, arrived_s)) as one:
                async for event in one:
                    yield 0, event
            return
        parts = [Record(request_id=record.request_id) for _ in choices]
        try:
            async with aclosing(_side_by_side(lease, choices, parts, arrived_s)) as events:
                async for item in events:
                    yield item
        finally:
            sum_up(record, parts)


def check_choices(n_prompts: int, n: int) -> None:
    """Refuse more answers than one request may have.

    Raises:
        InvalidOptionError: more than MAX_CHOICES in all, or none.
    """
    if n < 1 or n * n_prompts > MAX_CHOICES:
        wanted = f"{n_prompts} prompts with {n} choices each" if n_prompts > 1 else f"n = {n}"
        raise InvalidOptionError(
            f"a request may ask for 1 to {MAX_CHOICES} answers, not {wanted}", option="n"
        )


async def _side_by_side(
    lease: Lease, choices: Sequence[Prepared], records: Sequence[Record], arrived_s: float
) -> AsyncGenerator[tuple[int, Event], None]:
    """Yield the events of all choices; they end, the worker's work on them too, with this."""
    waiting = deque(
        (index, generate_on(lease, choice, records[index], arrived_s))
        for index, choice in enumerate(choices)
    )
    # No more at a time than run at a time: other requests' turn comes in between.
    n_running = max(1, lease.ready.n_slots)
    running: dict[asyncio.Task[Event | None], _Choice] = {}

    def wait_for(choice: _Choice) -> None:
        running[asyncio.ensure_future(anext(choice[1], None))] = choice

    # Not in a TaskGroup: nothing may be yielded from inside one.
    try:
        while waiting or running:
            while waiting and len(running) < n_running:
                wait_for(waiting.popleft())
            done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=lambda task: running[task][0]):
                index, events = running.pop(task)
                event = task.result()
                if event is not None:
                    wait_for((index, events))
                    yield index, event
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        # One whose step was cancelled before it began still holds its place in the worker.
        for _, events in running.values():
            await events.aclose()


def sum_up(record: Record, parts: Sequence[Record]) -> None:
    """Let the request's record have the sums over its choices, and the times of the slowest."""
    for name in ("n_prompt", "n_cached", "n_generated"):
        setattr(record, name, sum(getattr(part, name) or 0 for part in parts))
    for name in ("queue_s", "prefill_s", "decode_s"):
        setattr(record, name, max((getattr(part, name) or 0.0 for part in parts), default=0.0))
    record.first_token_s = min(
        (part.first_token_s for part in parts if part.first_token_s is not None), default=None
    )
    record.outcome = next((part.outcome for part in parts if part.outcome), None)
