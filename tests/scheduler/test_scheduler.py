"""The scheduler's shell with real processes of tests/fake_engine.py."""

from __future__ import annotations

import asyncio
import math
from contextlib import aclosing

import pytest
from msgspec.structs import replace

from shimpy.errors import (
    CapacityError,
    ContextExceededError,
    DoesNotFitError,
    GgufError,
    LoadError,
    QueueFullError,
    StoppingError,
    WorkerDiedError,
)
from shimpy.gguf.arch import ModelShape
from shimpy.placement.hardware import Hardware
from shimpy.placement.placement import Plan, PlanOptions
from shimpy.protocol.messages import Done, Prefilled, Submit, Text
from shimpy.registry.model import Model
from shimpy.scheduler.exits import WorkerExit
from shimpy.scheduler.reports import MAX_HISTORY, HistoryEvent, Journal, event_id
from shimpy.scheduler.scheduler import Scheduler
from shimpy.scheduler.worker import Worker
from tests.scheduler.support import MIB, make_hardware, plan, taken
from tests.scheduler.workshop import (
    ANY,
    SUBMIT,
    Workshop,
    generate,
    hear,
    held,
    is_running,
    kinds,
    open_gate,
    use,
    wait_event,
)


async def test_loads_on_demand_and_streams(workshop: Workshop) -> None:
    model = workshop.model("a")
    async with workshop.scheduler() as scheduler:
        async with scheduler.acquire(model, ANY) as lease:
            events = [event async for event in lease.generate(SUBMIT)]
            assert scheduler.residents()[0].n_leases == 1
        assert isinstance(events[0], Prefilled)
        assert isinstance(events[-1], Done)
        (resident,) = scheduler.residents()
        assert (resident.state, resident.n_leases, resident.n_waiting) == ("ready", 0, 0)
        assert resident.ready is not None
        assert resident.load_fraction == 1.0
    assert kinds(scheduler) == ["load", "ready", "unload"]


async def test_a_second_request_finds_the_model_resident(workshop: Workshop) -> None:
    """`load_s` is what a client sees as load_duration: the first pays, the second does not."""
    model = workshop.model("a", load_gate=workshop.gate("load"))
    async with workshop.scheduler() as scheduler:
        first = asyncio.create_task(lease_s(scheduler, model))
        await wait_event(scheduler, "load")
        workshop.clock.advance(3)
        await open_gate(workshop.folder / "load")
        assert await first == 3
        assert await lease_s(scheduler, model) == 0
        assert kinds(scheduler).count("load") == 1


async def lease_s(scheduler: Scheduler, model: Model) -> float:
    async with scheduler.acquire(model, ANY) as lease:
        return lease.load_s


async def test_requests_join_a_load(workshop: Workshop) -> None:
    model = workshop.model("a", load_gate=workshop.gate("load"))
    async with workshop.scheduler() as scheduler:
        users = [asyncio.create_task(use(scheduler, model)) for _ in range(5)]
        await open_gate(workshop.folder / "load")
        assert await asyncio.gather(*users) == ["Once upon a time"] * 5
        assert kinds(scheduler).count("load") == 1


async def test_a_loaded_model_does_not_wait_for_another_load(workshop: Workshop) -> None:
    """No head-of-line blocking: `a` is served from start to end while `b` loads."""
    a, b = workshop.model("a"), workshop.model("b", load_gate=workshop.gate("load"))
    async with workshop.scheduler() as scheduler:
        await use(scheduler, a)
        waiting = asyncio.create_task(use(scheduler, b))
        await wait_event(scheduler, "load", 2)
        assert await use(scheduler, a) == "Once upon a time"
        assert not waiting.done()
        await open_gate(workshop.folder / "load")
        await waiting


async def test_keep_alive_runs_from_the_end_of_the_last_lease(workshop: Workshop) -> None:
    model = workshop.model("a")
    async with workshop.scheduler(keep_alive=300.0) as scheduler:
        await use(scheduler, model)
        workshop.clock.advance(200)
        await use(scheduler, model)
        workshop.clock.advance(299)
        assert scheduler.residents()[0].state == "ready"
        workshop.clock.advance(2)
        assert scheduler.residents()[0].state == "stopping"
        await scheduler.drain(5)
    assert scheduler.history()[-1].reason == "idle for its keep_alive of 5m0s"


