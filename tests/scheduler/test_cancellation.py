"""A client may leave at any await: no lease is lost, and nothing is loaded for nobody."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from shimpy.protocol.messages import Prefilled
from shimpy.registry.model import Model
from shimpy.scheduler.lease import Lease
from shimpy.scheduler.scheduler import Scheduler
from tests.scheduler.workshop import (
    ANY,
    SUBMIT,
    Workshop,
    hear,
    held,
    kinds,
    open_gate,
    use,
    wait_event,
)


async def cancel(task: asyncio.Task[str]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("cancelled_first", [True, False], ids=["cancel-grant", "grant-cancel"])
async def test_a_grant_reaches_a_waiter_that_was_just_cancelled(
    workshop: Workshop, cancelled_first: bool
) -> None:
    """In either order within one tick: the future holds the lease, the task does not."""
    model = workshop.model("a", load_gate=workshop.gate("load"))
    async with workshop.scheduler() as scheduler:
        task = asyncio.create_task(use(scheduler, model))
        executor = scheduler._executor
        answer = executor._answer

        def answer_and_cancel(*args: object) -> None:
            if cancelled_first:
                task.cancel()
            answer(*args)  # type: ignore[arg-type]
            task.cancel()

        executor._answer = answer_and_cancel
        await open_gate(workshop.folder / "load")
        with pytest.raises(asyncio.CancelledError):
            await task
        executor._answer = answer
        assert scheduler.residents()[0].n_leases == 0
        assert await use(scheduler, model) == "Once upon a time"


async def test_while_the_hardware_is_probed(workshop: Workshop) -> None:
    async with workshop.scheduler() as scheduler:
        task = asyncio.create_task(use(scheduler, workshop.model("a")))
        await asyncio.sleep(0)  # it waits now, and the probe has been asked for
        await cancel(task)
        assert await use(scheduler, workshop.model("b")) == "Once upon a time"
        assert kinds(scheduler) == ["load", "ready"]


async def test_the_only_waiter_of_a_load(workshop: Workshop) -> None:
    """The load is given up with the last one who waited for it."""
    tells = workshop.gate("tells")
    model = workshop.model("a", load_tells=tells, load_gate=workshop.gate("load"))
    async with workshop.scheduler() as scheduler:
        task = asyncio.create_task(use(scheduler, model))
        await hear(tells)
        await cancel(task)
        assert scheduler.residents()[0].state == "stopping"
        assert scheduler.history()[-1].reason == "no request waits for it any more"
        await scheduler.drain(5)
        assert kinds(scheduler) == ["load", "unload"]


async def test_one_of_two_waiters_of_a_load(workshop: Workshop) -> None:
    tells = workshop.gate("tells")
    model = workshop.model("a", load_tells=tells, load_gate=workshop.gate("load"))
    async with workshop.scheduler() as scheduler:
        leaves, stays = (asyncio.create_task(use(scheduler, model)) for _ in range(2))
        await hear(tells)
        await cancel(leaves)
        await open_gate(workshop.folder / "load")
        assert await stays == "Once upon a time"
        assert kinds(scheduler) == ["load", "ready"]


async def test_while_waiting_for_a_place(workshop: Workshop) -> None:
    """Two slots and one more are taken; of those who wait, the one who stays gets the next."""
    model = workshop.model("a")
    async with workshop.scheduler() as scheduler:
        async with held(scheduler, model), held(scheduler, model), held(scheduler, model):
            leaves, stays = (asyncio.create_task(use(scheduler, model)) for _ in range(2))
            await asyncio.sleep(0)
            info = scheduler.residents()[0]
            assert (info.n_leases, info.n_waiting) == (3, 2)
            await cancel(leaves)
            info = scheduler.residents()[0]
            assert (info.n_leases, info.n_waiting) == (3, 1)
        assert await stays == "Once upon a time"
        assert scheduler.residents()[0].n_leases == 0


@pytest.mark.parametrize("how", ["cancel", "aclose", "break"])
async def test_in_mid_stream(workshop: Workshop, how: str) -> None:
    """The worker hears of it, and the lease ends."""
    cancelled = workshop.gate("cancelled")
    model = workshop.model("a", text_gate=workshop.gate("text"), cancel_tells=cancelled)
    async with workshop.scheduler() as scheduler:
        task = asyncio.create_task(read_some(scheduler, model, how))
        await hear(cancelled)
        if how == "cancel":
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            await task
        assert scheduler.residents()[0].n_leases == 0


async def read_some(scheduler: Scheduler, model: Model, how: str) -> None:
    async with scheduler.acquire(model, ANY) as lease, aclosing(lease.generate(SUBMIT)) as events:
        async for event in events:
            if isinstance(event, Prefilled) and how == "cancel":
                task = asyncio.current_task()
                assert task is not None
                task.cancel()
            elif how == "break":
                break
            elif how == "aclose":
                await events.aclose()


async def test_between_grant_and_use(workshop: Workshop) -> None:
    model = workshop.model("a")
    async with workshop.scheduler() as scheduler:
        has_it = asyncio.Event()

        async def hold() -> str:
            async with scheduler.acquire(model, ANY) as lease:
                assert isinstance(lease, Lease)
                has_it.set()
                await asyncio.Event().wait()
                return ""

        task = asyncio.create_task(hold())
        await has_it.wait()
        await cancel(task)
        assert scheduler.residents()[0].n_leases == 0


async def test_the_whole_scheduler(workshop: Workshop) -> None:
    """Cancelling the task that owns it ends every worker and every wait."""
    model = workshop.model("a", load_gate=workshop.gate("load"), is_deaf=True)
    started = asyncio.Event()

    async def serve() -> str:
        async with workshop.scheduler() as scheduler:
            user = asyncio.create_task(use(scheduler, model))
            await wait_event(scheduler, "load")
            started.set()
            try:
                return await user
            finally:
                user.cancel()

    task = asyncio.create_task(serve())
    await started.wait()
    await cancel(task)
