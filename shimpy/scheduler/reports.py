"""What the scheduler tells the world: frozen snapshots, and a journal of events."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from typing import Literal

import msgspec
from msgspec.structs import replace

from shimpy.placement.placement import Rung
from shimpy.protocol.messages import PrefixNews, Ready, Stats
from shimpy.registry.model import Model
from shimpy.scheduler.clock import Clock, to_epoch
from shimpy.scheduler.core import SchedulerCore
from shimpy.scheduler.crew import Crew
from shimpy.scheduler.states import Event, EventKind, ModelQueue, Resident
from shimpy.scheduler.worker import Worker
from shimpy.units import format_bytes

MAX_HISTORY = 256
_US_PER_S = 1e6
# What happens beside loading and unloading.
_ASIDES: frozenset[EventKind] = frozenset({"saved", "restored"})


class ResidentInfo(msgspec.Struct, frozen=True, kw_only=True):
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


class WaitingInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A model that is not resident: requests wait for it, or it is held back after deaths."""

    name: str
    n_waiting: int
    n_deaths: int
    last_death: str
    # Seconds since the epoch; None: not held back.
    held_until_s: float | None
    # Why it is not loaded, as far as anything was said of it.
    reason: str = ""


class HistoryEvent(msgspec.Struct, frozen=True, kw_only=True):
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

    @classmethod
    def of(cls, event: Event, at_s: float) -> HistoryEvent:
        """Return what is told of an event of the core's."""
        return cls(
            kind=event.kind, model=event.model, reason=event.reason, at_s=at_s, cause=event.cause
        )

    @classmethod
    def of_prefix(cls, model: str, news: PrefixNews, at_s: float) -> HistoryEvent | None:
        """Return what is told of a worker's saved prompts, if it is told."""
        if news.kind not in ("saved", "restored"):
            return None
        return cls(
            kind=news.kind,
            model=model,
            reason=f"{news.n_tokens} tokens, {format_bytes(news.n_bytes)}, {news.took_s:.2f} s",
            at_s=at_s,
            n_tokens=news.n_tokens,
        )


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


def report_residents(core: SchedulerCore, crew: Crew, clock: Clock) -> tuple[ResidentInfo, ...]:
    """Return all residents, the longest loaded first."""
    return tuple(
        _report_resident(resident, core.queues[resident.key], crew[resident.worker], clock)
        for resident in core.residents.values()
    )


def _report_resident(
    resident: Resident, queue: ModelQueue, worker: Worker, clock: Clock
) -> ResidentInfo:
    expires_s = resident.expires_s
    if not resident.is_idle and not resident.is_pinned:
        expires_s = clock.now() + resident.keep_alive_s
    loaded_s = resident.ready_s
    return ResidentInfo(
        model=resident.model,
        state=resident.phase.value,
        pid=worker.pid,
        rung=resident.rung,
        ready=resident.ready,
        load_fraction=worker.load_fraction,
        n_leases=len(resident.leases),
        n_waiting=len(queue.waiting),
        expires_at_s=to_epoch(clock, expires_s),
        is_pinned=resident.is_pinned,
        loaded_at_s=None if loaded_s is None else to_epoch(clock, loaded_s),
        n_threads=resident.n_threads,
        stats=worker.stats,
    )


def report_waiting(core: SchedulerCore, journal: Journal, clock: Clock) -> tuple[WaitingInfo, ...]:
    """Return the models that wait for a worker, or are held back after deaths."""
    now = clock.now()
    return tuple(
        WaitingInfo(
            name=queue.key,
            n_waiting=len(queue.waiting),
            n_deaths=queue.n_deaths,
            last_death=queue.last_death,
            held_until_s=(
                to_epoch(clock, queue.held_until_s) if queue.held_until_s > now else None
            ),
            reason=journal.last_reason(queue.key),
        )
        for queue in core.queues.values()
        if queue.resident is None and (queue.waiting or queue.held_until_s > now)
    )
