"""Loads a model as a candidate places it, and measures it through the engine's own protocol."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any

import msgspec

from shimpy.bench.candidates import Candidate
from shimpy.bench.readings import Baseline, Readings
from shimpy.bench.results import Effort, Measurement, Reading, StreamFigures
from shimpy.bench.summary import summarize
from shimpy.errors import LoadError
from shimpy.protocol.messages import (
    Delta,
    Done,
    LoadFailed,
    Ready,
    Sampling,
    Submit,
    Tokens,
)
from shimpy.registry.model import Model
from shimpy.scheduler.lease import Lease
from shimpy.scheduler.loads import load_message
from shimpy.scheduler.worker import ENGINE_ARGV, Deadlines, Task, Worker

# Every run of a kind meets the same prompts, whatever the placement.
_SEED = 7


class Bench(msgspec.Struct, frozen=True, kw_only=True):
    """Measures placements of one model, one after the other."""

    model: Model
    effort: Effort
    readings: Readings
    # Called at each step, of Effort.n_steps.
    on_step: Callable[[str], None] = lambda _what: None
    engine_argv: Sequence[str] = ENGINE_ARGV
    deadlines: Deadlines = msgspec.field(default_factory=Deadlines)

    async def measure(self, candidate: Candidate) -> Measurement:
        """Return what a placement comes to; its worker is gone when this returns.

        Raises:
            LoadError: it could not be loaded.
            WorkerError: the worker failed or died while it was measured.
        """
        before = await asyncio.to_thread(self.readings.baseline)
        self.on_step("loading")
        async with self._loaded(candidate) as (lease, worker, start_s):
            loaded = await self._read(worker, before)
            run = _Run(lease, self.effort)
            await run.warm_up()
            single: list[_Answer] = []
            streams = []
            for n_streams in self.effort.counts:
                runs = []
                for repetition in range(self.effort.n_repetitions):
                    self.on_step(f"{n_streams} stream{'' if n_streams == 1 else 's'}")
                    runs.append(await run.once(n_streams, repetition))
                streams.append(_stream_figures(n_streams, runs))
                if n_streams == 1:
                    single = [answer for _, (answer,) in runs]
            worked = await self._read(worker, before)
        return Measurement(
            candidate=candidate,
            start_s=start_s,
            load_s=lease.ready.load_s,
            prefill_per_s=summarize(answer.prefill_per_s for answer in single),
            decode_per_s=summarize(answer.decode_per_s for answer in single),
            streams=tuple(streams),
            buffers=tuple(lease.ready.memory),
            loaded=loaded,
            worked=worked,
            n_prompt=run.n_prompt,
            n_generated=self.effort.n_generated,
        )

    async def _read(self, worker: Worker, before: Baseline) -> Reading:
        assert worker.pid is not None, "it has loaded"
        return await asyncio.to_thread(self.readings.take, worker.pid, before)

    @asynccontextmanager
    async def _loaded(self, candidate: Candidate) -> AsyncIterator[tuple[Lease, Worker, float]]:
        """Run a worker as long as the block runs; it is reaped however the block is left."""
        loaded: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()

        def on_ready(ready: Ready) -> None:
            if not loaded.done():
                loaded.set_result(ready)

        def on_load_failed(failed: LoadFailed) -> None:
            if not loaded.done():
                error = LoadError(failed.message, out_of_memory=failed.out_of_memory)
                loaded.set_exception(error)

        load = load_message(self.model, candidate.rung, candidate.n_threads)
        worker = Worker(uses_gpu=bool(load.devices), argv=self.engine_argv)
        worker.give(
            Task(
                name=str(self.model.name),
                load=load,
                on_ready=on_ready,
                on_load_failed=on_load_failed,
                deadlines=self.deadlines,
            )
        )
        started = time.perf_counter()
        life = asyncio.create_task(worker.run())
        try:
            waited: set[asyncio.Future[Any]] = {life, loaded}
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if not loaded.done():
                raise LoadError(f"the worker {life.result().reason}")
            ready = loaded.result()
            start_s = time.perf_counter() - started
            lease = Lease(worker=worker, ready=ready, rung=candidate.rung, load_s=start_s)
            yield lease, worker, start_s
            worker.stop("it has been measured")
            await life
        finally:
            loaded.cancel()
            # Not done here: it failed or was interrupted. Then it is killed, and reaped.
            life.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.shield(asyncio.wait({life}))


class _Answer(msgspec.Struct, frozen=True):
    first_text_s: float
    n_prompt: int
    n_generated: int
    prefill_s: float
    decode_s: float

    @property
    def prefill_per_s(self) -> float:
        return self.n_prompt / self.prefill_s

    @property
    def decode_per_s(self) -> float:
        # The first token comes with the end of the prefill.
        return max(1, self.n_generated - 1) / self.decode_s


_StreamRun = tuple[float, tuple[_Answer, ...]]


class _Run:
    """Sends requests of random tokens through a lease."""

    def __init__(self, lease: Lease, effort: Effort) -> None:
        self._lease = lease
        self._n_generated = effort.n_generated
        # A short model gets shorter prompts.
        ready = lease.ready
        limit = min(ready.n_ctx, ready.n_ctx_train or ready.n_ctx) - effort.n_generated - 1
        self.n_prompt = max(1, min(effort.n_prompt, limit))

    async def warm_up(self) -> None:
        """Let the drivers make what they make at first use, and pages be read from the disk."""
        await self._ask(random.Random(0), n_generated=8)  # noqa: S311 - no secret

    async def once(self, n_streams: int, repetition: int) -> _StreamRun:
        """Return the seconds of a run, and the answers to its requests, all sent at once."""
        rng = random.Random(_SEED * 1000 + n_streams * 100 + repetition)  # noqa: S311 - no secret
        started = time.perf_counter()
        answers = await asyncio.gather(
            *(self._ask(random.Random(rng.random())) for _ in range(n_streams))  # noqa: S311 - no secret
        )
        return time.perf_counter() - started, tuple(answers)

    async def _ask(self, rng: random.Random, *, n_generated: int | None = None) -> _Answer:
        submit = Submit(
            request=0,
            prompt=[Tokens(self._prompt(rng))],
            # Greedy, and to the full length.
            sampling=Sampling(temperature=0.0, ignore_eos=True),
            n_predict=n_generated or self._n_generated,
            add_bos=False,
            no_cache=True,
        )
        started = time.perf_counter()
        first_s: float | None = None
        async with aclosing(self._lease.generate(submit)) as events:
            async for event in events:
                if first_s is None and isinstance(event, Delta | Done):
                    first_s = time.perf_counter() - started
                if isinstance(event, Done):
                    return _Answer(
                        first_text_s=first_s or 0.0,
                        n_prompt=event.n_prompt - event.n_cached,
                        n_generated=event.n_generated,
                        prefill_s=event.prefill_s,
                        decode_s=event.decode_s,
                    )
        raise AssertionError("a generation ends with Done")

    def _prompt(self, rng: random.Random) -> list[int]:
        """Return random tokens, but for the first and last of the ids, where control tokens are."""
        n_vocab = self._lease.ready.n_vocab
        edge = n_vocab // 20
        return [rng.randrange(edge, n_vocab - edge) for _ in range(self.n_prompt)]


def _stream_figures(n_streams: int, runs: Sequence[_StreamRun]) -> StreamFigures:
    return StreamFigures(
        n_streams=n_streams,
        per_s=summarize(sum(a.n_generated for a in answers) / took_s for took_s, answers in runs),
        first_text_s=summarize(
            sum(a.first_text_s for a in answers) / len(answers) for _, answers in runs
        ),
    )
