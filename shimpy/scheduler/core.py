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
from functools import partial
from types import MappingProxyType

from shimpy.errors import LoadError, ShimpyError, StoppingError
from shimpy.gguf.arch import ModelShape
from shimpy.placement.hardware import Hardware
from shimpy.placement.placement import Plan, PlanOptions
from shimpy.protocol.messages import Ready, Stats
from shimpy.registry.model import Model
from shimpy.scheduler import failures, policy, upkeep
from shimpy.scheduler.books import Books, Limits
from shimpy.scheduler.effects import Effect, Probe, Reject, StopWorker, note
from shimpy.scheduler.exits import WorkerExit
from shimpy.scheduler.ledger import Ledger
from shimpy.scheduler.placing import Placing
from shimpy.scheduler.replanning import Watch
from shimpy.scheduler.snapshots import Snapshots
from shimpy.scheduler.states import ModelQueue, Phase, Request, RequestId, Resident, WorkerId
from shimpy.units import format_duration


class SchedulerCore:
    """Owns which models are resident; every method is an event and returns what to do."""

    def __init__(self, limits: Limits, planner: policy.Planner) -> None:
        self._books = Books(limits)
        self._planner = planner
        self._watch = Watch()
        self._snapshots = Snapshots()
        self._draining = False

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
        soonest = min((*upkeep.deadlines(self._books), self._snapshots.deadline_s))
        return None if math.isinf(soonest) else soonest

    def on_limits(self, limits: Limits) -> None:
        """Keep to other limits from now on; residents keep their own keep_alive."""
        self._books.limits = limits
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
        refusal: ShimpyError | None = StoppingError()
        if not self._draining:
            refusal = failures.refusal(self._books, queue, request, now)
        if refusal is not None:
            return self._settle([Reject(request=request.id, error=refusal)], now)
        self._books.enqueue(queue, request)
        effects = self._books.grant_waiting(queue, now)
        if self._books.needs_placing(queue):
            self._snapshots.want()
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
        self._snapshots.want()
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
            self._snapshots.want()
        return self._settle(effects, now)

    # --- events: hardware -----------------------------------------------------------------

    def on_hardware(self, hardware: Hardware, now: float) -> list[Effect]:
        """Place the models that are waited for, the longest waiting first (Placing.place).

        When it is time for that, idle residents are placed anew (Watch.look). What may be parked
        follows from what is left (upkeep.share_parking).
        """
        self._books.n_cores = hardware.host.n_cores
        if not self._snapshots.end():
            return self._settle([], now)
        ledger = Ledger(hardware, self._books.residents.values())
        placing = Placing(self._books, ledger, self._planner, now)
        effects = placing.place_all(self._books.pending)
        if self._snapshots.is_look:
            effects += self._watch.look(self._books, ledger, self._planner, now)
            self._snapshots.looked(now, self._books.limits.replan_interval_s)
        effects += upkeep.share_parking(self._books, ledger)
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
        for queue in sorted(self._books.pending, key=lambda queue: queue.waiting[0].id):
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
        self._snapshots.fail(now, self._books.limits.replan_interval_s)
        effects: list[Effect] = []
        for queue in self._books.moving:
            effects += self._books.drop_move(queue, reason, now, kind="unload", cause="no_room")
        for queue in self._books.pending:
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
        resident.untouched_bytes = ready.untouched_bytes
        resident.ready_s = resident.idle_since_s = now
        queue = self._books.queues[resident.key]
        if resident.move is not None and not queue.waiting:
            resident.idle_since_s = resident.move.idle_since_s
        resident.move = None
        self._snapshots.overtake()
        took = format_duration(now - resident.started_s)
        reason = f"loaded in {took}, {policy.describe(resident.rung)}"
        effects: list[Effect] = [note("ready", resident.key, reason, now)]
        effects += self._books.grant_waiting(queue, now)
        return self._settle(effects, now)

    def on_stats(self, worker: WorkerId, stats: Stats, now: float) -> list[Effect]:
        """Note how much RAM a worker's parked caches take, and what it will take yet.

        Once it has given up what it was told to, a snapshot of before is of no use any more.
        """
        resident = self._books.residents.get(worker)
        if resident is None:
            return []
        resident.untouched_bytes = stats.untouched_bytes
        before, resident.parked_bytes = resident.parked_bytes, stats.parked_bytes
        if before == stats.parked_bytes:
            return []
        if before > resident.parked_limit >= stats.parked_bytes:
            self._snapshots.overtake()
        return self._settle([], now)

    def on_load_failed(
        self, worker: WorkerId, message: str, now: float, *, out_of_memory: bool
    ) -> list[Effect]:
        """Try one rung down after a lack of memory, once; else reject everyone who waits."""
        resident = self._books.residents.get(worker)
        if resident is None or resident.phase is not Phase.LOADING:
            return []
        effects = self._end_load(resident, message, now, out_of_memory=out_of_memory)
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
        self._snapshots.overtake()
        effects: list[Effect] = []
        if resident.phase is Phase.STOPPING:
            return self._settle(effects, now)
        effects += failures.count_death(queue, end, now)
        if resident.phase is Phase.LOADING:
            reason = f"its worker {end.reason}"
            effects += self._end_load(resident, reason, now, out_of_memory=end.out_of_memory)
        else:
            effects += failures.reject_held_back(self._books, queue, now)
        return self._settle(effects, now)

    # --- events: time and people ----------------------------------------------------------

    def on_timer(self, now: float) -> list[Effect]:
        """Unload residents whose keep_alive is over; lose patience with busy ones; look around."""
        self._snapshots.on_time(now)
        if upkeep.lose_patience(self._books, now):
            self._snapshots.want()
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
            self._snapshots.want()
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

    # --- what several events have in common -----------------------------------------------

    def _end_load(
        self, resident: Resident, reason: str, now: float, *, out_of_memory: bool
    ) -> list[Effect]:
        """Try again or reject after a failed load; what was moved so is not moved again soon."""
        if resident.move is not None:
            self._watch.bar(resident.key, now)
        return failures.end_load(self._books, resident, reason, now, out_of_memory=out_of_memory)

    def _settle(self, effects: list[Effect], now: float) -> list[Effect]:
        """Add to an event's effects what follows from the new state."""
        books = self._books
        effects += upkeep.end_yielding(books, now)
        effects += upkeep.expire(books, now, is_draining=self._draining)
        is_loaded = any(r.phase is Phase.READY for r in books.residents.values())
        self._snapshots.keep_looking(
            now, books.limits.replan_interval_s, is_needed=is_loaded and not self._draining
        )
        is_moving = any(queue.resident is None for queue in books.moving)
        if self._snapshots.begin(now, is_awaited=is_moving or bool(books.pending)):
            effects.append(Probe())
        effects += upkeep.share_threads(books)
        books.tidy()
        return effects
