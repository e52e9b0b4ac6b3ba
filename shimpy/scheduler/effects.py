"""What the core wants done; the shell carries each out and decides nothing."""

from __future__ import annotations

from dataclasses import dataclass

from shimpy.errors import ShimpyError
from shimpy.placement.placement import Rung
from shimpy.registry.model import Model
from shimpy.scheduler.states import Event, EventKind, RequestId, WorkerId


@dataclass(frozen=True, slots=True, kw_only=True)
class StartWorker:
    """Start a worker and let it load; ends in on_ready, on_load_failed or on_worker_exit."""

    worker: WorkerId
    model: Model
    rung: Rung
    n_threads: int
    # RAM that it may park idle caches in.
    parked_limit: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StopWorker:
    """Stop a worker, by force when it must be; ends in on_worker_exit."""

    worker: WorkerId
    reason: str
    # Somebody waits for its memory: what it would like to save must not take long.
    is_urgent: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """Give a request its lease."""

    request: RequestId
    worker: WorkerId
    # How long the request waited for the model to load; 0 when it was loaded already.
    load_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Reject:
    """Tell a waiting request that it will not be served."""

    request: RequestId
    error: ShimpyError


@dataclass(frozen=True, slots=True, kw_only=True)
class SetThreads:
    """Let a worker use this many threads from its next step on."""

    worker: WorkerId
    n_threads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitParked:
    """Let a worker park no more than this from its next step on; ends in on_stats."""

    worker: WorkerId
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Probe:
    """Take a snapshot of the hardware; ends in on_hardware or on_probe_failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """Tell the world what happened and why: the log, `ps`, /api/events."""

    event: Event


Effect = StartWorker | StopWorker | Grant | Reject | SetThreads | LimitParked | Probe | Note


def note(kind: EventKind, model: str, reason: str, now: float, *, cause: str = "") -> Note:
    """Return the effect that tells of an event; `cause` is its reason in one word to count by."""
    return Note(event=Event(kind=kind, model=model, reason=reason, at_s=now, cause=cause))
