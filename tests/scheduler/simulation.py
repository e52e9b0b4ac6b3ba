"""A shell without processes: carries out the core's effects, and checks what must always hold.

Memory is accounted as the machine would: a worker takes what its rung says from the moment
that it is started until its exit is delivered. A snapshot is taken when the core asks for it
and may be delivered any time later.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import assert_never

from shimpy.errors import DoesNotFitError, ShimpyError
from shimpy.placement.hardware import Hardware
from shimpy.placement.placement import PlanOptions, Rung
from shimpy.protocol.messages import Ready
from shimpy.registry.model import Model
from shimpy.scheduler import effects as fx
from shimpy.scheduler.books import Limits
from shimpy.scheduler.core import SchedulerCore
from shimpy.scheduler.exits import ExitKind, WorkerExit
from shimpy.scheduler.policy import Planner
from shimpy.scheduler.states import Event, Phase, Request, RequestId, WorkerId
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
        self.do(self.core.on_hardware(snapshot, self.now))

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
        )
        self.do(self.core.on_ready(worker, ready, self.now))

    def load_failed(self, worker: WorkerId, *, out_of_memory: bool = False) -> None:
        effects = self.core.on_load_failed(
            worker, "it said no", self.now, out_of_memory=out_of_memory
        )
        self.do(effects)

    def exits(self, worker: WorkerId, end: WorkerExit = STOPPED) -> None:
        """A process is gone; those it served hear of it from their leases."""
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
                self.processes[effect.worker] = Process(effect.model, effect.rung)
                self.threads[effect.worker] = effect.n_threads
            case fx.StopWorker():
                process = self.processes[effect.worker]
                assert not process.is_stopping, "stopped twice"
                process.is_stopping = True
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
            case fx.Probe():
                assert self.snapshot is None, "two probes at once"
                self.snapshot = self.measure()
            case fx.Note():
                self.events.append(effect.event)
            case _:
                assert_never(effect)

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
            alone = self.planner(request.model.shape, self.hardware, request.options)
            assert alone.chosen is None, "refused what would fit"

    # --- the machine ------------------------------------------------------------------------

    def measure(self) -> Hardware:
        """What a probe would find now."""
        loading = self.of_phase(Phase.LOADING)
        seen = [p for w, p in self.processes.items() if p.is_visible or w not in loading]
        return taken(
            self.hardware,
            vram=sum(device.total_bytes for p in seen for device in p.rung.devices),
            ram=sum(p.rung.host.total_bytes for p in seen),
        )

    def check(self) -> None:
        """What must hold after every event."""
        for gpu in self.hardware.gpus:
            used = sum(
                device.total_bytes
                for process in self.processes.values()
                for device in process.rung.devices
                if device.name == gpu.name
            )
            assert used <= gpu.free_bytes, "a device is over budget"
        used = sum(process.rung.host.total_bytes for process in self.processes.values())
        assert used <= self.hardware.host.available_bytes, "the host is over budget"
        self._check_books()

    def _check_books(self) -> None:
        residents = self.core.residents
        assert residents.keys() == self.processes.keys()
        leases = {r: w for w, resident in residents.items() for r in resident.leases}
        assert leases == self.granted, "a lease is lost"
        assert self.core._books.leases.keys() == leases.keys()
        assert self.core._books.waiting.keys() == set(self.waiting)
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
