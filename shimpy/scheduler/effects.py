"""What the core wants done; the shell carries each out and decides nothing."""

from __future__ import annotations

import msgspec

from shimpy.errors import ShimpyError
from shimpy.placement.placement import Rung
from shimpy.registry.model import Model
from shimpy.scheduler.states import Event, EventKind, RequestId, WorkerId


class StartWorker(msgspec.Struct, frozen=True, kw_only=True):
    """Start a worker and let it load; ends in on_ready, on_load_failed or on_worker_exit."""

    worker: WorkerId
    model: Model
    rung: Rung
    n_threads: int
    # RAM that it may park idle caches in.
    parked_limit: int


class StopWorker(msgspec.Struct, frozen=True, kw_only=True):
    """Stop a worker, by force when it must be; ends in on_worker_exit."""

    worker: WorkerId
    reason: str
    # Somebody waits for its memory: what it would like to save must not take long.
    is_urgent: bool = False


class Grant(msgspec.Struct, frozen=True, kw_only=True):
    """Give a request its lease."""

    request: RequestId
    worker: WorkerId
    # How long the request waited for the model to load; 0 when it was loaded already.
    load_s: float


class Reject(msgspec.Struct, frozen=True, kw_only=True):
    """Tell a waiting request that it will not be served."""

    request: RequestId
    error: ShimpyError


class SetThreads(msgspec.Struct, frozen=True, kw_only=True):
    """Let a worker use this many threads from its next step on."""

    worker: WorkerId
    n_threads: int


class LimitParked(msgspec.Struct, frozen=True, kw_only=True):
    """Let a worker park no more than this from its next step on; ends in on_stats."""

    worker: WorkerId
    n_bytes: int


class Probe(msgspec.Struct, frozen=True):
    """Take a snapshot of the hardware; ends in on_hardware or on_probe_failed."""


class Note(msgspec.Struct, frozen=True, kw_only=True):
    """Tell the world what happened and why: the log, `ps`, /api/events."""

    event: Event


Effect = StartWorker | StopWorker | Grant | Reject | SetThreads | LimitParked | Probe | Note


def note(kind: EventKind, model: str, reason: str, now: float, *, cause: str = "") -> Note:
    """Return the effect that tells of an event; `cause` is its reason in one word to count by."""
    return Note(event=Event(kind=kind, model=model, reason=reason, at_s=now, cause=cause))
