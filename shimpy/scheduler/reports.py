"""What the scheduler tells the world: frozen snapshots, and a journal of events."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace
from typing import Literal

from shimpy.placement.placement import Rung
from shimpy.protocol.messages import Ready, Stats
from shimpy.registry.model import Model
from shimpy.scheduler.states import EventKind

MAX_HISTORY = 256
_US_PER_S = 1e6
# What happens beside loading and unloading.
_ASIDES: frozenset[EventKind] = frozenset({"saved", "restored"})


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
    is_pinned: bool
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
    # Why it is not loaded, as far as anything was said of it.
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryEvent:
    """A load, unload, eviction or failure, and why; `at_s` in seconds since the epoch."""

    kind: EventKind
    model: str
    reason: str
    at_s: float
    # Why, in one of a few words.
    cause: str = ""
    # Of the prompts whose KV cache was saved or restored.
    n_tokens: int = 0
    # Rises from event to event, also over a restart of the daemon: its time in microseconds.
    id: int = 0


class Journal:
    """The last MAX_HISTORY events; whoever follows reads from these, and keeps none of its own."""

    def __init__(self) -> None:
        self._events: deque[HistoryEvent] = deque(maxlen=MAX_HISTORY)
        self._last_id = 0
        self._news = asyncio.Event()

    def add(self, event: HistoryEvent) -> None:
        """Number an event, remember it, and wake those who follow."""
        self._last_id = max(self._last_id + 1, event_id(event.at_s))
        self._events.append(replace(event, id=self._last_id))
        self._news.set()
        self._news = asyncio.Event()

    def past(self) -> tuple[HistoryEvent, ...]:
        """Return the events, oldest first."""
        return tuple(self._events)

    def last_reason(self, model: str) -> str:
        """Return the reason of the last event about a model; "" when none is remembered."""
        about = (
            event.reason
            for event in reversed(self._events)
            if event.model == model and event.kind not in _ASIDES
        )
        return next(about, "")

    def follow(self, after: int | None = None) -> AsyncGenerator[HistoryEvent, None]:
        """Yield what is remembered with an id above `after`, then what comes; None: what comes.

        A reader that falls behind loses the oldest.
        """
        return self._follow(self._last_id if after is None else after)

    async def _follow(self, seen: int) -> AsyncGenerator[HistoryEvent, None]:
        while True:
            news = self._news
            event = next((event for event in self._events if event.id > seen), None)
            if event is None:
                await news.wait()
                continue
            seen = event.id
            yield event


def event_id(at_s: float) -> int:
    """Return the id of an event at that time, in seconds since the epoch, or of the last before."""
    return round(at_s * _US_PER_S)
