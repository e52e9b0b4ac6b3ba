"""What the scheduler tells the world: frozen snapshots, and a journal of events."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Literal

from shimpy.placement.placement import Rung
from shimpy.protocol.messages import Ready, Stats
from shimpy.registry.model import Model
from shimpy.scheduler.states import EventKind

MAX_HISTORY = 256
MAX_UNREAD_EVENTS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidentInfo:
    """A resident as `ps` shows it; times are seconds since the epoch."""

    model: Model
    state: Literal["loading", "ready", "stopping"]
    pid: int | None
    # The placement with the bytes that were predicted.
    rung: Rung
    # With the bytes that were really taken; None while it loads.
    ready: Ready | None
    # How much of the weights is in place, 0 to 1.
    load_fraction: float
    n_leases: int
    n_waiting: int
    # When it is unloaded if nothing more is asked of it; inf: never.
    expires_at_s: float
    loaded_at_s: float | None
    n_threads: int
    stats: Stats | None


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitingInfo:
    """A model that is not resident: requests wait for it, or it is held back after deaths."""

    name: str
    n_waiting: int
    n_deaths: int
    last_death: str
    # Seconds since the epoch; None: not held back.
    held_until_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryEvent:
    """A load, unload, eviction or failure, and why; `at_s` in seconds since the epoch."""

    kind: EventKind
    model: str
    reason: str
    at_s: float
    # Why, in one of a few words.
    cause: str = ""


class Journal:
    """The last MAX_HISTORY events, and everyone who listens for more."""

    def __init__(self) -> None:
        self._events: deque[HistoryEvent] = deque(maxlen=MAX_HISTORY)
        self._listeners: set[asyncio.Queue[HistoryEvent]] = set()

    def add(self, event: HistoryEvent) -> None:
        """Remember an event and tell the listeners; a slow one loses its oldest."""
        self._events.append(event)
        for queue in self._listeners:
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(event)

    def past(self) -> tuple[HistoryEvent, ...]:
        """Return the events, oldest first."""
        return tuple(self._events)

    async def follow(self) -> AsyncGenerator[HistoryEvent, None]:
        """Yield the events from now on."""
        queue: asyncio.Queue[HistoryEvent] = asyncio.Queue(MAX_UNREAD_EVENTS)
        self._listeners.add(queue)
        try:
            while True:
                yield await queue.get()
        finally:
            self._listeners.discard(queue)
