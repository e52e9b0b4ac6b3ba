"""The scheduler over the real engine: real processes, real llama.cpp, real placements."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
from contextlib import aclosing
from pathlib import Path

import pytest
from msgspec.structs import replace

from shimpy.config import Config
from shimpy.errors import LoadError, WorkerDiedError
from shimpy.gguf.arch import describe_model
from shimpy.gguf.reader import read_header
from shimpy.names import parse_model_name
from shimpy.placement.hardware import Hardware
from shimpy.placement.placement import PlanOptions
from shimpy.placement.planner import plan_model
from shimpy.protocol.messages import Delta, Done, Sampling, Submit, Text
from shimpy.registry.model import Model
from shimpy.scheduler.loads import with_defaults
from shimpy.scheduler.scheduler import Scheduler
from shimpy.scheduler.simulations import Simulations
from tests.scheduler.support import make_hardware
from tests.synthetic import CHAIN_TEXT

# In an F16 cache what other streams are computed beside could change a token (engine/test_worker).
SMALL = PlanOptions(n_ctx=512, n_slots=2, kv_type="f32")
GREEDY = Sampling(temperature=0.0)
SUBMIT = Submit(request=0, prompt=[Text("Say it.")], sampling=GREEDY, n_predict=64)
ENDLESS = Submit(request=0, prompt=[Text("Say it.")], sampling=Sampling(seed=1), n_predict=400)

pytestmark = pytest.mark.slow


def model_at(path: Path) -> Model:
    shape = describe_model(read_header(path))
    return Model(
        name=parse_model_name(path.stem),
        files=(path,),
        size_bytes=shape.file_bytes,
        modified_s=0.0,
        digest=path.stem,
        source=str(path.parent),
        shape=shape,
    )


def make_scheduler() -> Scheduler:
    # One thread: the threads of tiny models only spin.
    config = Config(n_threads=1, keep_alive=300.0)
    return Scheduler(config, lambda: make_hardware(ram_mib=4000))


async def say(scheduler: Scheduler, model: Model, submit: Submit = SUBMIT) -> tuple[str, Done]:
    async with (
        scheduler.acquire(model, SMALL) as lease,
        aclosing(lease.generate(submit)) as stream,
    ):
        events = [event async for event in stream]
    done = events[-1]
    assert isinstance(done, Done)
    return "".join(event.text for event in events if isinstance(event, Delta)), done


async def test_streams_what_the_model_says(chain_model: Path) -> None:
    async with make_scheduler() as scheduler:
        text, done = await say(scheduler, model_at(chain_model))
        assert (text, done.reason) == (CHAIN_TEXT, "stop")
        (resident,) = scheduler.residents()
        assert resident.ready is not None
        real = sum(buffer.model_bytes for buffer in resident.ready.memory)
        assert real > 0
        assert resident.ready.n_ctx == resident.rung.placement.n_ctx == 512


async def test_concurrent_streams_equal_those_run_alone(deepseek_model: Path) -> None:
    model = model_at(deepseek_model)
    prompts = [
        Submit(request=0, prompt=[Text(f"prompt {n}")], sampling=GREEDY, n_predict=16)
        for n in range(6)
    ]
    async with make_scheduler() as scheduler:
        alone = [(await say(scheduler, model, prompt))[0] for prompt in prompts]
        together = await asyncio.gather(*(say(scheduler, model, prompt) for prompt in prompts))
        assert [text for text, _ in together] == alone


async def test_two_models_at_once(chain_model: Path, llama_model: Path) -> None:
    async with make_scheduler() as scheduler:
        (text, _), (_, done) = await asyncio.gather(
            say(scheduler, model_at(chain_model)), say(scheduler, model_at(llama_model))
        )
        assert text == CHAIN_TEXT
        assert done.n_generated > 0
        assert len(scheduler.residents()) == 2


async def test_kill_in_mid_stream_and_go_on(llama_model: Path) -> None:
    model = model_at(llama_model)
    async with make_scheduler() as scheduler:
        async with (
            scheduler.acquire(model, SMALL) as lease,
            aclosing(lease.generate(ENDLESS)) as stream,
        ):
            await anext(stream)
            pid = scheduler.residents()[0].pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(WorkerDiedError, match="SIGKILL"):
                [event async for event in stream]
        _, done = await say(scheduler, model)
        assert done.n_generated > 0


async def test_leaving_frees_the_slot_at_once(llama_model: Path) -> None:
    """With a single slot the next request would have to wait for the whole first answer."""
    model = model_at(llama_model)
    options = PlanOptions(n_ctx=512, n_slots=1)
    async with make_scheduler() as scheduler, scheduler.acquire(model, options) as lease:
        async with aclosing(lease.generate(ENDLESS)) as stream:
            await anext(stream)
        async with aclosing(lease.generate(SUBMIT)) as stream:
            assert isinstance([event async for event in stream][-1], Done)


async def test_a_broken_file_is_explained(llama_model: Path, tmp_path: Path) -> None:
    """It was whole when its header was read."""
    path = tmp_path / "cut.gguf"
    shutil.copy(llama_model, path)
    cut = model_at(path)
    os.truncate(path, cut.size_bytes // 2)
    async with make_scheduler() as scheduler:
        with pytest.raises(LoadError, match="corrupted or incomplete"):
            await say(scheduler, cut)


async def test_a_file_that_is_cut_while_in_use(llama_model: Path, tmp_path: Path) -> None:
    """The kernel answers the next read of a lost page with SIGBUS."""
    path = tmp_path / "shrinks.gguf"
    shutil.copy(llama_model, path)
    model = model_at(path)
    async with make_scheduler() as scheduler, scheduler.acquire(model, SMALL) as lease:
        os.truncate(path, 4096)
        with pytest.raises(WorkerDiedError, match="model file was cut short or changed"):
            async with aclosing(lease.generate(SUBMIT)) as stream:
                [event async for event in stream]


async def test_embeddings(bert_model: Path) -> None:
    model = model_at(bert_model)
    async with make_scheduler() as scheduler:
        async with scheduler.acquire(model, PlanOptions()) as lease:
            embedded = await lease.embed([[Text("one")], [Text("two")]])
        assert len(embedded.data) == 2 * 4 * embedded.n_embd


def parked_in(pid: int) -> int:
    """Return the bytes of RAM in a process's files that have no name."""
    n_bytes = 0
    for file in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if str(file.readlink()).startswith("/memfd:shimpy-parked"):
                n_bytes += file.stat().st_size
    return n_bytes


