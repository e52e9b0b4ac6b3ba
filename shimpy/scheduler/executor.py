"""Carries out what the core wants, and tells it what came of it."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import assert_never

from msgspec.structs import replace

from shimpy.config import Config
from shimpy.errors import ShimpyError
from shimpy.logs import get_logger
from shimpy.protocol.messages import LimitParked, LoadFailed, PrefixNews, Ready, SetThreads, Stats
from shimpy.scheduler import effects as fx
from shimpy.scheduler.clock import Clock, TimerHandle, to_epoch
from shimpy.scheduler.core import SchedulerCore
from shimpy.scheduler.crew import Crew
from shimpy.scheduler.exits import WorkerExit
from shimpy.scheduler.lease import Lease
from shimpy.scheduler.loads import load_message, with_prefixes
from shimpy.scheduler.reports import HistoryEvent, Journal
from shimpy.scheduler.states import RequestId, WorkerId
from shimpy.scheduler.surveyor import Surveyor
from shimpy.scheduler.worker import Deadlines, Task

_log = get_logger("scheduler")


class Executor:
    """Every event is a call of the core whose effects go through `carry_out` at once."""

    def __init__(
        self,
        core: SchedulerCore,
        surveyor: Surveyor,
        *,
        config: Config,
        deadlines: Deadlines,
        engine_argv: Sequence[str],
        clock: Clock,
        spawn: Callable[[Coroutine[None, None, None]], object],
        answer: Callable[[RequestId, Lease | ShimpyError], None],
    ) -> None:
        """`spawn` starts a task; `answer` tells a request what has become of it."""
        self.journal = Journal()
        self.crew = Crew(
            argv=engine_argv,
            clock=clock,
            spawn=spawn,
            on_exit=self._on_worker_exit,
            keeps_spare=config.spare_worker,
        )
        self._config = config
        self._deadlines = deadlines
        self._core = core
        self._surveyor = surveyor
        self._clock = clock
        self._spawn = spawn
        self._answer = answer
        self._timer: TimerHandle | None = None
        # When that goes off.
        self._timer_s: float | None = None

    def carry_out(self, effects: Sequence[fx.Effect]) -> None:
        """Carry out an event's effects, in their order, before anything else runs."""
        for effect in effects:
            match effect:
                case fx.StartWorker():
                    self._start_worker(effect)
                case fx.StopWorker():
                    self._stop_worker(effect)
                case fx.Grant():
                    self._answer(effect.request, self._lease(effect))
                case fx.Reject():
                    self._answer(effect.request, effect.error)
                case fx.SetThreads():
                    self.crew[effect.worker].send(SetThreads(n_threads=effect.n_threads))
                case fx.LimitParked():
                    self.crew[effect.worker].send(LimitParked(n_bytes=effect.n_bytes))
                case fx.Probe():
                    self._begin_probe()
                case fx.Note():
                    event = effect.event
                    self.journal.add(HistoryEvent.of(event, to_epoch(self._clock, event.at_s)))
                    _log.info(f"model_{event.kind}", model=event.model, reason=event.reason)
                case _:
                    assert_never(effect)
        self._arm_timer()
        self.look_for_quiet()

    def reconfigure(self, config: Config) -> None:
        """Use another config for the loads that come."""
        self._config = config
        self._deadlines = replace(
            self._deadlines, load_s=config.load_timeout, silence_s=config.hang_timeout
        )
        self.crew.spare.enable(is_enabled=config.spare_worker)
        self.look_for_quiet()

    def look_for_quiet(self) -> None:
        """Tell the spare worker whether anything is going on."""
        is_idle = all(resident.is_idle for resident in self._core.residents.values())
        self.crew.spare.on_change(is_quiet=is_idle and not self._is_asked())

    def do_aside(self, work: Awaitable[object]) -> None:
        """Do what nobody waits for."""
        self._spawn(_logged(work))

    def disarm(self) -> None:
        """Let no more time pass for the core."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = self._timer_s = None

    def _is_asked(self) -> bool:
        """Whether a request waits for a model."""
        return any(queue.waiting for queue in self._core.queues.values())

    # --- time and hardware ----------------------------------------------------------------

    def _arm_timer(self) -> None:
        when_s = self._core.next_deadline_s
        if when_s == self._timer_s:
            return
        self.disarm()
        if when_s is not None:
            self._timer = self._clock.call_at(when_s, self._on_timer)
            self._timer_s = when_s

    def _on_timer(self) -> None:
        self._timer = self._timer_s = None
        self.carry_out(self._core.on_timer(self._clock.now()))

    def _begin_probe(self) -> None:
        self._spawn(self._probe_hardware())
        if self._is_asked():
            self.crew.spare.hurry()

    async def _probe_hardware(self) -> None:
        try:
            hardware = await self._surveyor.survey(self._core)
        except Exception as error:  # noqa: BLE001 - a task's boundary: those who wait must hear
            _log.exception("probe_failed")
            effects = self._core.on_probe_failed(str(error), self._clock.now())
        else:
            effects = self._core.on_hardware(hardware, self._clock.now())
        self.carry_out(effects)

    # --- workers --------------------------------------------------------------------------

    def _lease(self, grant: fx.Grant) -> Lease:
        resident = self._core.residents[grant.worker]
        assert resident.ready is not None, "only a loaded model is granted"
        return Lease(
            worker=self.crew[grant.worker],
            ready=resident.ready,
            rung=resident.rung,
            load_s=grant.load_s,
        )

    def _start_worker(self, start: fx.StartWorker) -> None:
        core, clock = self._core, self._clock
        name = str(start.model.name)

        def on_ready(ready: Ready) -> None:
            self.do_aside(self._surveyor.observe_load(start, ready))
            self.carry_out(core.on_ready(start.worker, ready, clock.now()))

        def on_load_failed(failed: LoadFailed) -> None:
            effects = core.on_load_failed(
                start.worker, failed.message, clock.now(), out_of_memory=failed.out_of_memory
            )
            self.carry_out(effects)

        def on_stats(stats: Stats) -> None:
            self.carry_out(core.on_stats(start.worker, stats, clock.now()))

        def on_prefix(news: PrefixNews) -> None:
            event = HistoryEvent.of_prefix(name, news, time.time())
            if event is not None:
                self.journal.add(event)

        load = load_message(start.model, start.rung, start.n_threads)
        load = replace(load, parked_cache_bytes=start.parked_limit)
        task = Task(
            name=name,
            load=with_prefixes(load, start.model, self._config),
            on_ready=on_ready,
            on_load_failed=on_load_failed,
            on_stats=on_stats,
            on_prefix=on_prefix,
            deadlines=self._deadlines,
        )
        self.crew.start(start.worker, task)

    def _stop_worker(self, stop: fx.StopWorker) -> None:
        worker = self.crew[stop.worker]
        if worker.uses_gpu and worker.pid is not None:
            self.do_aside(self._surveyor.on_stop(worker.pid))
        worker.stop(stop.reason, is_urgent=stop.is_urgent)

    def _on_worker_exit(self, worker: WorkerId, end: WorkerExit) -> None:
        if (pid := self.crew[worker].pid) is not None:
            self._surveyor.on_exit(pid)
        self.carry_out(self._core.on_worker_exit(worker, end, self._clock.now()))


async def _logged(work: Awaitable[object]) -> None:
    """Await what nobody waits for: its failure is nobody's but the log's."""
    try:
        await work
    except Exception:  # noqa: BLE001 - a task's boundary: models are served all the same
        _log.exception("aside_failed")
