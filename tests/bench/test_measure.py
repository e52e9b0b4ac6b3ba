"""Measuring a real model through a real worker, and what is left when that goes wrong."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from msgspec.structs import replace

from shimpy.bench.candidates import Candidate, Wanted, select_candidates
from shimpy.bench.keep import keep_speeds
from shimpy.bench.measure import Bench, _Run
from shimpy.bench.readings import Readings
from shimpy.bench.results import Effort
from shimpy.errors import LoadError
from shimpy.placement.placement import PlanOptions
from shimpy.placement.planner import plan_model
from shimpy.placement.speeds import Speeds
from shimpy.registry.registry import model_of_files
from tests.bench.support import QUICK
from tests.placement.machines import machine

Workers = Callable[[], list[int]]

pytestmark = pytest.mark.slow
MACHINE = machine()


def bench_of(
    path: Path,
    effort: Effort = QUICK,
    on_step: Callable[[str], None] = lambda _what: None,
) -> tuple[Bench, list[Candidate]]:
    """A bench of a model, and its candidates with one thread each."""
    model = model_of_files([path])
    assert model.shape is not None
    options = PlanOptions(n_ctx=512, n_slots=effort.n_slots)
    planner = partial(plan_model, model.shape)
    wanted = Wanted(n_threads=1, usual_threads=1)
    selection = select_candidates(planner, MACHINE, options, wanted, shape=model.shape)
    bench = Bench(model=model, effort=effort, readings=Readings(()), on_step=on_step)
    return bench, list(selection.candidates)


async def test_a_placement_is_measured_and_its_worker_gone(
    mixtral_model: Path, own_workers: Workers
) -> None:
    steps: list[str] = []
    bench, (first, *_) = bench_of(mixtral_model, on_step=steps.append)
    found = await bench.measure(first)
    assert not own_workers()
    assert steps == ["loading", "1 stream", "1 stream", "2 streams", "2 streams"]
    assert len(steps) == QUICK.n_steps
    assert len(found.prefill_per_s.samples) == len(found.decode_per_s.samples) == 2
    assert min(found.prefill_per_s.samples + found.decode_per_s.samples) > 0
    assert [figures.n_streams for figures in found.streams] == [1, 2]
    for figures in found.streams:
        assert all(0 < seconds < found.start_s + 60 for seconds in figures.first_text_s.samples)
    assert 0 < found.load_s <= found.start_s
    assert sum(use.model_bytes for use in found.buffers) > 0
    assert found.vram_bytes == 0
    assert found.worked.rss_bytes is not None
    assert found.worked.card_bytes is None


async def test_the_same_prompts_again_are_computed_again_and_run_to_their_length(
    chain_model: Path,
) -> None:
    """This model ends its text by itself, after some twenty tokens."""
    effort = replace(QUICK, n_generated=60)
    bench, (first, *_) = bench_of(chain_model, effort)
    async with bench._loaded(first) as (lease, _, _):
        run = _Run(lease, effort)
        for _ in range(2):
            _, answers = await run.once(2, 0)
            assert [(a.n_prompt, a.n_generated) for a in answers] == [(16, 60)] * 2


async def test_a_long_prompt_is_cut_to_what_the_model_takes(mixtral_model: Path) -> None:
    effort = replace(QUICK, n_prompt=9999, streams=(1,), n_repetitions=1)
    bench, (first, *_) = bench_of(mixtral_model, effort)
    assert (await bench.measure(first)).n_prompt == 512 - 4 - 1


async def test_a_model_that_cannot_be_loaded_is_an_error(
    mixtral_model: Path, tmp_path: Path, own_workers: Workers
) -> None:
    path = shutil.copy(mixtral_model, tmp_path / "cut.gguf")
    bench, (first, *_) = bench_of(path)
    os.truncate(path, 5000)
    with pytest.raises(LoadError):
        await bench.measure(first)
    assert not own_workers()


async def test_a_worker_that_dies_before_it_is_ready_is_an_error(mixtral_model: Path) -> None:
    bench, (first, *_) = bench_of(mixtral_model)
    bench = replace(bench, engine_argv=(sys.executable, "-c", "raise SystemExit(3)"))
    with pytest.raises(LoadError, match="the worker"):
        await bench.measure(first)


async def test_cancelled_it_leaves_no_worker(mixtral_model: Path, own_workers: Workers) -> None:
    busy = asyncio.Event()
    effort = replace(QUICK, n_generated=400, n_repetitions=1000)
    bench, (first, *_) = bench_of(mixtral_model, effort)
    bench = replace(bench, on_step=lambda what: busy.set() if what == "1 stream" else None)
    task = asyncio.create_task(bench.measure(first))
    await busy.wait()
    assert len(own_workers()) == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not own_workers()


async def test_what_was_measured_is_kept_and_planned_with(
    mixtral_model: Path, tmp_path: Path
) -> None:
    effort = replace(QUICK, streams=(1,), n_repetitions=1)
    bench, candidates = bench_of(mixtral_model, effort)
    found = [await bench.measure(candidate) for candidate in candidates[:2]]
    unusual = replace(found[0], candidate=replace(candidates[0], is_usual=False))
    assert keep_speeds(tmp_path, bench.model, MACHINE, [*found, unusual]) == 2
    speeds = Speeds(tmp_path)
    speeds.refresh()
    shape = bench.model.shape
    assert shape is not None
    assert speeds.of(shape, MACHINE) == tuple(measured.speed for measured in found)
    plan = speeds.plan(plan_model, shape, MACHINE, PlanOptions())
    assert plan.reason.startswith("measured: ")
    assert keep_speeds(tmp_path / "none", bench.model, MACHINE, [unusual]) == 0
    assert not (tmp_path / "none").exists()