async def wait_parked(scheduler: Scheduler) -> int:
    """Return the bytes that a worker says it has parked, once it has; it tells now and then."""
    while not (stats := scheduler.residents()[0].stats) or not stats.parked_bytes:  # noqa: ASYNC110 - no event tells of them
        await asyncio.sleep(0.01)
    return stats.parked_bytes


async def test_parked_caches_give_way_to_a_load(chain_model: Path, llama_model: Path) -> None:
    """There is room for the second model but for what the first one has parked.

    Of its two slots both hold a text: the first is copied before it has to make way.
    """
    talker, other = model_at(llama_model), model_at(chain_model)
    long, next_one = (
        replace(SUBMIT, prompt=[Text(text * 20)], n_predict=1)
        for text in ("Once upon a time. ", "There was a fox. ")
    )
    plenty = make_hardware(ram_mib=4000)
    available, pids = plenty.host.available_bytes, list[int]()

    def probe() -> Hardware:
        n_bytes = available - sum(map(parked_in, pids))
        return replace(plenty, host=replace(plenty.host, available_bytes=n_bytes))

    config = Config(n_threads=1, keep_alive=300.0, spare_worker=False)
    async with Scheduler(config, probe) as scheduler:
        await say(scheduler, talker, long)
        await say(scheduler, talker, next_one)
        (resident,) = scheduler.residents()
        assert resident.pid is not None
        pids.append(resident.pid)
        n_parked = await wait_parked(scheduler)
        assert parked_in(resident.pid) == n_parked
        # Of what is needed, a half of that is missing.
        assert other.shape is not None
        rung = plan_model(other.shape, plenty, with_defaults(SMALL, config)).chosen
        assert rung is not None
        need = resident.rung.host.weights_bytes + rung.host.total_bytes + rung.host.margin_bytes
        available = need + n_parked // 2
        text, _ = await say(scheduler, other)
        assert text == CHAIN_TEXT
        assert parked_in(resident.pid) <= n_parked // 2
        assert resident.pid in [one.pid for one in scheduler.residents()]
        assert "evict" not in [event.kind for event in scheduler.history()]
        await say(scheduler, talker, long)


async def test_a_load_takes_what_llama_cpp_said_before_it(deepseek_model: Path) -> None:
    """RAM is tight, so the placement is simulated first: to the byte what the worker reports."""
    model = model_at(deepseek_model)
    hardware = replace(make_hardware(ram_mib=200), library="as installed")
    simulations = Simulations(None)
    scheduler = Scheduler(Config(n_threads=1), lambda: hardware, simulations=simulations)
    async with scheduler, scheduler.acquire(model, SMALL) as lease:
        assert lease.rung.is_exact
        (real,) = lease.ready.memory
        host = lease.rung.host
        assert (host.weights_bytes, host.kv_bytes) == (real.model_bytes, real.context_bytes)
        logits = lease.ready.n_vocab * lease.ready.n_slots * 4
        assert host.compute_bytes == real.compute_bytes + logits
