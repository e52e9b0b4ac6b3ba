"""The scheduler's decisions: events in, effects out. Pure: time and hardware come as values.

The rules it keeps:

- First come, first served among the requests for one model. A loaded model never waits for
  another's load, but for one case: a load that busy residents have kept waiting for
  PATIENCE_S makes them stop taking newer requests, so that nobody waits for ever.
- A resident with leases is never evicted, nor is a pinned one. Before an idle one is, a
  placement is looked for in which all fit (room.RoomSearch).
- Every request ends exactly once: rejected, cancelled while it waits, or granted and then
  released, cancelled or lost with its worker.
- A load is decided on a fresh snapshot only. Whatever may make room for a waiting load asks
  for one (Probe); one that was overtaken by a change of the residents is taken again.
- While models are loaded, a snapshot is also taken every few seconds, and idle residents are
  placed anew where it must or may be (replanning.Watch).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType

from shimpy.errors import (
    GgufError,
    HeldBackError,
    LoadError,
    QueueFullError,
    ShimpyError,
    StoppingError,
)
from shimpy.gguf.arch import ModelShape
from shimpy.placement.hardware import Hardware
from shimpy.placement.placement import Plan, PlanOptions
from shimpy.protocol.messages import Ready
from shimpy.registry.model import Model
from shimpy.scheduler import policy
from shimpy.scheduler.books import Books, Limits
from shimpy.scheduler.effects import (
    Effect,
    Probe,
    Reject,
    SetThreads,
    StopWorker,
    note,
)
from shimpy.scheduler.exits import WorkerExit
from shimpy.scheduler.ledger import Ledger
from shimpy.scheduler.placing import Placing
from shimpy.scheduler.replanning import Watch
from shimpy.scheduler.states import (
    ModelQueue,
    Phase,
    Request,
    RequestId,
    Resident,
    Retry,
    WorkerId,
)
from shimpy.units import format_duration

# Between two looks at free memory at least so many times as long as one takes.
_LOOK_SHARE = 50.0


class SchedulerCore:
    """Owns which models are resident; every method is an event and returns what to do."""

    def __init__(self, limits: Limits, planner: policy.Planner) -> None:
        self._books = Books(limits)
        self._limits = limits
        self._planner = planner
        self._watch = Watch()
        self._draining = False
        # When free memory is to be looked at again; a snapshot is wanted for that.
        self._look_at_s = math.inf
        self._wants_look = False
        self._probed_s = 0.0
        # A snapshot is on its way; it was overtaken; another one is needed after it.
        self._probing = False
        self._overtaken = False
        self._wants_probe = False

    # --- what others may read -------------------------------------------------------------

    @property
    def residents(self) -> Mapping[WorkerId, Resident]:
        """All workers, for reports."""
        return MappingProxyType(self._books.residents)

    @property
    def queues(self) -> Mapping[str, ModelQueue]:
        """The queue of each model that has anything to remember, for reports."""
        return MappingProxyType(self._books.queues)

    @property
    def next_deadline_s(self) -> float | None:
        """When on_timer is to be called next; None: not before another event."""
        books = self._books
        idle = [r for r in books.residents.values() if r.is_idle and not books.has_waiting(r)]
        times = [resident.expires_s for resident in idle]
        times += [expires_s for _, expires_s in books.expiring_moves()]
        times += [
            queue.blocked_since_s + policy.PATIENCE_S
            for queue in books.queues.values()
            if queue.blocked_since_s is not None and not queue.is_impatient
        ]
        if not self._wants_look:
            times.append(self._look_at_s)
        soonest = min(times, default=math.inf)
        return None if math.isinf(soonest) else soonest

    def on_limits(self, limits: Limits) -> None:
        """Keep to other limits from now on; residents keep their own keep_alive."""
        self._limits = self._books.limits = limits
        for resident in self._books.residents.values():
            resident.is_pinned = self._books.is_pinned(resident.key)

    # --- events: requests -----------------------------------------------------------------

    def on_request(self, request: Request, now: float) -> list[Effect]:
        """Take a new request.

        The cases, in order:

        1. The daemon is stopping, the model's file is broken, or the model is held back after
           deaths: reject.
        2. Loaded, serves the request, has a place, and nobody waits: grant.
        3. The queue is full: reject, with a guess at when it will not be.
        4. Else the request waits its turn: for a place, for the load that is under way, or for
           a load that is decided once the hardware has been probed (on_hardware).
        """
        queue = self._books.queue_of(request)
        refusal = self._refusal(queue, request, now)
        if refusal is not None:
            effects: list[Effect] = [Reject(request=request.id, error=refusal)]
            return self._settle(effects, now)
        self._books.enqueue(queue, request)
        effects = self._books.grant_waiting(queue, now)
        if self._books.needs_placing(queue):
            self._wants_probe = True
        return self._settle(effects, now)

    def on_cancelled(self, request: RequestId, now: float) -> list[Effect]:
        """Forget a request whose client has left, wherever it is; nothing if it has ended."""
        queue = self._books.dequeue(request)
        if queue is None:
            return self.on_released(request, now, completed=False)
        effects = self._books.grant_waiting(queue, now)
        resident = queue.resident
        is_loading = resident is not None and resident.phase is Phase.LOADING
        if resident is not None and is_loading and not queue.waiting and resident.move is None:
            reason = "no request waits for it any more"
            effects += self._books.stop(resident, reason, now, cause="abandoned")
        self._wants_probe = True
        return self._settle(effects, now)

    def on_released(self, request: RequestId, now: float, *, completed: bool) -> list[Effect]:
        """End a lease; `completed` tells that its worker served it to the end.

        Nothing happens when the lease is gone already, with its worker.
        """
        resident = self._books.release(request, now)
        if resident is None:
            return []
        queue = self._books.queues[resident.key]
        if completed:
            queue.n_deaths = 0
        effects = self._books.grant_waiting(queue, now)
        if resident.is_idle:
            self._wants_probe = True
        return self._settle(effects, now)

    # --- events: hardware -----------------------------------------------------------------

    def on_hardware(self, hardware: Hardware, now: float) -> list[Effect]:
        """Place the models that are waited for, the longest waiting first (Placing.place).

        When it is time for that, idle residents are placed anew (Watch.look).
        """
        self._probing = False
        self._books.n_cores = hardware.host.n_cores
        if self._overtaken:
            self._overtaken = False
            self._wants_probe = True
            return self._settle([], now)
        ledger = Ledger(hardware, self._books.residents.values())
        placing = Placing(self._books, ledger, self._planner, now)
        effects = placing.place_all(self._pending())
        if self._wants_look:
            self._wants_look = False
            effects += self._watch.look(self._books, ledger, self._planner, now)
            # Where a snapshot takes long, they are taken less often.
            pause_s = max(self._limits.replan_interval_s, _LOOK_SHARE * (now - self._probed_s))
            self._look_at_s = now + pause_s
        return self._settle(effects, now)

    def preview(self, hardware: Hardware) -> list[tuple[Model, Plan]]:
        """Return the plans that on_hardware would go by on this snapshot; changes nothing.

        So that the shell can have their figures checked before it is asked.
        """
        made: list[Plan] = []

        def planner(shape: ModelShape, supposed: Hardware, options: PlanOptions) -> Plan:
            made.append(self._planner(shape, supposed, options))
            return made[-1]

        ledger = Ledger(hardware, self._books.residents.values())
        placing = Placing(self._books, ledger, planner, now=0.0)
        found = []
        for queue in sorted(self._pending(), key=lambda queue: queue.waiting[0].id):
            made.clear()
            rung = placing.preview(queue)
            model = queue.waiting[0].model
            found += [(model, plan) for plan in made if plan.chosen is rung is not None][:1]
        return found

    def present(self, hardware: Hardware) -> Hardware:
        """Return a snapshot less what workers that load are about to take."""
        return Ledger(hardware, self._books.residents.values()).present()

    def on_probe_failed(self, reason: str, now: float) -> list[Effect]:
        """Reject what waits to be placed: nothing is known of the hardware."""
        self._probing = False
        self._overtaken = self._wants_look = False
        self._look_at_s = now + self._limits.replan_interval_s
        effects: list[Effect] = []
        for queue in self._books.moving:
            effects += self._books.drop_move(queue, reason, now, kind="unload", cause="no_room")
        for queue in self._pending():
            message = f"{queue.key} can't be placed: the hardware could not be probed: {reason}"
            effects += self._books.reject_waiting(queue, partial(LoadError, message))
        return self._settle(effects, now)

    # --- events: workers ------------------------------------------------------------------

    def on_ready(self, worker: WorkerId, ready: Ready, now: float) -> list[Effect]:
        """Grant what waits for a model that is loaded now."""
        resident = self._books.residents.get(worker)
        if resident is None or resident.phase is not Phase.LOADING:
            return []
        resident.phase = Phase.READY
        resident.ready = ready
        resident.ready_s = resident.idle_since_s = now
        queue = self._books.queues[resident.key]
        if resident.move is not None and not queue.waiting:
            resident.idle_since_s = resident.move.idle_since_s
        resident.move = None
        self._residents_changed()
        took = format_duration(now - resident.started_s)
        reason = f"loaded in {took}, {policy.describe(resident.rung)}"
        effects: list[Effect] = [note("ready", resident.key, reason, now)]
        effects += self._books.grant_waiting(queue, now)
        return self._settle(effects, now)

    def on_load_failed(
        self, worker: WorkerId, message: str, now: float, *, out_of_memory: bool
    ) -> list[Effect]:
        """Try one rung down after a lack of memory, once; else reject everyone who waits."""
        resident = self._books.residents.get(worker)
        if resident is None or resident.phase is not Phase.LOADING:
            return []
        queue = self._books.queues[resident.key]
        effects = self._load_ended(queue, resident, message, now, out_of_memory=out_of_memory)
        resident.phase = Phase.STOPPING
        effects.append(StopWorker(worker=worker, reason="its load failed"))
        return self._settle(effects, now)

    def on_worker_exit(self, worker: WorkerId, end: WorkerExit, now: float) -> list[Effect]:
        """Forget a worker that has been reaped.

        The cases:

        1. It was asked to stop: its memory is back.
        2. It died while loading: as a failed load, and a death.
        3. It died loaded: its leases are lost (the shell tells their clients), those who still
           wait get a fresh load unless the model is now held back; a death.
        """
        resident = self._books.remove(worker)
        if resident is None:
            return []
        queue = self._books.queues[resident.key]
        self._residents_changed()
        effects: list[Effect] = []
        if resident.phase is Phase.STOPPING:
            return self._settle(effects, now)
        effects += self._count_death(queue, end, now)
        if resident.phase is Phase.LOADING:
            reason = f"its worker {end.reason}"
            effects += self._load_ended(
                queue, resident, reason, now, out_of_memory=end.out_of_memory
            )
        elif now < queue.held_until_s:
            effects += self._books.reject_waiting(queue, partial(self._held_back, queue, now))
        return self._settle(effects, now)

    # --- events: time and people ----------------------------------------------------------

    def on_timer(self, now: float) -> list[Effect]:
        """Unload residents whose keep_alive is over; lose patience with busy ones; look around."""
        if now >= self._look_at_s:
            self._wants_look = True
        for queue in self._books.queues.values():
            since = queue.blocked_since_s
            if since is not None and now >= since + policy.PATIENCE_S and not queue.is_impatient:
                queue.is_impatient = True
                self._wants_probe = True
        return self._settle([], now)

    def on_unload(self, key: str, now: float) -> list[Effect]:
        """Unload a model: when it is idle now, else after its last lease."""
        queue = self._books.queues.get(key)
        if queue is None:
            return []
        reason = "somebody asked for it"
        effects = self._books.drop_move(queue, reason, now, kind="unload", cause="asked")
        resident = queue.resident
        if resident is None:
            return self._settle(effects, now)
        resident.keep_alive_s = 0.0
        # Of a pinned model this one resident is let go; the next one is kept again.
        resident.is_pinned = False
        if resident.is_idle and not queue.waiting:
            effects += self._books.stop(resident, reason, now, cause="asked")
        return self._settle(effects, now)

    def on_pin(self, key: str, now: float, *, pinned: bool) -> list[Effect]:
        """Keep a model loaded from now on, whoever needs its memory, once it is loaded; or not.

        What is unpinned begins its keep_alive anew. Nothing happens to what is so already.
        """
        if self._books.is_pinned(key) == pinned:
            return []
        self._books.pin(key, pinned=pinned)
        queue = self._books.queues.get(key)
        if queue is not None and queue.resident is not None:
            queue.resident.is_pinned = pinned
            if queue.resident.is_idle and not pinned:
                queue.resident.idle_since_s = now
        if pinned:
            event = note("pinned", key, "it stays loaded, whoever needs its memory", now)
        else:
            event = note(
                "unpinned", key, "it leaves when its keep_alive is over, or for others", now
            )
            # Whoever waits for its memory may have it.
            self._wants_probe = True
        return self._settle([event], now)

    def is_pinned(self, key: str) -> bool:
        """Whether a model is pinned, loaded or not."""
        return self._books.is_pinned(key)

    def on_drain(self, now: float) -> list[Effect]:
        """Take no more requests; unload what is idle, the rest as its leases end."""
        self._draining = True
        effects: list[Effect] = []
        for queue in self._books.queues.values():
            queue.move = None
            effects += self._books.reject_waiting(queue, StoppingError)
        for resident in self._books.residents.values():
            if resident.phase is Phase.LOADING:
                effects += self._books.stop(resident, "shimpy is stopping", now, cause="stopping")
        return self._settle(effects, now)

    def on_drain_over(self, now: float) -> list[Effect]:
        """Stop every worker, busy or not: the time to drain is over."""
        effects = self.on_drain(now)
        for resident in self._books.residents.values():
            effects += self._books.stop(resident, "shimpy is stopping", now, cause="stopping")
        return effects

    # --- why not, and what failed ---------------------------------------------------------

    def _refusal(self, queue: ModelQueue, request: Request, now: float) -> ShimpyError | None:
        if self._draining:
            return StoppingError()
        if request.model.shape is None:
            return GgufError(f"{queue.key} can't be used: {request.model.error}")
        if now < queue.held_until_s:
            return self._held_back(queue, now)
        if queue.waiting or not self._books.can_grant(queue, request):
            return self._full(queue)
        return None

    def _full(self, queue: ModelQueue) -> QueueFullError | None:
        n_waiting = len(queue.waiting)
        if n_waiting < self._limits.max_queue:
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

    def _held_back(self, queue: ModelQueue, now: float) -> HeldBackError:
        wait_s = queue.held_until_s - now
        return HeldBackError(
            f"{queue.key} is held back for another {format_duration(wait_s)}: its workers died "
            f"{queue.n_deaths} times in a row; the last one {queue.last_death}",
            retry_after_s=wait_s,
        )

    def _load_ended(
        self, queue: ModelQueue, resident: Resident, reason: str, now: float, *, out_of_memory: bool
    ) -> list[Effect]:
        """Arrange one more try after a lack of memory, or reject everyone who waits."""
        move = resident.move
        if move is not None:
            self._watch.bar(resident.key, now)
        if out_of_memory and resident.lower_rungs and (queue.waiting or move is not None):
            if queue.waiting:
                queue.retry = Retry(
                    rungs=resident.lower_rungs, purpose=resident.purpose, reason=reason
                )
            elif move is not None and now >= queue.held_until_s:
                smallest = resident.lower_rungs[-1]
                queue.move = replace(move, rungs=resident.lower_rungs, claim=smallest)
            return [note("retry", queue.key, f"{reason}; trying a smaller placement", now)]
        message = f"{queue.key} could not be loaded: {reason}"
        effects: list[Effect] = [note("load_failed", queue.key, message, now)]
        return effects + self._books.reject_waiting(
            queue, partial(LoadError, message, out_of_memory=out_of_memory)
        )

    def _count_death(self, queue: ModelQueue, end: WorkerExit, now: float) -> list[Effect]:
        queue.n_deaths += 1
        queue.last_death = end.reason
        effects: list[Effect] = [
            note("died", queue.key, f"its worker {end.reason}", now, cause=end.kind.value)
        ]
        hold_s = policy.hold_s(queue.n_deaths)
        if hold_s > 0:
            queue.held_until_s = now + hold_s
            effects.append(note("held", queue.key, self._held_back(queue, now).message, now))
        return effects

    # --- after every event ----------------------------------------------------------------

    def _settle(self, effects: list[Effect], now: float) -> list[Effect]:
        """Add to an event's effects what follows from the new state."""
        effects += self._end_yielding(now)
        effects += self._expire(now)
        self._plan_look(now)
        if not self._probing:
            is_moving = any(queue.resident is None for queue in self._books.moving)
            if self._wants_look or (self._wants_probe and (self._pending() or is_moving)):
                self._probing = True
                self._probed_s = now
                effects.append(Probe())
            self._wants_probe = False
        effects += self._share_threads()
        self._books.tidy()
        return effects

    def _plan_look(self, now: float) -> None:
        """Look at free memory at intervals as long as there is a loaded model to move."""
        interval_s = self._limits.replan_interval_s
        residents = self._books.residents.values()
        is_loaded = any(resident.phase is Phase.READY for resident in residents)
        if interval_s <= 0 or self._draining or not is_loaded:
            self._wants_look = False
            self._look_at_s = math.inf
        elif math.isinf(self._look_at_s):
            self._look_at_s = now + interval_s

    def _end_yielding(self, now: float) -> list[Effect]:
        """Let residents serve again whose memory nobody waits for any more."""
        effects: list[Effect] = []
        for resident in self._books.residents.values():
            if resident.yields_to is None:
                continue
            queue = self._books.waiting.get(resident.yields_to)
            other = queue.resident if queue is not None else None
            has_room = other is not None and other.phase is Phase.LOADING
            if queue is None or has_room:
                resident.yields_to = None
                effects += self._books.grant_waiting(self._books.queues[resident.key], now)
        return effects

    def _expire(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        for queue, expires_s in self._books.expiring_moves():
            if now >= expires_s:
                reason = "its keep_alive was over before it was loaded again"
                effects += self._books.drop_move(
                    queue, reason, now, kind="unload", cause="keep_alive"
                )
        for resident in self._books.residents.values():
            if not resident.is_idle or self._books.has_waiting(resident):
                continue
            if self._draining:
                effects += self._books.stop(resident, "shimpy is stopping", now, cause="stopping")
            elif now >= resident.expires_s:
                kept = format_duration(resident.keep_alive_s)
                reason = f"idle for its keep_alive of {kept}"
                effects += self._books.stop(resident, reason, now, cause="keep_alive")
        return effects

    def _share_threads(self) -> list[Effect]:
        if self._limits.n_threads is not None:
            return []
        busy = [r for r in self._books.residents.values() if r.phase is Phase.READY and r.leases]
        effects: list[Effect] = []
        for worker, n_threads in policy.share_threads(self._books.n_cores, busy).items():
            resident = self._books.residents[worker]
            if resident.n_threads != n_threads:
                resident.n_threads = n_threads
                effects.append(SetThreads(worker=worker, n_threads=n_threads))
        return effects

    def _pending(self) -> list[ModelQueue]:
        """Return the queues whose model waits to be placed."""
        books = self._books
        return [queue for queue in books.queues.values() if books.needs_placing(queue)]

    def _residents_changed(self) -> None:
        """A snapshot that is on its way can't be told apart from the memory of before."""
        self._overtaken = self._probing
        self._wants_probe = True
