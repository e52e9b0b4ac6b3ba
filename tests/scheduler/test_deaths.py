"""Each way in which a worker can die, at each time, told to its clients and survived."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path

import pytest

from shimpy.config import Config
from shimpy.errors import HeldBackError, LoadError, WorkerDiedError
from shimpy.protocol.messages import Delta, Prefilled
from shimpy.scheduler.scheduler import Scheduler
from shimpy.scheduler.worker import Deadlines
from tests.fake_engine import Script
from tests.scheduler.support import plan
from tests.scheduler.workshop import (
    ANY,
    SUBMIT,
    Workshop,
    hear,
    is_running,
    kinds,
    use,
    wait_event,
)

REASONS = {
    "exit": "failed with status 7",
    "abort": r"was aborted by llama.cpp: GGML_ASSERT\(n_tokens <= n_batch\) failed",
    "segv": "crashed with SIGSEGV",
    "bus": "SIGBUS: its model file was cut short or changed",
    "kill": "was killed by a SIGKILL from outside",
    "cuda_oom": "ran out of GPU memory: CUDA error: out of memory",
    "garbage": "sent what is no message",
    "hang_up": "closed its channel and went on running",
}


@pytest.mark.parametrize("death", REASONS)
async def test_before_ready(workshop: Workshop, death: str) -> None:
    model = workshop.model("a", dies_loading=death)
    async with workshop.scheduler() as scheduler:
        with pytest.raises(LoadError, match=f"a:latest could not be loaded: .*{REASONS[death]}"):
            await use(scheduler, model)
        assert scheduler.residents() == ()


@pytest.mark.parametrize("death", REASONS)
async def test_in_mid_stream(workshop: Workshop, death: str) -> None:
    """The client gets the text so far, then the reason; the next one gets a fresh worker."""
    model = workshop.model("a", dies_after_text=death)
    async with workshop.scheduler() as scheduler:
        async with scheduler.acquire(model, ANY) as lease:
            async with aclosing(lease.generate(SUBMIT)) as events:
                if death != "garbage":  # which takes what came with it along
                    assert isinstance(await anext(events), Prefilled)
                    assert isinstance(await anext(events), Delta)
                with pytest.raises(WorkerDiedError, match=REASONS[death]):
                    [event async for event in events]
            with pytest.raises(WorkerDiedError, match=REASONS[death]):
                await lease.tokenize("x")
        Script().save(model.path)
        assert await use(scheduler, model) == "Once upon a time"


@pytest.fixture
def small_cgroup() -> Iterator[Path]:
    """The file that takes the processes of a memory cgroup of 96 MiB, of version 1 or 2."""
    root = Path("/sys/fs/cgroup")
    version_1 = (root / "memory" / "memory.limit_in_bytes").exists()
    folder = (root / "memory" if version_1 else root) / f"shimpy-test-{os.getpid()}"
    limits = {"memory.limit_in_bytes" if version_1 else "memory.max": str(96 * 1024 * 1024)}
    if not version_1:
        limits["memory.swap.max"] = "0"
    try:
        folder.mkdir()
        for name, limit in limits.items():
            (folder / name).write_text(limit, encoding="ascii")
    except OSError as error:
        with contextlib.suppress(OSError):
            folder.rmdir()
        pytest.skip(f"no memory cgroup can be made here: {error}")
    yield folder / "cgroup.procs"
    folder.rmdir()


async def test_killed_by_the_kernel_for_memory(workshop: Workshop, small_cgroup: Path) -> None:
    """Really so: told from a kill -9 by the kernel's own count."""
    model = workshop.model("a", dies_after_text="host_oom", cgroup=str(small_cgroup))
    async with workshop.scheduler() as scheduler:
        with pytest.raises(WorkerDiedError, match="killed by the kernel because the host ran out"):
            await use(scheduler, model)
        await wait_event(scheduler, "died")
        assert scheduler.history()[-1].cause == "host_out_of_memory"
        Script(dies_loading="host_oom", cgroup=str(small_cgroup)).save(model.path)
        with pytest.raises(LoadError, match="the host ran out of memory") as failed:
            await use(scheduler, model)
        assert failed.value.out_of_memory


async def test_aborted_by_llama_cpp_itself(workshop: Workshop) -> None:
    """What the real library prints when an assertion fails is what its clients are told."""
    code = (
        "import ctypes; from shimpy.engine.llama.library import bind\n"
        "abort = bind('ggml_abort', None, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p)\n"
        "abort(b'ggml.c', 42, b'GGML_ASSERT(n_past >= 0) failed')"
    )
    argv = (sys.executable, "-c", code)
    scheduler = Scheduler(Config(), lambda: workshop.hardware, planner=plan, engine_argv=argv)
    async with scheduler:
        with pytest.raises(
            LoadError, match=r"aborted by llama\.cpp: ggml\.c:42: GGML_ASSERT\(n_past"
        ):
            await use(scheduler, workshop.model("a"))


