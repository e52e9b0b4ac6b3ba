"""The scheduler's decisions: events in, effects out. Pure: time and hardware come as values.

The rules it keeps:

- First come, first served among the requests for one model. A loaded model never waits for
  another's load, but for one case: a load that busy residents have kept waiting for
  PATIENCE_S makes them stop taking newer requests, so that nobody waits for ever.
- A resident with leases is never evicted. Before an idle one is, a placement beside all
  others is looked for (policy.find_room).
- Every request ends exactly once: rejected, cancelled while it waits, or granted and then
  released, cancelled or lost with its worker.
- A load is decided on a fresh snapshot only. Whatever may make room for a waiting load asks
  for one (Probe); one that was overtaken by a change of the residents is taken again.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import assert_never

from shimpy.errors import (
    DoesNotFitError,
    GgufError,
    HeldBackError,
    LoadError,
    QueueFullError,
    ShimpyError,
    StoppingError,
    UserError,
)
from shimpy.placement.defaults import N_CTX_LEAST
from shimpy.placement.hardware import Hardware
from shimpy.placement.placement import PlanOptions, Rung
from shimpy.protocol.messages import Ready
from shimpy.scheduler import policy
from shimpy.scheduler.effects import (
    Effect,
    Grant,
    Note,
    Probe,
    Reject,
    SetThreads,
    StartWorker,
    StopWorker,
)
from shimpy.scheduler.exits import WorkerExit
from shimpy.scheduler.ledger import Ledger, rung_fits
from shimpy.scheduler.states import (
    Event,
    EventKind,
    ModelQueue,
    Phase,
    Request,
    RequestId,
    Resident,
    Retry,
    WorkerId,
)
from shimpy.units import format_duration

# Weight of the newest lease in the running mean of their lengths.
_MEAN_WEIGHT = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The settings that the core keeps to."""

    keep_alive_s: float
    # Requests that may wait for one model.
    max_queue: int
    # Threads of every worker; None: busy workers share the cores.
    n_threads: int | None = None


