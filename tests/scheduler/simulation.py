"""A shell without processes: carries out the core's effects, and checks what must always hold.

Memory is accounted as the machine would: a worker takes what its rung says from the moment
that it is started until its exit is delivered. A snapshot is taken when the core asks for it
and may be delivered any time later.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import assert_never

from shimpy.errors import DoesNotFitError, ShimpyError
from shimpy.placement.hardware import Hardware
from shimpy.placement.placement import PlanOptions, Rung
from shimpy.protocol.messages import Ready, Stats
from shimpy.registry.model import Model
from shimpy.scheduler import effects as fx
from shimpy.scheduler.books import Limits
from shimpy.scheduler.core import SchedulerCore
from shimpy.scheduler.exits import ExitKind, WorkerExit
from shimpy.scheduler.policy import Planner
from shimpy.scheduler.replanning import PAUSE_S, RESIDENCE_S
from shimpy.scheduler.states import Event, Phase, Request, RequestId, WorkerId
from tests.scheduler.exhaustive import all_fit, vram_of
from tests.scheduler.support import plan, taken

STOPPED = WorkerExit(kind=ExitKind.STOPPED, reason="was stopped", returncode=0)
ABORTED = WorkerExit(kind=ExitKind.ABORTED, reason="was aborted", returncode=-6)
OUT_OF_MEMORY = WorkerExit(
    kind=ExitKind.HOST_OUT_OF_MEMORY, reason="was killed by the kernel", returncode=-9
)


@dataclass(slots=True)
class Process:
    model: Model
    rung: Rung
    is_stopping: bool = False
    # While it loads, a snapshot shows all of its memory or none.
    is_visible: bool = True
    # What it has parked, what it may, and a limit that is on its way to it.
    parked: int = 0
    parked_limit: int = 0
    told_limit: int | None = None


@dataclass(slots=True)
class Simulation:
    hardware: Hardware
    limits: Limits = field(default_factory=lambda: Limits(keep_alive_s=300.0, max_queue=512))
    planner: Planner = plan
    now: float = 0.0
    core: SchedulerCore = field(init=False)
    processes: dict[WorkerId, Process] = field(default_factory=dict)
    requests: dict[RequestId, Request] = field(default_factory=dict)
    waiting: list[RequestId] = field(default_factory=list)
    granted: dict[RequestId, WorkerId] = field(default_factory=dict)
    load_s: dict[RequestId, float] = field(default_factory=dict)
    errors: dict[RequestId, ShimpyError] = field(default_factory=dict)
    # Requests that were granted and then lost their worker, were released or cancelled.
    over: set[RequestId] = field(default_factory=set)
    last_granted: dict[str, RequestId] = field(default_factory=dict)
    snapshot: Hardware | None = None
    threads: dict[WorkerId, int] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    is_over: bool = False
    # What other programs have taken of the machine since, in bytes.
    others_vram: int = 0
    others_ram: int = 0
    # By model: when it was loaded last, and when anything moved up last.
    ready_at: dict[str, float] = field(default_factory=dict)
    moved_up_at: float = -math.inf
    n_faults: int = 0
    # Models that somebody wants unloaded, until they are loaded again.
    told_to_leave: set[str] = field(default_factory=set)
    # Whose workers were stopped, and whether somebody waited for their memory.
    stops: list[tuple[str, bool]] = field(default_factory=list)
    # Its planner gives less context than was asked for.
    is_stingy: bool = False

    def __post_init__(self) -> None:
        self.core = SchedulerCore(self.limits, self.planner)

    # --- what happens -----------------------------------------------------------------------

    def request(
        self, model: Model, options: PlanOptions | None = None, keep_alive_s: float | None = None
    ) -> RequestId:
        """A request arrives; the hardware is not probed yet."""
        request = Request(
            id=RequestId(len(self.requests) + 1),
            model=model,
            options=options or PlanOptions(),
            keep_alive_s=keep_alive_s,
            arrived_s=self.now,
        )
        self.requests[request.id] = request
        self.waiting.append(request.id)
        self.do(self.core.on_request(request, self.now))
        return request.id

    def cancel(self, request: RequestId) -> None:
        if request in self.waiting:
            self.waiting.remove(request)
        self.granted.pop(request, None)
        self.over.add(request)
        self.do(self.core.on_cancelled(request, self.now))

    def release(self, request: RequestId, *, completed: bool = True) -> None:
        self.granted.pop(request, None)
        self.over.add(request)
        self.do(self.core.on_released(request, self.now, completed=completed))

    def probed(self) -> None:
        """The snapshot that was asked for arrives."""
        snapshot, self.snapshot = self.snapshot, None
        assert snapshot is not None
        room = all_fit(self)
        n_events = len(self.events)
        self.do(self.core.on_hardware(snapshot, self.now))
        evicted = [e for e in self.events[n_events:] if (e.kind, e.cause) == ("evict", "evict")]
        assert not (room and evicted), f"evicted though all fit so: {room}"

    def others_take(self, *, vram_share: float = 0.0, ram_share: float = 0.0) -> None:
        """Let other programs have such a share of what is not in use."""
        self.others_vram = self.others_ram = 0
        left = self._left()
        self.others_vram = int(vram_share * sum(gpu.free_bytes for gpu in left.gpus))
        self.others_ram = int(ram_share * left.host.available_bytes)
        if self.snapshot is not None:
            # As if it had been taken now.
            self.snapshot = self.measure()
        self.check()

    def parks(self, worker: WorkerId, share: float) -> None:
        """A worker parks such a share of what it may, as far as there is RAM for it."""
        process = self.processes[worker]
        room = process.parked + self._left().host.available_bytes
        process.parked = int(share * min(process.parked_limit, room))
        if self.snapshot is not None:
            # As if it had been taken now.
            self.snapshot = self.measure()
        self.do(self.core.on_stats(worker, Stats(0, 0, 0, process.parked), self.now))

    def hears(self, worker: WorkerId) -> None:
        """A worker gets to know its limit, and gives up what is over it."""
        process = self.processes[worker]
        assert process.told_limit is not None
        process.parked_limit, process.told_limit = process.told_limit, None
        process.parked = min(process.parked, process.parked_limit)
        self.do(self.core.on_stats(worker, Stats(0, 0, 0, process.parked), self.now))

    @property
    def told(self) -> list[WorkerId]:
        """Workers that a limit is on its way to."""
        return [w for w, process in self.processes.items() if process.told_limit is not None]

    def unload(self, model: Model) -> None:
        key = str(model.name)
        if self.resident(model) is not None:
            self.told_to_leave.add(key)
        self.do(self.core.on_unload(key, self.now))

    def pin(self, model: Model, *, pinned: bool = True) -> None:
        self.do(self.core.on_pin(str(model.name), self.now, pinned=pinned))

    def ready(self, worker: WorkerId, load_s: float = 0.1) -> None:
        placement = self.processes[worker].rung.placement
        ready = Ready(
            memory=[],
            n_ctx=placement.n_ctx,
            n_ctx_train=placement.n_ctx,
            n_slots=placement.n_slots,
            n_vocab=1,
            n_embd=1,
            load_s=load_s,
            is_mapped=placement.load_mode == "mmap",
        )
        self.ready_at[str(self.processes[worker].model.name)] = self.now
        self.do(self.core.on_ready(worker, ready, self.now))

    def load_failed(self, worker: WorkerId, *, out_of_memory: bool = False) -> None:
        effects = self.core.on_load_failed(
            worker, "it said no", self.now, out_of_memory=out_of_memory
        )
        self.n_faults += 1
        self.do(effects)

    def exits(self, worker: WorkerId, end: WorkerExit = STOPPED) -> None:
        """A process is gone; those it served hear of it from their leases."""
        self.n_faults += end is not STOPPED
        del self.processes[worker]
        lost = [request for request, served_by in self.granted.items() if served_by == worker]
        for request in lost:
            del self.granted[request]
            self.over.add(request)
        self.do(self.core.on_worker_exit(worker, end, self.now))
        for request in lost:
            self.do(self.core.on_released(request, self.now, completed=False))

    def advance(self, seconds: float) -> None:
        self.now += seconds
        deadline = self.core.next_deadline_s
        if deadline is not None and deadline <= self.now:
            self.do(self.core.on_timer(self.now))

    def drain(self) -> None:
        self.is_over = True
        self.do(self.core.on_drain_over(self.now))

    # --- shortcuts for examples -------------------------------------------------------------

    def settle(self) -> None:
        """Let probes, loads and stops end until only people and time can change anything."""
        for _ in range(1000):
            if self.snapshot is not None:
                self.probed()
            elif (worker := next(iter(self.of_phase(Phase.STOPPING)), None)) is not None:
                self.exits(worker)
            elif self.told:
                self.hears(self.told[0])
            elif (worker := next(iter(self.of_phase(Phase.LOADING)), None)) is not None:
                self.ready(worker)
            else:
                return
        raise AssertionError("it never settles")

    def load(self, model: Model, options: PlanOptions | None = None) -> WorkerId:
        """Make a model resident and idle."""
        request = self.request(model, options)
        self.settle()
        worker = self.granted[request]
        self.release(request)
        return worker

    def resident(self, model: Model) -> WorkerId | None:
        queue = self.core.queues.get(str(model.name))
        return queue.resident.worker if queue is not None and queue.resident is not None else None

    def of_phase(self, *phases: Phase) -> list[WorkerId]:
        return [w for w, resident in self.core.residents.items() if resident.phase in phases]

    def release_when_granted(self, request: RequestId) -> None:
        self.settle()
        self.release(request)

    def watch(self, seconds: float) -> None:
        """Let time pass with nobody asking for anything, and all answers at once."""
        end_s = self.now + seconds
        while self.now < end_s:
            self.settle()
            deadline = self.core.next_deadline_s
            next_s = end_s if deadline is None else min(end_s, max(deadline, self.now))
            self.advance(next_s - self.now)
        self.settle()

    def mode(self, model: Model) -> str | None:
        """How a model is placed; None: it is not resident."""
        worker = self.resident(model)
        return None if worker is None else self.processes[worker].rung.placement.mode

    def kinds(self, kind: str) -> list[Event]:
        return [event for event in self.events if event.kind == kind]

    # --- the effects ------------------------------------------------------------------------

    def do(self, effects: Iterable[fx.Effect]) -> None:
        for effect in effects:
            self._do_one(effect)
        self.check()

    def _do_one(self, effect: fx.Effect) -> None:
        match effect:
            case fx.StartWorker():
                assert effect.worker not in self.processes
                self.processes[effect.worker] = Process(
                    effect.model, effect.rung, parked_limit=effect.parked_limit
                )
                self.told_to_leave.discard(str(effect.model.name))
                self.threads[effect.worker] = effect.n_threads
            case fx.StopWorker():
                process = self.processes[effect.worker]
                assert not process.is_stopping, "stopped twice"
                process.is_stopping = True
                self.stops.append((str(self.core.residents[effect.worker].key), effect.is_urgent))
                is_busy = effect.worker in self.granted.values()
                assert self.is_over or not is_busy, "a busy resident was stopped"
            case fx.Grant():
                self._grant(effect)
            case fx.Reject():
                self._check_rejection(effect.request, effect.error)
                self.waiting.remove(effect.request)
                self.errors[effect.request] = effect.error
            case fx.SetThreads():
                assert not self.processes[effect.worker].is_stopping
                self.threads[effect.worker] = effect.n_threads
            case fx.LimitParked():
                process = self.processes[effect.worker]
                assert not process.is_stopping
                assert effect.n_bytes <= self.limits.parked_bytes
                process.told_limit = effect.n_bytes
            case fx.Probe():
                assert self.snapshot is None, "two probes at once"
                self.snapshot = self.measure()
            case fx.Note():
                self._check_event(effect.event)
                self.events.append(effect.event)
            case _:
                assert_never(effect)

    def _check_event(self, event: Event) -> None:
        is_pinned = self.core.is_pinned(event.model) and event.model not in self.told_to_leave
        if event.kind in {"evict", "shrunk"} or event.cause == "keep_alive":
            assert not is_pinned, f"a pinned model was told: {event}"
        if event.kind in {"evict", "shrunk", "moved_up", "reload", "unload", "refused"}:
            assert event.reason
            assert event.cause or event.kind == "refused"
        if event.kind == "moved_up":
            assert self.now - self.moved_up_at >= PAUSE_S, "moves follow each other too quickly"
            assert self.now - self.ready_at[event.model] >= RESIDENCE_S
            self.moved_up_at = self.now

    def _grant(self, grant: fx.Grant) -> None:
        self.waiting.remove(grant.request)
        process, request = self.processes[grant.worker], self.requests[grant.request]
        assert not process.is_stopping
        assert process.model is request.model
        wanted = request.options.n_ctx or 0
        assert self.is_stingy or process.rung.placement.n_ctx >= wanted
        key = str(request.model.name)
        assert self.last_granted.get(key, 0) < request.id, "not first come, first served"
        self.last_granted[key] = request.id
        self.granted[grant.request] = grant.worker
        self.load_s[grant.request] = grant.load_s

    def describe(self) -> str:
        """Return the state in a few lines, for a failing test."""
        lines = [
            f"{resident.key} worker {resident.worker} {resident.phase.value} "
            f"leases {resident.leases} yields to {resident.yields_to} "
            f"asked {resident.purpose.asked.n_ctx} {resident.rung.placement.mode}"
            for resident in self.core.residents.values()
        ]
        for queue in self.core.queues.values():
            waiting = [(r.id, r.options.n_ctx, r.options.n_slots) for r in queue.waiting]
            lines.append(f"{queue.key} waiting {waiting} blocked since {queue.blocked_since_s}")
        lines += [f"{event.kind} {event.model}: {event.reason}" for event in self.events[-12:]]
        return "\n".join(lines)

    def _check_rejection(self, request_id: RequestId, error: ShimpyError) -> None:
        assert error.message
        request = self.requests[request_id]
        if isinstance(error, DoesNotFitError) and request.model.shape is not None:
            key = str(request.model.name)
            pinned = [
                resident.rung
                for resident in self.core.residents.values()
                # One that has just been stopped for a reload of its own is counted too.
                if resident.is_pinned and resident.key != key
            ]
            pinned += [
                queue.move.claim
                for queue in self.core.queues.values()
                if queue.move is not None and self.core.is_pinned(queue.key) and queue.key != key
            ]
            room = taken(
                self.hardware,
                vram=self.others_vram + sum(vram_of(rung) for rung in pinned),
                ram=self.others_ram + sum(rung.host.total_bytes for rung in pinned),
            )
            alone = self.planner(request.model.shape, room, request.options)
            assert alone.chosen is None, f"refused what would fit: {error}\n{self.describe()}"

    # --- the machine ------------------------------------------------------------------------

    def measure(self) -> Hardware:
        """What a probe would find now."""
        loading = self.of_phase(Phase.LOADING)
        seen = [p for w, p in self.processes.items() if p.is_visible or w not in loading]
        return taken(
            self.hardware,
            vram=self.others_vram + sum(vram_of(p.rung) for p in seen),
            ram=self.others_ram + sum(p.rung.host.total_bytes + p.parked for p in seen),
        )

    def _left(self) -> Hardware:
        """What is in nobody's use, or about to be."""
        processes = self.processes.values()
        return taken(
            self.hardware,
            vram=self.others_vram + sum(vram_of(p.rung) for p in processes),
            ram=self.others_ram + sum(p.rung.host.total_bytes + p.parked for p in processes),
        )

    def check(self) -> None:
        """What must hold after every event."""
        left = self._left()
        for gpu in left.gpus:
            assert gpu.free_bytes >= 0, "a device is over budget"
        assert left.host.available_bytes >= 0, "the host is over budget"
        self._check_books()
        self._check_loads()

    def _check_loads(self) -> None:
        """Nothing is loaded but for somebody who waits, or for a move that was told."""
        loads = self.kinds("load")
        n_moves = sum(event.cause == "move" for event in loads)
        n_retries = len(self.kinds("retry"))
        told = len(self.kinds("shrunk")) + len(self.kinds("moved_up"))
        assert n_moves <= told + n_retries
        assert len(loads) - n_moves <= len(self.requests) + self.n_faults

    def _check_books(self) -> None:
        residents = self.core.residents
        assert residents.keys() == self.processes.keys()
        leases = {r: w for w, resident in residents.items() for r in resident.leases}
        assert leases == self.granted, "a lease is lost"
        assert self.core._books.leases.keys() == leases.keys()
        assert self.core._books.waiting.keys() == set(self.waiting), self.describe()
        queued = {r.id for queue in self.core.queues.values() for r in queue.waiting}
        assert queued == set(self.waiting), "a request is lost"
        ends = [set(self.waiting), set(self.granted), set(self.errors), self.over]
        assert set().union(*ends) == set(self.requests), "a request has vanished"
        for resident in residents.values():
            assert len(resident.leases) <= resident.capacity
        for key, queue in self.core.queues.items():
            assert len(queue.waiting) <= self.limits.max_queue
            mine = [r for r in residents.values() if r.key == key]
            assert len(mine) <= 1, "two workers for one model"
        busy = [
            self.threads[w] for w, r in residents.items() if r.leases and r.phase is Phase.READY
        ]
        busy = [w for w, r in residents.items() if r.phase is Phase.READY and r.leases]
        on_cpu = [w for w in busy if residents[w].rung.placement.mode != "gpu"]
        n_threads = [self.threads[worker] for worker in on_cpu]
        n_cores = self.hardware.host.n_cores
        assert sum(n_threads) <= max(n_cores, len(on_cpu)), "more threads than cores"