async def test_those_who_wait_get_a_fresh_worker(workshop: Workshop) -> None:
    """A death is an error for those it served, not for those behind them."""
    model = workshop.model("a", text_gate=workshop.gate("text"))
    async with workshop.scheduler() as scheduler:
        served = [asyncio.create_task(use(scheduler, model)) for _ in range(3)]
        await wait_event(scheduler, "ready")
        waits = asyncio.create_task(use(scheduler, model))
        await asyncio.sleep(0)
        assert scheduler.residents()[0].n_waiting == 1
        Script().save(model.path)
        kill(scheduler)
        outcomes = await asyncio.gather(*served, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [WorkerDiedError] * 3
        assert await waits == "Once upon a time"


async def test_while_idle(workshop: Workshop) -> None:
    """Nobody is told but the log; the next request loads it again."""
    model = workshop.model("a")
    async with workshop.scheduler() as scheduler:
        await use(scheduler, model)
        kill(scheduler)
        await wait_event(scheduler, "died")
        assert scheduler.residents() == ()
        assert await use(scheduler, model) == "Once upon a time"


async def test_hung_with_work_to_do(workshop: Workshop) -> None:
    """Nothing but the daemon can tell: such a process lives, and its channel is open."""
    model = workshop.model("a", text_gate=workshop.gate("text"))
    deadlines = Deadlines(silence_s=0.2, shutdown_s=0.05, terminate_s=0.05)
    async with workshop.scheduler(deadlines=deadlines) as scheduler:
        with pytest.raises(WorkerDiedError, match=r"said nothing .* \(hang_timeout\)"):
            await use(scheduler, model)
        await wait_event(scheduler, "died")
        assert scheduler.history()[-1].cause == "hung"
        Script().save(model.path)
        assert await use(scheduler, model) == "Once upon a time"


async def test_silent_with_nothing_to_do(workshop: Workshop) -> None:
    """An idle worker has nothing to say, and a reader that is slow is not its fault."""
    model = workshop.model("a")
    async with workshop.scheduler(deadlines=Deadlines(silence_s=0.05)) as scheduler:
        async with scheduler.acquire(model, ANY) as lease:
            async with aclosing(lease.generate(SUBMIT)) as events:
                await anext(events)
                await asyncio.sleep(0.2)
                [event async for event in events]
            await asyncio.sleep(0.2)
        assert await use(scheduler, model) == "Once upon a time"
        assert "died" not in kinds(scheduler)


async def test_deaf_to_everything_but_sigkill(workshop: Workshop) -> None:
    model = workshop.model("a", is_deaf=True)
    async with workshop.scheduler() as scheduler:
        await use(scheduler, model)
        pid = scheduler.residents()[0].pid
        assert pid is not None
        scheduler.unload("a:latest")
        assert await use(scheduler, model) == "Once upon a time"
        assert not is_running(pid)
        assert "died" not in kinds(scheduler)


async def test_three_deaths_in_a_row_hold_a_model_back(workshop: Workshop) -> None:
    """For longer each time; a completed request forgives them."""
    model = workshop.model("a", dies_on_submit="abort")
    async with workshop.scheduler() as scheduler:
        for _ in range(3):
            with pytest.raises(WorkerDiedError):
                await use(scheduler, model)
        with pytest.raises(HeldBackError, match=r"another 10s: .* died 3 times .*GGML_ASSERT") as e:
            await use(scheduler, model)
        assert e.value.retry_after_s == 10
        (waiting,) = scheduler.waiting()
        assert (waiting.name, waiting.n_deaths) == ("a:latest", 3)
        assert waiting.held_until_s is not None

        workshop.clock.advance(11)
        with pytest.raises(WorkerDiedError):
            await use(scheduler, model)
        with pytest.raises(HeldBackError, match="another 20s"):
            await use(scheduler, model)

        workshop.clock.advance(21)
        Script().save(model.path)
        await use(scheduler, model)
        Script(dies_on_submit="abort").save(model.path)
        scheduler.unload("a:latest")
        with pytest.raises(WorkerDiedError):
            await use(scheduler, model)
        with pytest.raises(WorkerDiedError):
            await use(scheduler, model)


async def test_a_load_that_takes_too_long(workshop: Workshop) -> None:
    tells = workshop.gate("tells")
    model = workshop.model("a", load_tells=tells, load_gate=workshop.gate("load"))
    deadlines = Deadlines(load_s=0.5, shutdown_s=0.1, terminate_s=0.1, linger_s=1)
    async with workshop.scheduler(deadlines=deadlines) as scheduler:
        user = asyncio.create_task(use(scheduler, model))
        await hear(tells)
        with pytest.raises(LoadError, match=r"did not load its model in .* s \(load_timeout\)"):
            await user


async def test_another_version(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_ENGINE_VERSION", "99")
    async with workshop.scheduler() as scheduler:
        with pytest.raises(LoadError, match=r"speaks version 99 .* restart it"):
            await use(scheduler, workshop.model("a"))


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (("/nonexistent/engine",), "could not be started: .*No such file"),
        ((sys.executable, "-c", "raise SystemExit('no llama_cpp')"), "status 1: no llama_cpp"),
    ],
    ids=["missing", "fails"],
)
async def test_an_engine_that_does_not_start(
    workshop: Workshop, argv: tuple[str, ...], reason: str
) -> None:
    scheduler = Scheduler(Config(), lambda: workshop.hardware, planner=plan, engine_argv=argv)
    async with scheduler:
        with pytest.raises(LoadError, match=reason):
            await use(scheduler, workshop.model("a"))


async def test_its_output_is_read_and_bounded(workshop: Workshop) -> None:
    """A full pipe would stop the worker, an endless line would fill the daemon."""
    noise = ["x" * 300_000] * 3 + [f"line {number}" for number in range(10_000)]
    model = workshop.model("a", prints=noise, dies_after_text="exit")
    async with workshop.scheduler() as scheduler, scheduler.acquire(model, ANY) as lease:
        with pytest.raises(WorkerDiedError, match=r"status 7: line 9997 \| line 9998 \| line 9999"):
            async with aclosing(lease.generate(SUBMIT)) as events:
                [event async for event in events]


def kill(scheduler: Scheduler) -> None:
    pid = scheduler.residents()[0].pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