async def test_a_request_replaces_keep_alive(workshop: Workshop) -> None:
    model = workshop.model("a")
    async with workshop.scheduler(keep_alive=300.0) as scheduler:
        await use(scheduler, model, keep_alive=-1.0)
        assert scheduler.residents()[0].expires_at_s == math.inf
        workshop.clock.advance(1e9)
        assert scheduler.residents()[0].state == "ready"
        await use(scheduler, model, keep_alive=0.0)
        assert scheduler.residents()[0].state == "stopping"


async def test_a_busy_model_does_not_expire(workshop: Workshop) -> None:
    model = workshop.model("a")
    async with workshop.scheduler() as scheduler, held(scheduler, model):
        workshop.clock.advance(1e6)
        assert scheduler.residents()[0].state == "ready"


async def test_unload(workshop: Workshop) -> None:
    model = workshop.model("a")
    async with workshop.scheduler() as scheduler:
        assert not scheduler.unload("a:latest")
        await use(scheduler, model)
        assert scheduler.unload("a:latest")
        assert scheduler.residents()[0].state == "stopping"
        assert not scheduler.unload("a:latest")


async def test_unload_of_a_busy_model_waits_for_its_last_lease(workshop: Workshop) -> None:
    model = workshop.model("a")
    async with workshop.scheduler() as scheduler:
        async with held(scheduler, model):
            assert scheduler.unload("a:latest")
            assert scheduler.residents()[0].state == "ready"
        assert scheduler.residents()[0].state == "stopping"


async def test_a_request_for_a_model_that_stops_gets_a_fresh_one(workshop: Workshop) -> None:
    model = workshop.model("a")
    async with workshop.scheduler() as scheduler:
        await use(scheduler, model, keep_alive=0.0)
        assert scheduler.residents()[0].state == "stopping"
        assert await use(scheduler, model) == "Once upon a time"
        assert kinds(scheduler).count("ready") == 2


async def test_an_idle_model_makes_room(workshop: Workshop) -> None:
    a, b = workshop.model("a", mib=600), workshop.model("b", mib=600)
    async with workshop.scheduler() as scheduler:
        workshop.hardware = make_hardware(ram_mib=1000)
        await use(scheduler, a)
        await use(scheduler, b)
        (evicted,) = (event for event in scheduler.history() if event.kind == "evict")
        assert (evicted.model, evicted.reason) == (
            "a:latest",
            "its memory was needed for b:latest (600.0 MiB of RAM)",
        )
        assert [str(info.model.name) for info in scheduler.residents()] == ["b:latest"]


async def test_a_busy_model_is_waited_for(workshop: Workshop) -> None:
    a, b = workshop.model("a", mib=600), workshop.model("b", mib=600)
    async with workshop.scheduler() as scheduler:
        workshop.hardware = make_hardware(ram_mib=1000)
        async with held(scheduler, a):
            waiting = asyncio.create_task(use(scheduler, b))
            await wait_event(scheduler, "wait")
            assert scheduler.waiting()[0].n_waiting == 1
            assert scheduler.residents()[0].state == "ready"
        assert await waiting == "Once upon a time"


async def test_what_never_fits_is_refused_at_once(workshop: Workshop) -> None:
    model = workshop.model("a", mib=20_000)
    async with workshop.scheduler() as scheduler:
        with pytest.raises(DoesNotFitError, match=r"a:latest does not fit.* lacks 10000 MiB"):
            await use(scheduler, model)


async def test_two_contexts_cost_one_reload(workshop: Workshop) -> None:
    """Clients with different num_ctx must not reload the model back and forth."""
    model = workshop.model("a")
    async with workshop.scheduler() as scheduler:
        for _ in range(5):
            await use(scheduler, model, PlanOptions(n_ctx=2048))
            await use(scheduler, model, PlanOptions(n_ctx=8192))
        assert kinds(scheduler).count("load") == 2
        (reload,) = (event for event in scheduler.history() if event.kind == "reload")
        assert reload.reason == "a context of 8192 was asked for, 2048 is loaded"


