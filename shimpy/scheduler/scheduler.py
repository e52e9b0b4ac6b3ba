"""The scheduler's shell, as the server sees it: hands out leases, and tells what is loaded.

Everything runs on one event loop. An event is a call of the core, and its effects are carried
out (executor) before anything else runs; so there are no locks, and no state but the core's
decides.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from types import TracebackType
from typing import Self

from shimpy.config import Config
from shimpy.errors import ShimpyError
from shimpy.placement.hardware import Hardware
from shimpy.placement.placement import PlanOptions
from shimpy.placement.planner import plan_model
from shimpy.registry.model import Model
from shimpy.scheduler.books import Limits
from shimpy.scheduler.clock import Clock, LoopClock
from shimpy.scheduler.core import SchedulerCore
from shimpy.scheduler.executor import Executor
from shimpy.scheduler.lease import Lease
from shimpy.scheduler.ledger import Ledger
from shimpy.scheduler.loads import with_defaults
from shimpy.scheduler.overheads import Overheads
from shimpy.scheduler.policy import Planner
from shimpy.scheduler.reports import (
    HistoryEvent,
    ResidentInfo,
    WaitingInfo,
    report_residents,
    report_waiting,
)
from shimpy.scheduler.simulations import Simulations
from shimpy.scheduler.states import Phase, Request, RequestId
from shimpy.scheduler.surveyor import Surveyor
from shimpy.scheduler.worker import ENGINE_ARGV, Deadlines


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
        self._clock = clock or LoopClock()
        self.simulations = simulations or Simulations(None)
        self._surveyor = Surveyor(probe, self.simulations, overheads or Overheads(None))
        self._core = SchedulerCore(
            _limits(config), planner if simulations is None else simulations.plan
        )
        self._tasks = asyncio.TaskGroup()
        self._executor = Executor(
            self._core,
            self._surveyor,
            config=config,
            deadlines=deadlines
            or Deadlines(load_s=config.load_timeout, silence_s=config.hang_timeout),
            engine_argv=tuple(engine_argv),
            clock=self._clock,
            spawn=self._tasks.create_task,
            answer=self._answer,
        )
        self._carry_out = self._executor.carry_out
        self._crew = self._executor.crew
        self._grants: dict[RequestId, asyncio.Future[Lease | ShimpyError]] = {}
        self._last_request = 0

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._crew.spare.close()
        self._carry_out(self._core.on_drain_over(self._clock.now()))
        # Cancelled, the workers are killed; else they get their deadlines. An error of the
        # block's own goes on its way as it is, not in a group of the tasks' errors.
        cause = exc if isinstance(exc, asyncio.CancelledError) else None
        try:
            await self._tasks.__aexit__(type(cause) if cause else None, cause, traceback)
        finally:
            self._executor.disarm()

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
            await self._crew.wait_exit()

    def reconfigure(self, config: Config) -> None:
        """Use another config for the loads and requests that come."""
        self._config = config
        self._core.on_limits(_limits(config))
        self._executor.reconfigure(config)

    def prepare(self, hardware: Hardware) -> None:
        """Have a worker process ready soon for the first load on this machine."""
        self._crew.spare.want(uses_gpu=bool(hardware.gpus))
        self._executor.look_for_quiet()

    def foresee(self, model: Model) -> None:
        """Have a worker process start now if a request that is to come has to load its model."""
        if all(resident.model.name != model.name for resident in self._core.residents.values()):
            self._crew.spare.hurry()

    async def drain(self, timeout_s: float) -> None:
        """Take no more requests, let leases end for `timeout_s`, then stop every worker.

        Returns when all workers have gone.
        """
        self._crew.spare.close()
        self._carry_out(self._core.on_drain(self._clock.now()))
        try:
            async with asyncio.timeout(timeout_s):
                await self._crew.wait_none()
        except TimeoutError:
            self._carry_out(self._core.on_drain_over(self._clock.now()))
            await self._crew.wait_none()

    def residents(self) -> tuple[ResidentInfo, ...]:
        """Return all residents, the longest loaded first."""
        return report_residents(self._core, self._crew, self._clock)

    def emptied(self, hardware: Hardware) -> Hardware:
        """Return a snapshot of the machine as it would be with no model loaded."""
        return Ledger(hardware, self._core.residents.values()).at_most()

    def waiting(self) -> tuple[WaitingInfo, ...]:
        """Return the models that wait for a worker, or are held back after deaths."""
        return report_waiting(self._core, self._executor.journal, self._clock)

    @property
    def has_spare(self) -> bool:
        """Whether a worker waits for a model, or is just starting to."""
        return self._crew.spare.is_there

    @property
    def spare_pid(self) -> int | None:
        """The process id of the worker that waits for a model, if there is one."""
        return self._crew.spare.pid

    def history(self) -> tuple[HistoryEvent, ...]:
        """Return the last loads, unloads, evictions and failures, oldest first; bounded."""
        return self._executor.journal.past()

    def events(self, after: int | None = None) -> AsyncGenerator[HistoryEvent, None]:
        """Yield what happens from now on; a reader that falls behind loses the oldest.

        With `after`, an event's id, first what is remembered of what happened since then.
        """
        return self._executor.journal.follow(after)

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
            if lease.completed and self._surveyor.is_due(lease):
                self._executor.do_aside(self._surveyor.observe_use(lease))
            now = self._clock.now()
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

    def _answer(self, request: RequestId, outcome: Lease | ShimpyError) -> None:
        granted = self._grants.get(request)
        # Done already: its task was cancelled, and gives the lease back when it runs.
        if granted is not None and not granted.done():
            granted.set_result(outcome)


def _limits(config: Config) -> Limits:
    return Limits(
        keep_alive_s=_keep_alive(config.keep_alive),
        max_queue=config.max_queue,
        pinned=frozenset(config.pinned),
        parked_bytes=config.parked_cache_size,
        replan_interval_s=config.replan_interval,
        n_threads=config.n_threads,
    )


def _keep_alive(seconds: float) -> float:
    """Negative means for ever, as in Ollama."""
    return math.inf if seconds < 0 else seconds
