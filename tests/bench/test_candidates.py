"""Which placements are measured: what differs, what fits, and nothing twice."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from shimpy.bench.candidates import Selection, Wanted, limit_vram, select_candidates
from shimpy.errors import DoesNotFitError, UserError
from shimpy.gguf.arch import ModelShape
from shimpy.placement.hardware import Hardware
from shimpy.placement.measured import spot_of
from shimpy.placement.placement import PlanOptions
from shimpy.placement.planner import plan_model
from shimpy.units import GIB
from tests.placement.machines import MACHINES, MODELS, machine, model

MOE, DENSE = model(), model(n_expert=0)
OPTIONS = PlanOptions(n_ctx=4096, n_slots=4)


def select(
    shape: ModelShape, hardware: Hardware, options: PlanOptions = OPTIONS, **wanted: Any
) -> Selection:
    planner = partial(plan_model, shape)
    return select_candidates(planner, hardware, options, Wanted(**wanted), shape=shape)


def numbers(selection: Selection) -> list[int]:
    return [c.rung.placement.n_cpu_moe for c in selection.candidates]


def test_a_card_with_room_gets_quarters_of_the_experts() -> None:
    selection = select(MOE, machine(80))
    n_moved = [c.rung.placement.moe_layers_in_ram for c in selection.candidates]
    # The ladder's own step down, an eighth, among them.
    assert n_moved == [0, 3, 7, 14, 20, 27]
    assert selection.candidates[0].label == "all 28 layers on CUDA0"
    assert selection.candidates[-1].label.endswith(", page-locked, micro-batch 2048")
    assert {c.rung.placement.n_ctx for c in selection.candidates} == {4096}


def test_a_budget_leaves_out_what_does_not_fit_it() -> None:
    whole = select(MOE, machine(80))
    selection = select(MOE, limit_vram(machine(80), 8 * GIB))
    assert numbers(selection)[-1] == numbers(whole)[-1]
    assert numbers(selection)[0] > 7
    for candidate in selection.candidates:
        (device,) = candidate.rung.devices
        assert device.free_bytes == 8 * GIB
        assert device.total_bytes < 8 * GIB
    assert limit_vram(machine(4), 8 * GIB) == limit_vram(machine(4), None) == machine(4)


def test_a_smaller_cache_is_measured_where_it_was_asked_for_and_said() -> None:
    small = PlanOptions(n_ctx=4096, n_slots=4, kv_type="q8_0")
    assert all(c.label.endswith("KV cache q8_0") for c in select(MOE, machine(8), small).candidates)
    assert not any("KV" in c.label for c in select(MOE, machine(80)).candidates)


def test_asked_for_numbers_are_measured_and_those_that_do_not_fit_are_named() -> None:
    selection = select(MOE, machine(8), n_cpu_moe=(20, 0, 24))
    assert numbers(selection) == [20, 24]
    (reason,) = selection.left_out
    assert "all 28 layers on CUDA0: CUDA0 lacks" in reason


def test_all_means_each_number_and_both_ways_to_hold_weights() -> None:
    selection = select(MOE, machine(80), every=True)
    held = {(c.rung.placement.n_cpu_moe, c.rung.placement.load_mode) for c in selection.candidates}
    assert {(n, "locked") for n in range(2, 29)} | {(n, "mmap") for n in range(2, 29)} <= held
    assert selection.candidates[-1].rung.placement.mode == "cpu"


def test_a_dense_model_that_does_not_fit_is_measured_in_part_and_on_the_cpu() -> None:
    shape = model(n_expert=0, dense_mib=600)
    modes = [c.rung.placement.mode for c in select(shape, machine(8)).candidates]
    assert modes == ["partial-gpu", "cpu"]
    layers = select(shape, machine(8), n_gpu_layers=(4, 8, 99))
    assert [c.rung.placement.n_gpu_layers for c in layers.candidates] == [8, 4]
    assert len(layers.left_out) == 1


def test_a_cpu_varies_one_thing_at_a_time() -> None:
    base, flash, batch, threads = select(MOE, machine()).candidates
    assert base.label == "8 threads, plain attention, micro-batch 512"
    assert (flash.label, flash.rung.placement.flash_attn) == ("flash attention", True)
    assert (batch.label, batch.rung.placement.n_ubatch) == ("micro-batch 128", 128)
    assert not batch.rung.placement.flash_attn
    assert (threads.label, threads.n_threads, threads.is_usual) == ("4 threads", 4, False)
    assert all(c.is_usual for c in (base, flash, batch))


def test_a_cpu_with_flash_attention_tries_to_do_without() -> None:
    asked = PlanOptions(n_ctx=4096, n_slots=4, flash_attn=True)
    labels = [c.label for c in select(MOE, machine(), asked).candidates]
    assert labels[0] == "8 threads, flash attention, micro-batch 512"
    assert "plain attention" not in labels
    labels = [c.label for c in select(MOE, machine(), every=True).candidates]
    assert labels[2:] == [
        "micro-batch 128", "micro-batch 2048", "4 threads", "2 threads", "1 thread",
    ]  # fmt: skip


def test_a_small_model_is_tried_with_all_cores_too() -> None:
    small = replace(model(n_layer=1, dense_mib=8, n_expert=0), output_bytes=0)
    candidates = select(small, machine()).candidates
    assert candidates[0].label.startswith("1 thread, ")
    assert (candidates[-1].label, candidates[-1].is_usual) == ("8 threads", False)


@pytest.mark.parametrize(
    ("usual", "asked", "expected", "is_usual"),
    [(None, None, 4, True), (2, None, 2, True), (None, 3, 3, False), (3, 3, 3, True)],
)
def test_threads_are_the_daemons_unless_asked_for(
    usual: int | None, asked: int | None, expected: int, is_usual: bool
) -> None:
    first = select(MOE, machine(80), usual_threads=usual, n_threads=asked).candidates[0]
    assert (first.n_threads, first.is_usual) == (expected, is_usual)


@pytest.mark.parametrize(
    ("shape", "hardware", "wanted", "message"),
    [
        (MOE, machine(), {"n_cpu_moe": (1,)}, "no GPU here"),
        (MOE, machine(), {"n_gpu_layers": (1,)}, "no GPU here"),
        (DENSE, machine(8), {"n_cpu_moe": (1,)}, "no experts"),
    ],
)
def test_what_cannot_vary_is_refused(
    shape: ModelShape, hardware: Hardware, wanted: Any, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        select(shape, hardware, **wanted)


def test_what_fits_nowhere_is_refused_with_the_figures() -> None:
    with pytest.raises(DoesNotFitError, match="RAM lacks"):
        select(MOE, machine(2, ram=1))
    with pytest.raises(DoesNotFitError, match="CUDA0 lacks"):
        select(MOE, machine(2), n_cpu_moe=(0,))


@given(MODELS, MACHINES, st.booleans())
def test_every_candidate_fits_and_none_is_there_twice(
    shape: ModelShape, hardware: Hardware, every: bool
) -> None:
    try:
        selection = select(shape, hardware, every=every)
    except DoesNotFitError:
        assert plan_model(shape, hardware, OPTIONS).chosen is None
        return
    seen = [(spot_of(c.rung.placement), c.n_threads) for c in selection.candidates]
    assert len(set(seen)) == len(seen)
    assert all(c.rung.fits and c.n_threads >= 1 for c in selection.candidates)
    chosen = plan_model(shape, hardware, OPTIONS).chosen
    # What the daemon would take is always among them.
    assert chosen is not None
    assert spot_of(chosen.placement) in {spot for spot, _ in seen}