async def test_the_queue_is_bounded(workshop: Workshop) -> None:
    model = workshop.model("a", load_gate=workshop.gate("load"))
    async with workshop.scheduler(max_queue=2) as scheduler:
        users = [asyncio.create_task(use(scheduler, model)) for _ in range(2)]
        await wait_event(scheduler, "load")
        with pytest.raises(QueueFullError, match="2 requests wait for a:latest") as full:
            await use(scheduler, model)
        assert full.value.retry_after_s >= 1
        await open_gate(workshop.folder / "load")
        await asyncio.gather(*users)


async def test_a_failed_load_tells_why(workshop: Workshop) -> None:
    model = workshop.model("a", load_fails="tensor 'x' is not within the file bounds")
    async with workshop.scheduler() as scheduler:
        with pytest.raises(LoadError, match="a:latest could not be loaded: tensor 'x' is not"):
            await use(scheduler, model)
        assert kinds(scheduler) == ["load", "load_failed"]
        await scheduler.drain(5)
        assert scheduler.residents() == ()


async def test_a_lack_of_memory_is_tried_one_rung_down(workshop: Workshop) -> None:
    """Once: the second placement works, or the load has failed."""
    workshop.hardware = make_hardware(vram_mib=1000)
    works = workshop.model("works", fails_on_gpu=True)
    never = workshop.model("never", load_fails="no memory", load_out_of_memory=True)
    async with workshop.scheduler() as scheduler:
        assert await use(scheduler, works) == "Once upon a time"
        assert scheduler.residents()[0].rung.placement.mode == "cpu"
        with pytest.raises(LoadError, match="no memory") as failed:
            await use(scheduler, never)
        assert failed.value.out_of_memory
    loads = [event for event in scheduler.history() if event.kind == "load"]
    assert [event.model for event in loads] == ["works:latest"] * 2 + ["never:latest"] * 2


async def test_a_broken_file_is_refused(workshop: Workshop) -> None:
    model = replace(workshop.model("a"), shape=None, error="bad magic")
    async with workshop.scheduler() as scheduler:
        with pytest.raises(GgufError, match="bad magic"):
            await use(scheduler, model)


async def test_a_failed_probe_is_told(workshop: Workshop) -> None:
    async with workshop.scheduler() as scheduler:
        workshop.hardware = None  # type: ignore[assignment]

        def probe() -> Hardware:
            raise OSError("nvml is gone")

        scheduler._surveyor._probe = probe
        with pytest.raises(LoadError, match="could not be probed: nvml is gone"):
            await use(scheduler, workshop.model("a"))


async def test_errors_of_a_request_keep_their_class_and_facts(workshop: Workshop) -> None:
    model = workshop.model("a")
    async with workshop.scheduler() as scheduler, scheduler.acquire(model, ANY) as lease:
        with pytest.raises(ContextExceededError, match="too long") as error:
            [event async for event in lease.generate(Submit(request=0, prompt=[], n_predict=0))]
        assert (error.value.n_prompt, error.value.n_ctx) == (9, 8)
        assert await generate(lease) == "Once upon a time"


async def test_embed_and_tokenize(workshop: Workshop) -> None:
    model = workshop.model("a")
    async with workshop.scheduler() as scheduler, scheduler.acquire(model, ANY) as lease:
        assert (await lease.embed([[Text("x")]])).n_embd == 1
        assert (await lease.tokenize("x")).ids == [1]


async def test_text_that_nobody_reads_is_bounded(workshop: Workshop) -> None:
    """A client that stops reading costs a bounded buffer, then its generation."""
    cancelled = workshop.gate("cancelled")
    model = workshop.model("a", text="x" * 50_000, n_repeat=100, cancel_tells=cancelled)
    async with (
        workshop.scheduler() as scheduler,
        scheduler.acquire(model, ANY) as lease,
        aclosing(lease.generate(SUBMIT)) as events,
    ):
        assert isinstance(await anext(events), Prefilled)
        await hear(cancelled)
        with pytest.raises(CapacityError, match=r"1\.0 MiB of it were not read"):
            [event async for event in events]


