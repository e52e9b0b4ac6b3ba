"""What the scheduler knows: requests, residents, and the queue of each model.

The life of a resident (one worker process with one model):

            StartWorker            Ready
    (none) ------------> LOADING ----------> READY
                          |  |                |  |
              load failed,|  |died       died |  | keep_alive over, evicted,
             or abandoned |  |                |  | reloaded, unloaded, drained
                          v  |                |  v
                     STOPPING|                |STOPPING
                          |  |                |  |
                          +--+--> (none) <----+--+     when the process is reaped

A resident that moves to another placement (Move) goes this way too: its worker is stopped, and
another one is started without anybody's asking.

Only the core changes what is mutable here; the shell and the reports read it.
"""

from __future__ import annotations

import math
from collections import deque
from enum import Enum
from typing import Literal, NewType

import msgspec

from shimpy.placement.placement import PlanOptions, Rung
from shimpy.protocol.messages import Ready
from shimpy.registry.model import Model

RequestId = NewType("RequestId", int)
WorkerId = NewType("WorkerId", int)


class Phase(Enum):
    """Where a resident is in its life."""

    LOADING = "loading"
    READY = "ready"
    STOPPING = "stopping"


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One client's wish to use a model; ids rise with arrival, so they are the FIFO order."""

    id: RequestId
    model: Model
    options: PlanOptions
    # Replaces the resident's keep_alive; None leaves it.
    keep_alive_s: float | None = None
    arrived_s: float


class Purpose(msgspec.Struct, frozen=True, kw_only=True):
    """What a model is loaded for."""

    # What the request asked for that made it load, and that with the largest n_ctx of anyone.
    loaded_for: PlanOptions
    asked: PlanOptions
    # The context that a request without a wish of its own is content with; 0: any.
    default_n_ctx: int


class Move(msgspec.Struct, frozen=True, kw_only=True):
    """A reload of the scheduler's own accord: an idle model is on its way to another placement."""

    model: Model
    purpose: Purpose
    # What it is planned with: its options, and the context and slots that it had.
    options: PlanOptions
    # Memory that is kept for it until it is started.
    claim: Rung
    # The least that it is loaded with; less room than that, and it stays unloaded.
    least: Rung
    # Rungs to load it with, best first, after a lack of memory; empty: as planned then.
    rungs: tuple[Rung, ...] = ()
    # Of the resident that it was.
    keep_alive_s: float
    idle_since_s: float


class Resident(msgspec.Struct, kw_only=True, eq=False):
    """A model held by a worker, from the decision to start it until it is reaped."""

    worker: WorkerId
    model: Model
    purpose: Purpose
    rung: Rung
    # Rungs to try when this load runs out of memory; empty when it is such a try.
    lower_rungs: tuple[Rung, ...]
    keep_alive_s: float
    n_threads: int
    started_s: float
    phase: Phase = Phase.LOADING
    ready: Ready | None = None
    ready_s: float | None = None
    leases: set[RequestId] = msgspec.field(default_factory=set)
    # When the last lease ended, or the model got ready.
    idle_since_s: float = 0.0
    # It is loaded of the scheduler's own accord.
    move: Move | None = None
    # RAM that its parked caches take, as it told last, and that they may take, as it was told.
    parked_bytes: int = 0
    parked_limit: int = 0
    # RAM that its buffers will take yet, as it told last: untouched so far.
    untouched_bytes: int = 0
    # It is never evicted, nor made smaller for others, and outlives its keep_alive.
    is_pinned: bool = False
    # A request for another model that has waited too long for this one's memory: requests
    # that came after it are not granted here until it is served.
    yields_to: RequestId | None = None

    @property
    def key(self) -> str:
        """The model's name, under which its queue is found."""
        return str(self.model.name)

    @property
    def is_idle(self) -> bool:
        """Whether it is loaded and no request holds a lease on it."""
        return self.phase is Phase.READY and not self.leases

    @property
    def parks(self) -> bool:
        """Whether it copies idle caches to RAM: on a CPU, without flash attention."""
        shape = self.model.shape
        generates = shape is not None and not (shape.is_embedding or shape.is_reranker)
        return generates and not self.rung.placement.flash_attn

    @property
    def expires_s(self) -> float:
        """When its keep_alive is over, as long as it stays idle; inf: never."""
        return math.inf if self.is_pinned else self.idle_since_s + self.keep_alive_s

    @property
    def capacity(self) -> int:
        """Leases that it takes at once: its slots, and one whose prompt is prepared meanwhile."""
        n_slots = self.ready.n_slots if self.ready is not None else self.rung.placement.n_slots
        return n_slots + 1


class Retry(msgspec.Struct, frozen=True, kw_only=True):
    """A load that ran out of memory and is tried once more, with a lower rung."""

    rungs: tuple[Rung, ...]
    purpose: Purpose
    reason: str


class ModelQueue(msgspec.Struct, kw_only=True, eq=False):
    """The requests that wait for one model, and what happened to its workers."""

    key: str
    waiting: deque[Request] = msgspec.field(default_factory=deque)
    resident: Resident | None = None
    retry: Retry | None = None
    # It has been stopped, or is being stopped, to be loaded elsewhere.
    move: Move | None = None
    # Since when its load waits for memory that busy residents hold.
    blocked_since_s: float | None = None
    # That has taken too long: busy residents stop taking newer requests.
    is_impatient: bool = False
    # Deaths of its workers with no completed request between them.
    n_deaths: int = 0
    last_death: str = ""
    held_until_s: float = 0.0
    # Running mean of how long a lease is held, for Retry-After.
    mean_lease_s: float = 5.0

    @property
    def is_forgettable(self) -> bool:
        """Whether nothing here is worth remembering."""
        is_empty = not self.waiting and self.resident is None and self.move is None
        return is_empty and self.n_deaths == 0


EventKind = Literal[
    "load",
    "ready",
    "load_failed",
    "retry",
    "wait",
    "unload",
    "evict",
    "reload",
    "shrunk",
    "moved_up",
    "pinned",
    "unpinned",
    "died",
    "held",
    "refused",
    "saved",
    "restored",
]


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """Something that the scheduler did or met, and why."""

    kind: EventKind
    model: str
    reason: str
    # Seconds on the scheduler's clock; the shell reports them as seconds since the epoch.
    at_s: float
    # Why, in one of a few words, to count by: an ExitKind's value for a death.
    cause: str = ""