class SchedulerCore:
    """Owns which models are resident; every method is an event and returns what to do."""

    def __init__(self, limits: Limits, planner: policy.Planner) -> None:
        self._limits = limits
        self._planner = planner
        self._queues: dict[str, ModelQueue] = {}
        self._residents: dict[WorkerId, Resident] = {}
        self._waiting: dict[RequestId, ModelQueue] = {}
        self._leases: dict[RequestId, tuple[Resident, float]] = {}
        self._last_worker = 0
        self._n_cores = 1
        self._draining = False
        # A snapshot is on its way; it was overtaken; another one is needed after it.
        self._probing = False
        self._overtaken = False
        self._wants_probe = False

    # --- what others may read -------------------------------------------------------------

    @property
    def residents(self) -> Mapping[WorkerId, Resident]:
        """All workers, for reports."""
        return MappingProxyType(self._residents)

    @property
    def queues(self) -> Mapping[str, ModelQueue]:
        """The queue of each model that has anything to remember, for reports."""
        return MappingProxyType(self._queues)

    @property
    def next_deadline_s(self) -> float | None:
        """When on_timer is to be called next; None: not before another event."""
        idle = [r for r in self._residents.values() if r.is_idle and not self._has_waiting(r)]
        times = [resident.idle_since_s + resident.keep_alive_s for resident in idle]
        times += [
            queue.blocked_since_s + policy.PATIENCE_S
            for queue in self._queues.values()
            if queue.blocked_since_s is not None and not queue.is_impatient
        ]
        soonest = min(times, default=math.inf)
        return None if math.isinf(soonest) else soonest

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
        key = str(request.model.name)
        queue = self._queues.setdefault(key, ModelQueue(key=key))
        refusal = self._refusal(queue, request, now)
        if refusal is not None:
            effects: list[Effect] = [Reject(request=request.id, error=refusal)]
            return self._settle(effects, now)
        queue.waiting.append(request)
        self._waiting[request.id] = queue
        effects = self._grant_waiting(queue, now)
        if self._needs_placing(queue):
            self._wants_probe = True
        return self._settle(effects, now)

    def on_cancelled(self, request: RequestId, now: float) -> list[Effect]:
        """Forget a request whose client has left, wherever it is; nothing if it has ended."""
        queue = self._waiting.pop(request, None)
        if queue is None:
            return self.on_released(request, now, completed=False)
        queue.waiting = deque(r for r in queue.waiting if r.id != request)
        effects = self._grant_waiting(queue, now)
        if not queue.waiting:
            self._unblock(queue)
            resident = queue.resident
            if resident is not None and resident.phase is Phase.LOADING:
                effects += self._stop(resident, "no request waits for it any more", now)
        self._wants_probe = True
        return self._settle(effects, now)

    def on_released(self, request: RequestId, now: float, *, completed: bool) -> list[Effect]:
        """End a lease; `completed` tells that its worker served it to the end.

        Nothing happens when the lease is gone already, with its worker.
        """
        resident, granted_s = self._leases.pop(request, (None, 0.0))
        if resident is None:
            return []
        resident.leases.discard(request)
        queue = self._queues[resident.key]
        queue.mean_lease_s += _MEAN_WEIGHT * (now - granted_s - queue.mean_lease_s)
        if completed:
            queue.n_deaths = 0
        resident.idle_since_s = now
        effects = self._grant_waiting(queue, now)
        if resident.is_idle:
            self._wants_probe = True
        return self._settle(effects, now)

    # --- events: hardware -----------------------------------------------------------------

    def on_hardware(self, hardware: Hardware, now: float) -> list[Effect]:
        """Place the models that are waited for, the longest waiting first (_place)."""
        self._probing = False
        self._n_cores = hardware.host.n_cores
        if self._overtaken:
            self._overtaken = False
            self._wants_probe = True
            return self._settle([], now)
        ledger = Ledger(hardware, self._residents.values())
        effects: list[Effect] = []
        pending = [queue for queue in self._queues.values() if self._needs_placing(queue)]
        for queue in sorted(pending, key=lambda queue: queue.waiting[0].id):
            effects += self._place(queue, ledger, now)
        return self._settle(effects, now)

    def on_probe_failed(self, reason: str, now: float) -> list[Effect]:
        """Reject what waits to be placed: nothing is known of the hardware."""
        self._probing = False
        self._overtaken = False
        effects: list[Effect] = []
        for queue in self._queues.values():
            if self._needs_placing(queue):
                message = f"{queue.key} can't be placed: the hardware could not be probed: {reason}"
                effects += self._reject_waiting(queue, partial(LoadError, message))
        return self._settle(effects, now)

    # --- events: workers ------------------------------------------------------------------

    def on_ready(self, worker: WorkerId, ready: Ready, now: float) -> list[Effect]:
        """Grant what waits for a model that is loaded now."""
        resident = self._residents.get(worker)
        if resident is None or resident.phase is not Phase.LOADING:
            return []
        resident.phase = Phase.READY
        resident.ready = ready
        resident.ready_s = resident.idle_since_s = now
        self._residents_changed()
        took = format_duration(now - resident.started_s)
        reason = f"loaded in {took}, {describe(resident.rung)}"
        effects: list[Effect] = [_note("ready", resident.key, reason, now)]
        effects += self._grant_waiting(self._queues[resident.key], now)
        return self._settle(effects, now)

    def on_load_failed(
        self, worker: WorkerId, message: str, now: float, *, out_of_memory: bool
    ) -> list[Effect]:
        """Try one rung down after a lack of memory, once; else reject everyone who waits."""
        resident = self._residents.get(worker)
        if resident is None or resident.phase is not Phase.LOADING:
            return []
        queue = self._queues[resident.key]
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
        resident = self._residents.pop(worker, None)
        if resident is None:
            return []
        queue = self._queues[resident.key]
        queue.resident = None
        for request in resident.leases:
            del self._leases[request]
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
            effects += self._reject_waiting(queue, partial(self._held_back, queue, now))
        return self._settle(effects, now)

    # --- events: time and people ----------------------------------------------------------

    def on_timer(self, now: float) -> list[Effect]:
        """Unload residents whose keep_alive is over; lose patience with busy ones."""
        for queue in self._queues.values():
            since = queue.blocked_since_s
            if since is not None and now >= since + policy.PATIENCE_S and not queue.is_impatient:
                queue.is_impatient = True
                self._wants_probe = True
        return self._settle([], now)

    def on_unload(self, key: str, now: float) -> list[Effect]:
        """Unload a model: when it is idle now, else after its last lease."""
        queue = self._queues.get(key)
        if queue is None or queue.resident is None:
            return []
        resident = queue.resident
        resident.keep_alive_s = 0.0
        effects: list[Effect] = []
        if resident.is_idle and not queue.waiting:
            effects = self._stop(resident, "somebody asked for it", now)
        return self._settle(effects, now)

    def on_drain(self, now: float) -> list[Effect]:
        """Take no more requests; unload what is idle, the rest as its leases end."""
        self._draining = True
        effects: list[Effect] = []
        for queue in self._queues.values():
            effects += self._reject_waiting(queue, StoppingError)
        for resident in self._residents.values():
            if resident.phase is Phase.LOADING:
                effects += self._stop(resident, "shimpy is stopping", now)
        return self._settle(effects, now)

    def on_drain_over(self, now: float) -> list[Effect]:
        """Stop every worker, busy or not: the time to drain is over."""
        effects = self.on_drain(now)
        for resident in self._residents.values():
            effects += self._stop(resident, "shimpy is stopping", now)
        return effects

    # --- requests -------------------------------------------------------------------------

    def _refusal(self, queue: ModelQueue, request: Request, now: float) -> ShimpyError | None:
        if self._draining:
            return StoppingError()
        if request.model.shape is None:
            return GgufError(f"{queue.key} can't be used: {request.model.error}")
        if now < queue.held_until_s:
            return self._held_back(queue, now)
        if queue.waiting or not self._can_grant(queue, request):
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

    def _can_grant(self, queue: ModelQueue, request: Request) -> bool:
        resident = queue.resident
        return (
            resident is not None
            and resident.phase is Phase.READY
            and len(resident.leases) < resident.capacity
            and (resident.yields_to is None or request.id < resident.yields_to)
            and policy.serves(resident, request)
        )

    def _grant_waiting(self, queue: ModelQueue, now: float) -> list[Effect]:
        """Grant from the front of the queue as long as its resident can take the next one."""
        effects: list[Effect] = []
        resident = queue.resident
        while queue.waiting and resident and self._can_grant(queue, queue.waiting[0]):
            request = queue.waiting.popleft()
            del self._waiting[request.id]
            self._leases[request.id] = resident, now
            resident.leases.add(request.id)
            if request.keep_alive_s is not None:
                resident.keep_alive_s = request.keep_alive_s
            assert resident.ready_s is not None, "only a loaded model is granted"
            load_s = max(0.0, resident.ready_s - request.arrived_s)
            effects.append(Grant(request=request.id, worker=resident.worker, load_s=load_s))
        if effects:
            self._unblock(queue)
        return effects

    def _reject_waiting(
        self,
        queue: ModelQueue,
        make_error: Callable[[], ShimpyError],
        *,
        like: Request | None = None,
    ) -> list[Effect]:
        """Reject all that wait for a model, or those that want the same as `like`."""
        rejected = [r for r in queue.waiting if like is None or _want_the_same(r, like)]
        for request in rejected:
            queue.waiting.remove(request)
            del self._waiting[request.id]
        if not queue.waiting:
            self._unblock(queue)
        return [Reject(request=request.id, error=make_error()) for request in rejected]

    def _held_back(self, queue: ModelQueue, now: float) -> HeldBackError:
        wait_s = queue.held_until_s - now
        return HeldBackError(
            f"{queue.key} is held back for another {format_duration(wait_s)}: its workers died "
            f"{queue.n_deaths} times in a row; the last one {queue.last_death}",
            retry_after_s=wait_s,
        )

    def _unblock(self, queue: ModelQueue) -> None:
        """Begin a new count of patience; an empty queue has no other wishes either."""
        queue.blocked_since_s = None
        queue.is_impatient = False
        if not queue.waiting:
            queue.retry = None

    # --- loads ----------------------------------------------------------------------------

    def _needs_placing(self, queue: ModelQueue) -> bool:
        """Whether requests wait that no worker, present or stopping, is going to serve."""
        if not queue.waiting:
            return False
        resident = queue.resident
        if resident is None:
            return True
        return resident.is_idle and not policy.serves(resident, queue.waiting[0])

    def _place(self, queue: ModelQueue, ledger: Ledger, now: float) -> list[Effect]:
        """Find room for the model that a queue waits for.

        The cases:

        1. It ran out of memory before: start the first lower rung that fits, or reject.
        2. It fits beside all others: start it, if need be once stopping workers have gone.
        3. It fits when idle residents leave, its own outdated one among them: stop these.
        4. It fits when busy ones leave: wait; after PATIENCE_S they take no newer requests.
        5. It never fits: reject those who asked for it with these options.

        Cases 2 to 5 are tried with the longest context that anyone in the queue asked for; when
        that can't be had yet, with what the first one asked for.
        """
        if queue.retry is not None:
            return self._place_retry(queue, queue.retry, ledger, now)
        effects: list[Effect] = []
        while self._needs_placing(queue):
            first = queue.waiting[0]
            try:
                wish, room = self._find_room(queue, ledger)
            except UserError as error:
                # The planner refuses an option; it says the same to all who want it.
                effects += self._reject_waiting(queue, partial(copy, error), like=first)
                effects += self._grant_waiting(queue, now)
                continue
            match room:
                case policy.Start(must_wait=True):
                    ledger.claim(room.rung)
                    return effects
                case policy.Start():
                    return effects + self._start_planned(queue, room, wish, ledger, now)
                case policy.Evict():
                    for victim in room.victims:
                        effects += self._evict(victim, queue, now)
                    ledger.claim(room.rung)
                    return effects
                case policy.Wait():
                    return effects + self._wait(queue, room, ledger, now)
                case policy.Refuse():
                    message = f"{queue.key} does not fit on this machine: {room.reason}"
                    effects.append(_note("refused", queue.key, message, now))
                    effects += self._reject_waiting(
                        queue, partial(DoesNotFitError, message), like=first
                    )
                    effects += self._grant_waiting(queue, now)
                case _:
                    assert_never(room)
        return effects

    def _find_room(self, queue: ModelQueue, ledger: Ledger) -> tuple[policy.Wish, policy.Room]:
        own = queue.resident
        first = queue.waiting[0]
        shape = first.model.shape
        assert shape is not None, "broken models are rejected on arrival"

        def room_for(wish: policy.Wish) -> policy.Room:
            plan = partial(wish.plan, self._planner, shape)
            return policy.find_room(plan, ledger, own)

        wish = policy.load_wish(queue.waiting)
        room = room_for(wish)
        modest = policy.Wish(options=first.options)
        if wish != modest and isinstance(room, policy.Wait | policy.Refuse):
            return modest, room_for(modest)
        return wish, room

    def _place_retry(
        self, queue: ModelQueue, retry: Retry, ledger: Ledger, now: float
    ) -> list[Effect]:
        for rung in retry.rungs:
            if not rung_fits(rung, ledger.remaining()):
                continue
            if not rung_fits(rung, ledger.present()):
                ledger.claim(rung)
                return []
            queue.retry = None
            return self._start(
                queue,
                rung,
                loaded_for=retry.loaded_for,
                asked=retry.asked,
                default_n_ctx=retry.default_n_ctx,
                now=now,
            )
        message = (
            f"{queue.key} could not be loaded: {retry.reason}; no placement that needs less "
            "memory fits now"
        )
        effects: list[Effect] = [_note("load_failed", queue.key, message, now)]
        return effects + self._reject_waiting(
            queue, partial(LoadError, message, out_of_memory=True)
        )

    def _wait(
        self, queue: ModelQueue, room: policy.Wait, ledger: Ledger, now: float
    ) -> list[Effect]:
        effects: list[Effect] = []
        if queue.blocked_since_s is None:
            queue.blocked_since_s = now
            holders = ", ".join(sorted(holder.key for holder in room.holders))
            reason = f"its memory is held by {holders}; a busy model is not evicted"
            effects.append(_note("wait", queue.key, reason, now))
        if queue.is_impatient:
            ledger.claim(room.rung, after=room.holders)
            first = queue.waiting[0].id
            for holder in room.holders:
                if holder.yields_to is None or first < holder.yields_to:
                    holder.yields_to = first
        return effects

    def _start_planned(
        self,
        queue: ModelQueue,
        room: policy.Start,
        wish: policy.Wish,
        ledger: Ledger,
        now: float,
    ) -> list[Effect]:
        first = queue.waiting[0]
        shape = first.model.shape
        assert shape is not None, "broken models are rejected on arrival"
        default_n_ctx = 0
        if wish.options.n_ctx is not None:
            by_default = replace(wish.options, n_ctx=None)
            chosen = self._planner(shape, ledger.remaining(), by_default).chosen
            if chosen is not None:
                default_n_ctx = min(N_CTX_LEAST, chosen.placement.n_ctx)
        return self._start(
            queue,
            room.rung,
            loaded_for=first.options,
            asked=wish.options,
            default_n_ctx=default_n_ctx,
            lower_rungs=policy.lower_rungs(room.plan, room.rung),
            now=now,
        )

    def _start(
        self,
        queue: ModelQueue,
        rung: Rung,
        *,
        loaded_for: PlanOptions,
        asked: PlanOptions,
        default_n_ctx: int,
        lower_rungs: tuple[Rung, ...] = (),
        now: float,
    ) -> list[Effect]:
        first = queue.waiting[0]
        self._last_worker += 1
        resident = Resident(
            worker=WorkerId(self._last_worker),
            model=first.model,
            loaded_for=loaded_for,
            asked=asked,
            default_n_ctx=default_n_ctx,
            rung=rung,
            lower_rungs=lower_rungs,
            keep_alive_s=self._limits.keep_alive_s,
            n_threads=self._limits.n_threads or self._n_cores,
            started_s=now,
        )
        queue.resident = self._residents[resident.worker] = resident
        self._unblock(queue)
        start = StartWorker(
            worker=resident.worker,
            model=resident.model,
            rung=rung,
            n_threads=resident.n_threads,
        )
        return [start, _note("load", queue.key, f"asked for; {describe(rung)}", now)]

    def _load_ended(
        self, queue: ModelQueue, resident: Resident, reason: str, now: float, *, out_of_memory: bool
    ) -> list[Effect]:
        """Arrange one more try after a lack of memory, or reject everyone who waits."""
        if out_of_memory and resident.lower_rungs and queue.waiting:
            queue.retry = Retry(
                rungs=resident.lower_rungs,
                loaded_for=resident.loaded_for,
                asked=resident.asked,
                default_n_ctx=resident.default_n_ctx,
                reason=reason,
            )
            return [_note("retry", queue.key, f"{reason}; trying a smaller placement", now)]
        message = f"{queue.key} could not be loaded: {reason}"
        effects: list[Effect] = [_note("load_failed", queue.key, message, now)]
        return effects + self._reject_waiting(
            queue, partial(LoadError, message, out_of_memory=out_of_memory)
        )

    def _count_death(self, queue: ModelQueue, end: WorkerExit, now: float) -> list[Effect]:
        queue.n_deaths += 1
        queue.last_death = end.reason
        effects: list[Effect] = [_note("died", queue.key, f"its worker {end.reason}", now)]
        hold_s = policy.hold_s(queue.n_deaths)
        if hold_s > 0:
            queue.held_until_s = now + hold_s
            effects.append(_note("held", queue.key, self._held_back(queue, now).message, now))
        return effects

    # --- stops ----------------------------------------------------------------------------

    def _evict(self, victim: Resident, queue: ModelQueue, now: float) -> list[Effect]:
        if victim is not queue.resident:
            reason = f"its memory was needed for {queue.key}"
            return self._stop(victim, reason, now, kind="evict")
        return self._stop(victim, _reload_reason(victim, queue.waiting[0]), now, kind="reload")

    def _stop(
        self, resident: Resident, reason: str, now: float, *, kind: EventKind = "unload"
    ) -> list[Effect]:
        """Stop a worker; nothing if it is being stopped already."""
        if resident.phase is Phase.STOPPING:
            return []
        resident.phase = Phase.STOPPING
        stop = StopWorker(worker=resident.worker, reason=reason)
        return [stop, _note(kind, resident.key, reason, now)]

    # --- after every event ----------------------------------------------------------------

    def _settle(self, effects: list[Effect], now: float) -> list[Effect]:
        """Add to an event's effects what follows from the new state."""
        effects += self._end_yielding(now)
        effects += self._expire(now)
        if self._wants_probe and not self._probing:
            self._wants_probe = False
            if any(self._needs_placing(queue) for queue in self._queues.values()):
                self._probing = True
                effects.append(Probe())
        effects += self._share_threads()
        forgettable = [key for key, queue in self._queues.items() if queue.is_forgettable]
        for key in forgettable:
            del self._queues[key]
        return effects

    def _end_yielding(self, now: float) -> list[Effect]:
        """Let residents serve again whose memory nobody waits for any more."""
        effects: list[Effect] = []
        for resident in self._residents.values():
            if resident.yields_to is None:
                continue
            queue = self._waiting.get(resident.yields_to)
            other = queue.resident if queue is not None else None
            has_room = other is not None and other.phase is Phase.LOADING
            if queue is None or has_room:
                resident.yields_to = None
                effects += self._grant_waiting(self._queues[resident.key], now)
        return effects

    def _expire(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        for resident in self._residents.values():
            if not resident.is_idle or self._has_waiting(resident):
                continue
            if self._draining:
                effects += self._stop(resident, "shimpy is stopping", now)
            elif now >= resident.idle_since_s + resident.keep_alive_s:
                kept = format_duration(resident.keep_alive_s)
                effects += self._stop(resident, f"idle for its keep_alive of {kept}", now)
        return effects

    def _share_threads(self) -> list[Effect]:
        if self._limits.n_threads is not None:
            return []
        busy = [r for r in self._residents.values() if r.phase is Phase.READY and r.leases]
        effects: list[Effect] = []
        for worker, n_threads in policy.share_threads(self._n_cores, busy).items():
            resident = self._residents[worker]
            if resident.n_threads != n_threads:
                resident.n_threads = n_threads
                effects.append(SetThreads(worker=worker, n_threads=n_threads))
        return effects

    def _has_waiting(self, resident: Resident) -> bool:
        return bool(self._queues[resident.key].waiting)

    def _residents_changed(self) -> None:
        """A snapshot that is on its way can't be told apart from the memory of before."""
        self._overtaken = self._probing
        self._wants_probe = True


def describe(rung: Rung) -> str:
    """Return a placement in a few words, for the log and `ps`."""
    placement = rung.placement
    where = {
        "gpu": "all on the GPU",
        "experts-in-ram": f"experts of {placement.moe_layers_in_ram} layers in RAM",
        "partial-gpu": f"{placement.n_gpu_layers} of {placement.n_layers + 1} layers on the GPU",
        "cpu": "on the CPU",
    }[placement.mode]
    return f"{where}, context {placement.n_ctx}, {placement.n_slots} slots"


def _reload_reason(resident: Resident, request: Request) -> str:
    if resident.model.digest != request.model.digest:
        return "its file has changed"
    wanted = request.options.n_ctx or resident.default_n_ctx
    if wanted > resident.rung.placement.n_ctx:
        return f"a context of {wanted} was asked for, {resident.rung.placement.n_ctx} is loaded"
    return "other load options were asked for"


def _want_the_same(one: Request, other: Request) -> bool:
    return one.options == other.options and one.model.digest == other.model.digest


def _note(kind: EventKind, model: str, reason: str, now: float) -> Note:
    return Note(event=Event(kind=kind, model=model, reason=reason, at_s=now))