async def test_drain_lets_leases_end_and_takes_no_more(workshop: Workshop) -> None:
    model = workshop.model("a", text_gate=workshop.gate("text"))
    async with workshop.scheduler() as scheduler, asyncio.TaskGroup() as tasks:
        user = tasks.create_task(use(scheduler, model))
        await wait_event(scheduler, "ready")
        draining = tasks.create_task(scheduler.drain(30))
        await asyncio.sleep(0)
        with pytest.raises(StoppingError, match="stopping"):
            await use(scheduler, model)
        await open_gate(workshop.folder / "text")
        assert await user == "Once upon a time"
        await draining
        assert scheduler.residents() == ()


async def test_drain_stops_what_does_not_end(workshop: Workshop) -> None:
    model = workshop.model("a", text_gate=workshop.gate("text"))
    async with workshop.scheduler() as scheduler:
        user = asyncio.create_task(use(scheduler, model))
        await wait_event(scheduler, "ready")
        await scheduler.drain(0)
        with pytest.raises(WorkerDiedError, match="was stopped: shimpy is stopping"):
            await user


async def test_no_process_is_left(workshop: Workshop) -> None:
    async with workshop.scheduler() as scheduler:
        await use(scheduler, workshop.model("a"))
        pid = scheduler.residents()[0].pid
        assert pid is not None
        assert is_running(pid)
    assert not is_running(pid)


async def test_a_fault_above_kills_the_workers(workshop: Workshop) -> None:
    """An exception that leaves the block must not hang on a worker that is busy or deaf."""
    pids: list[int | None] = []

    async def fail() -> None:
        async with workshop.scheduler() as scheduler:
            await use(scheduler, workshop.model("a", is_deaf=True))
            pids.append(scheduler.residents()[0].pid)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    assert pids[0] is not None
    assert not is_running(pids[0])


async def test_busy_workers_share_the_cores(workshop: Workshop) -> None:
    workshop.hardware = make_hardware(n_cores=4)
    a, b = workshop.model("a"), workshop.model("b")
    async with workshop.scheduler() as scheduler:
        assert await threads(scheduler, a) == 4
        async with held(scheduler, b):
            assert await threads(scheduler, a) == 2
        assert await threads(scheduler, a) == 4


async def threads(scheduler: Scheduler, model: Model) -> float:
    """Return the threads of a worker, which the fake engine tells as its queue_s."""
    async with scheduler.acquire(model, ANY) as lease:
        *_, done = [event async for event in lease.generate(SUBMIT)]
        assert isinstance(done, Done)
        return done.queue_s


