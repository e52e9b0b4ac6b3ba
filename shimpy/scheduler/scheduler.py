"""The scheduler's shell: runs the core, starts and stops workers, hands out leases.

Everything runs on one event loop. An event is a call of the core, and its effects are carried
out before anything else runs; so there are no locks, and no state but the core's decides.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Self, assert_never

from shimpy.config import Config
from shimpy.errors import ShimpyError
from shimpy.logs import get_logger
from shimpy.placement.hardware import Hardware
from shimpy.placement.placement import PlanOptions
from shimpy.placement.planner import plan_model
from shimpy.protocol.messages import LoadFailed, PrefixNews, Ready, SetThreads
from shimpy.registry.model import Model
from shimpy.scheduler import effects as fx
from shimpy.scheduler.books import Limits
from shimpy.scheduler.clock import Clock, LoopClock, TimerHandle
from shimpy.scheduler.core import SchedulerCore
from shimpy.scheduler.exits import ExitKind, WorkerExit
from shimpy.scheduler.lease import Lease
from shimpy.scheduler.ledger import Ledger
from shimpy.scheduler.loads import load_message, with_defaults, with_prefixes
from shimpy.scheduler.overheads import Overheads
from shimpy.scheduler.policy import Planner
from shimpy.scheduler.reports import HistoryEvent, Journal, ResidentInfo, WaitingInfo
from shimpy.scheduler.simulations import ROUNDS, Simulations, needs_check
from shimpy.scheduler.spare import SpareWorker
from shimpy.scheduler.states import Event, Phase, Request, RequestId, Resident, WorkerId
from shimpy.scheduler.worker import ENGINE_ARGV, Deadlines, Task, Worker
from shimpy.units import format_bytes

_log = get_logger("scheduler")


class Scheduler:
    """Keeps the models that are asked for loaded; `async with` it for its whole life."""

    def __init__(
        self,
        config: Config,
        probe: Callable[[], Hardware],
        *,
        planner: Planner = plan_model,
        simulations: Simulations | None = None,
        overheads: Overheads | None = None,
        engine_argv: Sequence[str] = ENGINE_ARGV,
        clock: Clock | None = None,
        deadlines: Deadlines | None = None,
    ) -> None:
        """`probe` may block: it is called in a thread. `simulations` plan in `planner`'s place."""
        self._config = config
        self._probe = probe
        self._engine_argv = tuple(engine_argv)
        self._clock = clock or LoopClock()
        self._deadlines = deadlines or Deadlines(
            load_s=config.load_timeout, silence_s=config.hang_timeout
        )
        self.simulations = simulations or Simulations(None)
        self._overheads = overheads or Overheads(None)
        self._core = SchedulerCore(
            _limits(config), planner if simulations is None else simulations.plan
        )
        self._tasks = asyncio.TaskGroup()
        self._workers: dict[WorkerId, Worker] = {}
        self._spare = SpareWorker(
            argv=self._engine_argv,
            clock=self._clock,
            run=self._run,
            is_enabled=config.spare_worker,
        )
        self._grants: dict[RequestId, asyncio.Future[Lease | ShimpyError]] = {}
        self._last_request = 0
        # As it was probed last.
        self._hardware: Hardware | None = None
        self._timer: TimerHandle | None = None
        self._journal = Journal()
        self._worker_gone = asyncio.Event()

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._spare.close()
        self._carry_out(self._core.on_drain_over(self._clock.now()))
        # Cancelled, the workers are killed; else they get their deadlines. An error of the
        # block's own goes on its way as it is, not in a group of the tasks' errors.
        cause = exc if isinstance(exc, asyncio.CancelledError) else None
        try:
            await self._tasks.__aexit__(type(cause) if cause else None, cause, traceback)
        finally:
            if self._timer is not None:
                self._timer.cancel()

    # --- for the server -------------------------------------------------------------------

    def acquire(
        self, model: Model, options: PlanOptions, *, keep_alive: float | None = None
    ) -> AbstractAsyncContextManager[Lease]:
        """Hold a model loaded: `async with scheduler.acquire(...) as lease`.

        Waits for a place, for the model to load, and for memory. Options that are not set are
        taken from the config. `keep_alive` (seconds; negative or inf: for ever) replaces the
        resident's. Leaving the block, also by cancellation, gives the lease back.

        Raises:
            CapacityError: it can never fit (DoesNotFitError), the queue is full
                (QueueFullError), or the daemon is stopping (StoppingError).
            InvalidOptionError: an option can't be used with this model.
            WorkerError: it could not be loaded (LoadError), or is held back (HeldBackError).
            GgufError: its file is broken.
        """
        return self._acquire(model, options, keep_alive)

    def unload(self, name: str) -> bool:
        """Unload a model, now when it is idle, else after its last lease; False: not loaded."""
        is_loaded = any(
            resident.key == name and resident.phase is not Phase.STOPPING
            for resident in self._core.residents.values()
        )
        self._carry_out(self._core.on_unload(name, self._clock.now()))
        return is_loaded

    def pin(self, name: str, *, pinned: bool) -> None:
        """Keep a model loaded, once it is, whoever needs its memory, and past keep_alive; or not.

        It wins over the setting `pinned` for as long as the daemon runs.
        """
        self._carry_out(self._core.on_pin(name, self._clock.now(), pinned=pinned))

    def is_pinned(self, name: str) -> bool:
        """Whether a model is pinned, loaded or not."""
        return self._core.is_pinned(name)

    async def wait_unloaded(self, name: str) -> None:
        """Wait until no worker has a model any more, and its memory is free."""
        while any(resident.key == name for resident in self._core.residents.values()):
            self._worker_gone.clear()
            await self._worker_gone.wait()

    def reconfigure(self, config: Config) -> None:
        """Use another config for the loads and requests that come."""
        self._config = config
        self._deadlines = replace(
            self._deadlines, load_s=config.load_timeout, silence_s=config.hang_timeout
        )
        self._core.on_limits(_limits(config))
        self._spare.enable(is_enabled=config.spare_worker)
        self._look_for_quiet()

    def prepare(self, hardware: Hardware) -> None:
        """Have a worker process ready soon for the first load on this machine."""
        self._spare.want(uses_gpu=bool(hardware.gpus))
        self._look_for_quiet()

    def foresee(self, model: Model) -> None:
        """Have a worker process start now if a request that is to come has to load its model."""
        if all(resident.model.name != model.name for resident in self._core.residents.values()):
            self._spare.hurry()

    async def drain(self, timeout_s: float) -> None:
        """Take no more requests, let leases end for `timeout_s`, then stop every worker.

        Returns when all workers have gone.
        """
        self._spare.close()
        self._carry_out(self._core.on_drain(self._clock.now()))
        try:
            async with asyncio.timeout(timeout_s):
                await self._wait_no_workers()
        except TimeoutError:
            self._carry_out(self._core.on_drain_over(self._clock.now()))
            await self._wait_no_workers()

    def residents(self) -> tuple[ResidentInfo, ...]:
        """Return all residents, the longest loaded first."""
        return tuple(self._resident_info(r) for r in self._core.residents.values())

    def emptied(self, hardware: Hardware) -> Hardware:
        """Return a snapshot of the machine as it would be with no model loaded."""
        return Ledger(hardware, self._core.residents.values()).at_most()

    def waiting(self) -> tuple[WaitingInfo, ...]:
        """Return the models that wait for a worker, or are held back after deaths."""
        now = self._clock.now()
        return tuple(
            WaitingInfo(
                name=queue.key,
                n_waiting=len(queue.waiting),
                n_deaths=queue.n_deaths,
                last_death=queue.last_death,
                held_until_s=self._epoch(queue.held_until_s) if queue.held_until_s > now else None,
                reason=self._journal.last_reason(queue.key),
            )
            for queue in self._core.queues.values()
            if queue.resident is None and (queue.waiting or queue.held_until_s > now)
        )

    @property
    def has_spare(self) -> bool:
        """Whether a worker waits for a model, or is just starting to."""
        return self._spare.is_there

    @property
    def spare_pid(self) -> int | None:
        """The process id of the worker that waits for a model, if there is one."""
        return self._spare.pid

    def history(self) -> tuple[HistoryEvent, ...]:
        """Return the last loads, unloads, evictions and failures, oldest first; bounded."""
        return self._journal.past()

    def events(self, after: int | None = None) -> AsyncGenerator[HistoryEvent, None]:
        """Yield what happens from now on; a reader that falls behind loses the oldest.

        With `after`, an event's id, first what is remembered of what happened since then.
        """
        return self._journal.follow(after)

    # --- requests -------------------------------------------------------------------------

    @asynccontextmanager
    async def _acquire(
        self, model: Model, options: PlanOptions, keep_alive: float | None
    ) -> AsyncIterator[Lease]:
        self._last_request += 1
        request = Request(
            id=RequestId(self._last_request),
            model=model,
            options=with_defaults(options, self._config),
            keep_alive_s=None if keep_alive is None else _keep_alive(keep_alive),
            arrived_s=self._clock.now(),
        )
        lease = await self._wait_granted(request)
        try:
            yield lease
        finally:
            now = self._clock.now()
            if lease.completed:
                self._look_at(lease)
            self._carry_out(self._core.on_released(request.id, now, completed=lease.completed))

    async def _wait_granted(self, request: Request) -> Lease:
        granted: asyncio.Future[Lease | ShimpyError] = asyncio.get_running_loop().create_future()
        self._grants[request.id] = granted
        try:
            self._carry_out(self._core.on_request(request, request.arrived_s))
            outcome = await granted
        except BaseException:
            # A grant may have reached the future of a task that was cancelled before it ran:
            # the core knows whether there is a lease to give back.
            self._carry_out(self._core.on_cancelled(request.id, self._clock.now()))
            raise
        finally:
            del self._grants[request.id]
        if isinstance(outcome, ShimpyError):
            raise outcome
        return outcome

    # --- effects --------------------------------------------------------------------------

    def _carry_out(self, effects: Sequence[fx.Effect]) -> None:
        for effect in effects:
            match effect:
                case fx.StartWorker():
                    self._start_worker(effect)
                case fx.StopWorker():
                    self._workers[effect.worker].stop(effect.reason, is_urgent=effect.is_urgent)
                case fx.Grant():
                    self._answer(effect.request, self._lease(effect))
                case fx.Reject():
                    self._answer(effect.request, effect.error)
                case fx.SetThreads():
                    message = SetThreads(n_threads=effect.n_threads)
                    self._workers[effect.worker].send(message)
                case fx.Probe():
                    self._tasks.create_task(self._probe_hardware())
                    if self._is_asked():
                        self._spare.hurry()
                case fx.Note():
                    self._note(effect.event)
                case _:
                    assert_never(effect)
        self._arm_timer()
        self._look_for_quiet()

    def _answer(self, request: RequestId, outcome: Lease | ShimpyError) -> None:
        granted = self._grants.get(request)
        # Done already: its task was cancelled, and gives the lease back when it runs.
        if granted is not None and not granted.done():
            granted.set_result(outcome)

    def _lease(self, grant: fx.Grant) -> Lease:
        resident = self._core.residents[grant.worker]
        assert resident.ready is not None, "only a loaded model is granted"
        return Lease(
            worker=self._workers[grant.worker],
            ready=resident.ready,
            rung=resident.rung,
            load_s=grant.load_s,
        )

    async def _probe_hardware(self) -> None:
        try:
            if not any(resident.rung.devices for resident in self._core.residents.values()):
                await asyncio.to_thread(self._overheads.look)
            hardware = await self._check_figures(await asyncio.to_thread(self._probe))
            self._hardware = hardware
        except Exception as error:  # noqa: BLE001 - a task's boundary: those who wait must hear
            _log.exception("probe_failed")
            effects = self._core.on_probe_failed(str(error), self._clock.now())
        else:
            effects = self._core.on_hardware(hardware, self._clock.now())
        self._carry_out(effects)

    async def _check_figures(self, hardware: Hardware) -> Hardware:
        """Have llama.cpp simulate what is about to be loaded; return a snapshot that is as fresh.

        Bounded in time; what is known, or needs no simulation, costs none.
        """
        if not hardware.library:
            return hardware
        until_s = self.simulations.deadline()
        for _ in range(ROUNDS):
            doubtful = [(m, plan) for m, plan in self._core.preview(hardware) if needs_check(plan)]
            present = self._core.present(hardware)
            learnt = [
                await asyncio.to_thread(
                    self.simulations.learn, model, plan.doubts, present, until_s=until_s
                )
                for model, plan in doubtful
            ]
            if not any(learnt):
                break
            hardware = await asyncio.to_thread(self._probe)
        return hardware

    async def _observe(self, start: fx.StartWorker, ready: Ready) -> None:
        """Have the next plans know what a load really took."""
        if self._hardware is None:
            return
        placement, hardware = start.rung.placement, self._hardware
        await asyncio.to_thread(
            self.simulations.observe, start.model, placement, ready.memory, hardware
        )

    def _look_at(self, lease: Lease) -> None:
        """Learn what a worker that has answered takes on its card besides its buffers."""
        pid, hardware, devices = lease.pid, self._hardware, lease.rung.placement.devices
        # Of several devices the driver tells the sum for the process, or less.
        if hardware is None or pid is None or len(devices) != 1 or not self._overheads.is_due(pid):
            return
        memory = lease.ready.memory
        reading = asyncio.to_thread(self._overheads.read, pid, devices[0], memory, hardware)
        self._tasks.create_task(self._aside(reading))

    def _note(self, event: Event) -> None:
        shown = HistoryEvent(
            kind=event.kind,
            model=event.model,
            reason=event.reason,
            at_s=self._epoch(event.at_s),
            cause=event.cause,
        )
        self._journal.add(shown)
        _log.info(f"model_{event.kind}", model=event.model, reason=event.reason)

    def _on_prefix(self, model: str, news: PrefixNews) -> None:
        if news.kind not in ("saved", "restored"):
            return
        self._journal.add(
            HistoryEvent(
                kind=news.kind,
                model=model,
                reason=f"{news.n_tokens} tokens, {format_bytes(news.n_bytes)}, {news.took_s:.2f} s",
                at_s=time.time(),
                n_tokens=news.n_tokens,
            )
        )

    def _arm_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        when_s = self._core.next_deadline_s
        if when_s is not None:
            self._timer = self._clock.call_at(when_s, self._on_timer)

    def _on_timer(self) -> None:
        self._carry_out(self._core.on_timer(self._clock.now()))

    def _look_for_quiet(self) -> None:
        is_idle = all(resident.is_idle for resident in self._core.residents.values())
        self._spare.on_change(is_quiet=is_idle and not self._is_asked())

    def _is_asked(self) -> bool:
        """Whether a request waits for a model."""
        return any(queue.waiting for queue in self._core.queues.values())

    # --- workers --------------------------------------------------------------------------

    def _start_worker(self, start: fx.StartWorker) -> None:
        core, clock = self._core, self._clock

        def on_ready(ready: Ready) -> None:
            self._tasks.create_task(self._aside(self._observe(start, ready)))
            self._carry_out(core.on_ready(start.worker, ready, clock.now()))

        def on_load_failed(failed: LoadFailed) -> None:
            effects = core.on_load_failed(
                start.worker, failed.message, clock.now(), out_of_memory=failed.out_of_memory
            )
            self._carry_out(effects)

        name = str(start.model.name)
        load = load_message(start.model, start.rung, start.n_threads)
        uses_gpu = bool(load.devices)
        worker = self._spare.take(uses_gpu=uses_gpu)
        if worker is None:
            worker = Worker(uses_gpu=uses_gpu, argv=self._engine_argv)
            self._run(worker)
        self._workers[start.worker] = worker
        worker.give(
            Task(
                name=name,
                load=with_prefixes(load, start.model, self._config),
                on_ready=on_ready,
                on_load_failed=on_load_failed,
                on_prefix=partial(self._on_prefix, name),
                deadlines=self._deadlines,
            )
        )

    def _run(self, worker: Worker) -> None:
        self._tasks.create_task(self._run_worker(worker))

    async def _run_worker(self, worker: Worker) -> None:
        try:
            await self._follow_worker(worker)
        finally:
            # Cancelled, too: somebody waits until no worker is left.
            for worker_id in [key for key, other in self._workers.items() if other is worker]:
                del self._workers[worker_id]
            self._spare.on_exit(worker)
            self._worker_gone.set()

    async def _follow_worker(self, worker: Worker) -> None:
        try:
            end = await worker.run()
        except Exception as error:  # noqa: BLE001 - a task's boundary: one worker is lost
            _log.exception("worker_lost", pid=worker.pid)
            reason = f"was lost to a fault in shimpy: {error}"
            end = WorkerExit(kind=ExitKind.FAILED, reason=reason, returncode=None)
        worker_id = next((key for key, other in self._workers.items() if other is worker), None)
        name = "spare" if worker_id is None else worker_id
        _log.info("worker_exit", worker=name, kind=end.kind.value, reason=end.reason)
        if worker_id is not None:
            self._carry_out(self._core.on_worker_exit(worker_id, end, self._clock.now()))

    async def _aside(self, work: Awaitable[object]) -> None:
        """Do what nobody waits for; its failure is nobody's but the log's."""
        try:
            await work
        except Exception:  # noqa: BLE001 - a task's boundary: models are served all the same
            _log.exception("aside_failed")

    async def _wait_no_workers(self) -> None:
        while self._workers or not self._spare.is_gone:
            self._worker_gone.clear()
            await self._worker_gone.wait()

    # --- reports --------------------------------------------------------------------------

    def _resident_info(self, resident: Resident) -> ResidentInfo:
        worker = self._workers[resident.worker]
        expires_s = resident.expires_s
        if not resident.is_idle and not resident.is_pinned:
            expires_s = self._clock.now() + resident.keep_alive_s
        return ResidentInfo(
            model=resident.model,
            state=resident.phase.value,
            pid=worker.pid,
            rung=resident.rung,
            ready=resident.ready,
            load_fraction=worker.load_fraction,
            n_leases=len(resident.leases),
            n_waiting=len(self._core.queues[resident.key].waiting),
            expires_at_s=self._epoch(expires_s),
            is_pinned=resident.is_pinned,
            loaded_at_s=None if resident.ready_s is None else self._epoch(resident.ready_s),
            n_threads=resident.n_threads,
            stats=worker.stats,
        )

    def _epoch(self, at_s: float) -> float:
        return time.time() + at_s - self._clock.now()


def _limits(config: Config) -> Limits:
    return Limits(
        keep_alive_s=_keep_alive(config.keep_alive),
        max_queue=config.max_queue,
        pinned=frozenset(config.pinned),
        replan_interval_s=config.replan_interval,
        n_threads=config.n_threads,
    )


def _keep_alive(seconds: float) -> float:
    """Negative means for ever, as in Ollama."""
    return math.inf if seconds < 0 else seconds
