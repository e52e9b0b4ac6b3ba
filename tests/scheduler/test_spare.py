"""The spare worker: there when it is quiet, used by the next load, replaced, and never left."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable

from shimpy.config import Config
from shimpy.placement.hardware import Hardware
from shimpy.scheduler.scheduler import Scheduler
from shimpy.scheduler.spare import PATIENCE_S, QUIET_S
from tests.scheduler.support import make_hardware
from tests.scheduler.workshop import Workshop, held, is_running, open_gate, use, wait_event

QUIET = QUIET_S + 0.1


async def spare_of(workshop: Workshop, scheduler: Scheduler) -> int:
    """Let it become quiet; return the spare worker's process."""
    workshop.clock.advance(QUIET)
    return await started(scheduler)


async def started(scheduler: Scheduler) -> int:
    await wait_until(lambda: scheduler.spare_pid is not None)
    assert scheduler.spare_pid is not None
    return scheduler.spare_pid


async def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for what a process does, which no event tells."""
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - nothing would set an event
            await asyncio.sleep(0.005)


def pid_of(scheduler: Scheduler, index: int = 0) -> int | None:
    return scheduler.residents()[index].pid


async def test_the_next_load_uses_it_and_another_takes_its_place(workshop: Workshop) -> None:
    async with workshop.scheduler() as scheduler:
        scheduler.prepare(workshop.hardware)
        spare = await spare_of(workshop, scheduler)
        assert scheduler.residents() == ()
        assert await use(scheduler, workshop.model("a")) == "Once upon a time"
        assert pid_of(scheduler) == spare
        assert scheduler.spare_pid is None
        second = await spare_of(workshop, scheduler)
        await use(scheduler, workshop.model("b"))
        assert [pid_of(scheduler, 0), pid_of(scheduler, 1)] == [spare, second]


async def test_a_load_that_finds_none_starts_its_own(workshop: Workshop) -> None:
    async with workshop.scheduler() as scheduler:
        scheduler.prepare(workshop.hardware)
        await use(scheduler, workshop.model("a"))
        assert await spare_of(workshop, scheduler) != pid_of(scheduler)


async def test_a_load_that_is_foreseen_finds_one(workshop: Workshop) -> None:
    model = workshop.model("a")
    async with workshop.scheduler() as scheduler:
        scheduler.foresee(model)
        await wait_until(lambda: scheduler.spare_pid is not None)
        spare = scheduler.spare_pid
        await use(scheduler, model)
        assert pid_of(scheduler) == spare
        scheduler.foresee(model)
        assert not scheduler.has_spare


async def test_it_may_be_taken_before_it_has_said_hello(workshop: Workshop) -> None:
    async with workshop.scheduler() as scheduler:
        scheduler.prepare(workshop.hardware)
        workshop.clock.advance(QUIET)
        assert await use(scheduler, workshop.model("a")) == "Once upon a time"


async def test_it_is_started_when_nothing_runs(workshop: Workshop) -> None:
    """It would slow what runs; when something always does, it has to be."""
    model = workshop.model("a", load_gate=workshop.gate("load"))
    async with workshop.scheduler() as scheduler:
        scheduler.prepare(workshop.hardware)
        loading = asyncio.create_task(use(scheduler, model))
        await wait_event(scheduler, "load")
        workshop.clock.advance(QUIET)
        assert not scheduler.has_spare
        await open_gate(str(workshop.folder / "load"))
        await loading
        async with held(scheduler, model):
            workshop.clock.advance(QUIET)
            assert not scheduler.has_spare
            workshop.clock.advance(PATIENCE_S)
            assert scheduler.has_spare


async def test_another_kind_of_machine_wants_another(workshop: Workshop) -> None:
    """Its environment is given at its start, and differs where a GPU is used."""
    workshop.hardware = make_hardware(vram_mib=1000)
    on_gpu, too_large = workshop.model("a"), workshop.model("b", mib=2000)
    async with workshop.scheduler() as scheduler:
        scheduler.prepare(workshop.hardware)
        spare = await spare_of(workshop, scheduler)
        await use(scheduler, too_large)
        assert scheduler.residents()[0].rung.placement.mode == "cpu"
        assert pid_of(scheduler) != spare
        await wait_until(lambda: not is_running(spare))
        assert await spare_of(workshop, scheduler) not in {spare, pid_of(scheduler)}
        await use(scheduler, on_gpu)
        assert scheduler.residents()[1].rung.placement.mode == "gpu"


async def test_one_that_has_died_is_not_used(workshop: Workshop) -> None:
    """Nor replaced at once: what killed it may kill the next."""
    async with workshop.scheduler() as scheduler:
        scheduler.prepare(workshop.hardware)
        spare = await spare_of(workshop, scheduler)
        os.kill(spare, signal.SIGKILL)
        await wait_until(lambda: not scheduler.has_spare)
        workshop.clock.advance(PATIENCE_S * 2)
        assert not scheduler.has_spare
        assert await use(scheduler, workshop.model("a")) == "Once upon a time"
        assert scheduler.history()[-1].kind == "ready"
        await spare_of(workshop, scheduler)


async def test_it_ends_with_the_scheduler(workshop: Workshop) -> None:
    async with workshop.scheduler() as scheduler:
        scheduler.prepare(workshop.hardware)
        spare = await spare_of(workshop, scheduler)
        await scheduler.drain(5)
        assert not is_running(spare)
        scheduler.reconfigure(Config(spare_worker=False))
        scheduler.reconfigure(Config(spare_worker=True))
        workshop.clock.advance(QUIET)
        assert not scheduler.has_spare


async def test_who_wants_none_has_none(workshop: Workshop) -> None:
    def off(hardware: Hardware, scheduler: Scheduler) -> None:
        scheduler.prepare(hardware)
        workshop.clock.advance(QUIET)
        assert not scheduler.has_spare

    async with workshop.scheduler(spare_worker=False) as scheduler:
        off(workshop.hardware, scheduler)
        scheduler.reconfigure(Config(spare_worker=True))
        spare = await spare_of(workshop, scheduler)
        scheduler.reconfigure(Config(spare_worker=False))
        await wait_until(lambda: not is_running(spare))
        off(workshop.hardware, scheduler)