async def test_a_fault_of_our_own_costs_one_worker(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bug in the shell must not take the other models down."""
    async with workshop.scheduler() as scheduler:
        await use(scheduler, workshop.model("a"))
        with monkeypatch.context() as patch:
            patch.setattr(Worker, "run", fail)
            with pytest.raises(LoadError, match="was lost to a fault in shimpy: a bug"):
                await use(scheduler, workshop.model("b"))
        assert await use(scheduler, workshop.model("a")) == "Once upon a time"


async def test_a_fault_in_what_nobody_waits_for_costs_nothing(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk, say, under the figures that are kept for later."""

    def fail_to_observe(*_: object) -> bool:
        raise OSError("no room")

    async with workshop.scheduler() as scheduler:
        monkeypatch.setattr(scheduler.simulations, "observe", fail_to_observe)
        assert await use(scheduler, workshop.model("a")) == "Once upon a time"
        assert await use(scheduler, workshop.model("b")) == "Once upon a time"


async def test_a_fault_of_the_scheduler_itself_ends_it(workshop: Workshop) -> None:
    """Whoever waits for its workers' ends must not wait for ever for those it has killed."""

    async def fault() -> None:
        raise ZeroDivisionError

    async def work() -> None:
        async with workshop.scheduler() as scheduler:
            await use(scheduler, workshop.model("a", is_deaf=True))
            scheduler._tasks.create_task(fault())
            try:
                await asyncio.Event().wait()
            finally:
                await scheduler.drain(0)

    with pytest.raises(ExceptionGroup) as caught:
        async with asyncio.timeout(20):
            await work()
    assert caught.group_contains(ZeroDivisionError)


async def fail(_worker: Worker) -> WorkerExit:
    raise RuntimeError("a bug")


async def test_a_model_moves_up_when_memory_comes_free(workshop: Workshop) -> None:
    """In another process, of its own accord; a look at the memory every 5 s finds it out."""
    roomy = make_hardware(vram_mib=1300)
    workshop.hardware = replace(roomy, gpus=(replace(roomy.gpus[0], free_bytes=300 * MIB),))
    async with workshop.scheduler(keep_alive=-1) as scheduler:
        await use(scheduler, workshop.model("moe", mib=200, expert_mib=700))
        (before,) = scheduler.residents()
        assert before.rung.placement.mode == "experts-in-ram"
        workshop.hardware = roomy
        while "moved_up" not in kinds(scheduler):
            await look(workshop, scheduler)
        assert workshop.clock.time_s < 1000 + 120
        await wait_event(scheduler, "ready", 2)
        (after,) = scheduler.residents()
        assert after.rung.placement.mode == "gpu"
        assert after.pid != before.pid


async def test_a_model_leaves_when_another_program_takes_its_memory(workshop: Workshop) -> None:
    def planner(shape: ModelShape, hardware: Hardware, options: PlanOptions) -> Plan:
        return plan(shape, hardware, options, margin_mib=64)

    async with workshop.scheduler(planner=planner) as scheduler:
        await use(scheduler, workshop.model("a"))
        workshop.hardware = taken(workshop.hardware, ram=workshop.hardware.host.available_bytes)
        await look(workshop, scheduler)
        (evicted,) = (event for event in scheduler.history() if event.kind == "evict")
        assert evicted.cause == "pressure"
        assert evicted.reason == "another program takes memory: RAM is 64.0 MiB short of its margin"


async def look(workshop: Workshop, scheduler: Scheduler) -> None:
    """Let the time of the next look come, and the look end."""
    workshop.clock.advance(5)
    while scheduler._core._snapshots.is_on_its_way:  # noqa: ASYNC110 - whatever the snapshot takes
        await asyncio.sleep(0)


async def test_a_pinned_model_is_told_as_such(workshop: Workshop) -> None:
    async with workshop.scheduler(keep_alive=10.0) as scheduler:
        scheduler.pin("a:latest", pinned=True)
        await use(scheduler, workshop.model("a"), keep_alive=0)
        workshop.clock.advance(1000)
        (resident,) = scheduler.residents()
        assert resident.is_pinned
        assert math.isinf(resident.expires_at_s)
        scheduler.pin("a:latest", pinned=False)
        await wait_event(scheduler, "unload")
        assert "unpinned" in kinds(scheduler)


async def test_a_slow_listener_loses_the_oldest() -> None:
    journal = Journal()
    async with aclosing(journal.follow()) as events:
        first = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0)
        journal.add(event_at(-1))
        await first
        for number in range(MAX_HISTORY + 5):
            journal.add(event_at(number))
        assert (await anext(events)).at_s == 5
    assert len(journal.past()) == MAX_HISTORY


async def test_a_listener_may_begin_in_the_past() -> None:
    """Ids rise even where times do not, so that nothing is told twice or lost."""
    journal = Journal()
    for seconds in (10, 30, 20):
        journal.add(event_at(seconds))
    first, second, third = journal.past()
    assert first.id < second.id < third.id
    async with aclosing(journal.follow(event_id(10))) as events:
        assert [await anext(events), await anext(events)] == [second, third]
        waiting = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0)
        journal.add(event_at(40))
        assert (await waiting).id == event_id(40)


def event_at(seconds: float) -> HistoryEvent:
    return HistoryEvent(kind="load", model="a", reason="", at_s=seconds)


async def test_events_are_streamed(workshop: Workshop) -> None:
    async with workshop.scheduler() as scheduler, aclosing(scheduler.events()) as events:
        first = asyncio.ensure_future(anext(events))
        await use(scheduler, workshop.model("a"))
        assert (await first).kind == "load"
        assert (await anext(events)).kind == "ready"
