"""Measured speeds against the ladder: when they decide, and when they do not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from shimpy.gguf.arch import ModelShape
from shimpy.placement.hardware import Hardware
from shimpy.placement.measured import Speed, plan_measured, shape_key, spot_of
from shimpy.placement.placement import Plan, PlanOptions
from shimpy.placement.planner import plan_model
from tests.placement.machines import MACHINES, MODELS, machine, model
from tests.placement.test_planner_properties import OPTIONS, SHARES, tight_machine

MOE = model()
# A card on which the experts of some layers, but not all, have to be in RAM.
CARD = machine(8)


def speed_at(
    n_cpu_moe: int, decode: float, *, hardware: Hardware = CARD, prefill: float = 1000.0
) -> Speed:
    """A speed of the experts of N layers in RAM, on a card where that fits or not."""
    wish = PlanOptions(n_gpu_layers=MOE.n_layer + 1, cpu_moe=n_cpu_moe or "off")
    plan = plan_model(MOE, hardware, wish)
    rung = plan.chosen or plan.ladder[0]
    return Speed(spot=spot_of(rung.placement), prefill_per_s=prefill, decode_per_s=decode)


def planned(*speeds: Speed, hardware: Hardware = CARD, options: PlanOptions | None = None) -> Plan:
    return plan_measured(plan_model, MOE, hardware, options or PlanOptions(), speeds)


def n_in_ram(plan: Plan) -> int:
    assert plan.chosen is not None
    return plan.chosen.placement.n_cpu_moe


LADDER = n_in_ram(plan_model(MOE, CARD))


def test_the_card_is_one_where_some_experts_must_be_in_ram() -> None:
    assert 2 < LADDER < MOE.n_layer - 4


def test_without_speeds_the_plan_is_the_planners() -> None:
    assert planned() == plan_model(MOE, CARD)


def test_the_fastest_that_was_measured_and_fits_is_taken_and_said() -> None:
    plan = planned(speed_at(LADDER, 50), speed_at(LADDER + 2, 61), speed_at(LADDER + 4, 55))
    assert n_in_ram(plan) == LADDER + 2
    assert plan.reason.startswith(f"measured: 61 tok/s with experts of {LADDER + 1} of 27")
    assert f"next 55 tok/s with experts of {LADDER + 3} of 27" in plan.reason
    assert plan.chosen in plan.ladder


def test_a_gain_within_the_noise_changes_nothing() -> None:
    plan = planned(speed_at(LADDER, 60), speed_at(LADDER + 2, 61))
    assert n_in_ram(plan) == LADDER
    faster = speed_at(LADDER + 2, 70)
    assert n_in_ram(planned(speed_at(LADDER, 60), faster)) == LADDER + 2
    noisy = replace(faster, noise=0.2)
    assert n_in_ram(planned(speed_at(LADDER, 60), noisy)) == LADDER
    assert plan.reason.startswith("measured: 60 tok/s")


def test_what_was_measured_but_does_not_fit_is_not_taken() -> None:
    assert n_in_ram(planned(speed_at(0, 400, hardware=machine(80)), speed_at(LADDER, 50))) == LADDER


def test_prefill_counts_too() -> None:
    """Half a second less for 512 tokens in is worth more than a little for 256 out."""
    slow, fast = speed_at(LADDER, 52, prefill=500), speed_at(LADDER + 2, 50, prefill=4000)
    assert n_in_ram(planned(slow, fast)) == LADDER + 2


def test_an_unmeasured_choice_stays_before_what_has_more_in_ram() -> None:
    assert n_in_ram(planned(speed_at(LADDER + 1, 61), speed_at(MOE.n_layer, 50))) == LADDER


@pytest.mark.parametrize(("less", "expected"), [(90, LADDER), (30, LADDER + 2)])
def test_an_unmeasured_choice_is_expected_between_its_neighbours(less: int, expected: int) -> None:
    """With less in RAM it was slower: then it is not the ladder's order that holds here."""
    other = speed_at(LADDER - 1, less, hardware=machine(80))
    assert n_in_ram(planned(other, speed_at(LADDER + 2, 61))) == expected


def test_a_faster_placement_with_a_shorter_context_is_not_taken() -> None:
    """One layer less in RAM would fit, if the context were halved."""
    faster = speed_at(LADDER - 1, 90, hardware=machine(80))
    wish = PlanOptions(n_gpu_layers=MOE.n_layer + 1, cpu_moe=LADDER - 1)
    by_ladder, shorter = plan_model(MOE, CARD).chosen, plan_model(MOE, CARD, wish).chosen
    assert by_ladder is not None
    assert shorter is not None
    assert shorter.placement.n_ctx < by_ladder.placement.n_ctx
    assert n_in_ram(planned(faster, speed_at(LADDER, 50))) == LADDER


def test_an_explicit_number_is_kept_to() -> None:
    speeds = (speed_at(LADDER, 50), speed_at(LADDER + 2, 90))
    asked = PlanOptions(cpu_moe=LADDER + 1)
    assert n_in_ram(planned(*speeds, options=asked)) == LADDER + 1


def test_fits_with_less_free_memory_are_found_by_what_was_measured() -> None:
    """Other programs have taken memory since: the fastest of what still fits."""
    speeds = (speed_at(LADDER, 80), speed_at(LADDER + 4, 61), speed_at(LADDER + 6, 70))
    less = machine(8 - 1.3)
    assert n_in_ram(plan_model(MOE, less)) == LADDER + 4
    assert n_in_ram(planned(*speeds, hardware=less)) == LADDER + 6


def test_on_a_cpu_attention_and_micro_batch_are_chosen() -> None:
    alone = machine(ram=64)
    usual = plan_model(MOE, alone).chosen
    assert usual is not None
    spot = spot_of(usual.placement)
    other = replace(spot, flash_attn=not spot.flash_attn, n_ubatch=128)
    speeds = [
        Speed(spot=spot, prefill_per_s=100, decode_per_s=10),
        Speed(spot=other, prefill_per_s=100, decode_per_s=15),
    ]
    plan = plan_measured(plan_model, MOE, alone, PlanOptions(), speeds)
    assert plan.chosen is not None
    assert spot_of(plan.chosen.placement) == other
    attention = "flash" if other.flash_attn else "plain"
    assert f"15 tok/s on the CPU alone, {attention} attention, micro-batch 128" in plan.reason


def test_another_precision_of_the_cache_is_nobodys_choice() -> None:
    spot = replace(speed_at(LADDER + 2, 1).spot, kv_type="q8_0")
    fast = Speed(spot=spot, prefill_per_s=9000, decode_per_s=900)
    assert n_in_ram(planned(speed_at(LADDER, 50), fast)) == LADDER
    asked = PlanOptions(kv_type="q8_0")
    assert n_in_ram(planned(fast, options=asked)) in {LADDER + 2, n_in_ram(planned(options=asked))}


def test_the_key_is_of_the_shape_and_not_of_the_words() -> None:
    assert shape_key(MOE) == shape_key(replace(MOE, title="tuned", chat_template="{{ x }}"))
    assert shape_key(MOE) != shape_key(replace(MOE, quantization="Q8_0"))
    assert shape_key(MOE) != shape_key(model(n_layer=27))


RATES = st.floats(0.1, 1e5)


@st.composite
def speeds_of(draw: st.DrawFn, shape: ModelShape) -> list[Speed]:
    """Speeds of placements that planners come to on machines of any size."""
    speeds = []
    for _ in range(draw(st.integers(0, 5))):
        hardware = tight_machine(shape, draw(SHARES), 2)
        plan = plan_model(shape, hardware, draw(OPTIONS))
        rung = draw(st.sampled_from(plan.ladder))
        speeds.append(
            Speed(
                spot=spot_of(rung.placement),
                prefill_per_s=draw(RATES),
                decode_per_s=draw(RATES),
            )
        )
    return list({speed.spot: speed for speed in speeds}.values())


@given(st.data(), MODELS, OPTIONS)
def test_a_measured_choice_fits_and_keeps_to_the_options(
    data: st.DataObject, shape: ModelShape, options: PlanOptions
) -> None:
    hardware = data.draw(MACHINES)
    speeds = data.draw(speeds_of(shape))
    by_ladder = plan_model(shape, hardware, options)
    plan = plan_measured(plan_model, shape, hardware, options, speeds)
    # Speeds make nothing fit, and nothing not fit.
    assert (plan.chosen is None) == (by_ladder.chosen is None)
    if plan.chosen is None or by_ladder.chosen is None:
        return
    assert plan.chosen.fits
    assert plan.chosen.placement.n_ctx >= by_ladder.chosen.placement.n_ctx
    assert plan.chosen.placement in [rung.placement for rung in plan.ladder]
    placement = plan.chosen.placement
    for name in ("n_ubatch", "load_mode", "kv_type"):
        if getattr(options, name) is not None:
            assert getattr(placement, name) == getattr(by_ladder.chosen.placement, name)
    if options.n_gpu_layers is not None and hardware.gpus:
        assert placement.n_gpu_layers == by_ladder.chosen.placement.n_gpu_layers
    if options.cpu_moe != "auto" and placement.mode == by_ladder.chosen.placement.mode:
        in_ram = by_ladder.chosen.placement.moe_layers_in_ram
        assert placement.moe_layers_in_ram == in_ram


@given(st.data(), MODELS)
def test_the_choice_is_never_one_that_was_measured_slower(
    data: st.DataObject, shape: ModelShape
) -> None:
    hardware = data.draw(MACHINES)
    speeds = {speed.spot: speed for speed in data.draw(speeds_of(shape))}
    by_ladder = plan_model(shape, hardware)
    plan = plan_measured(plan_model, shape, hardware, PlanOptions(), list(speeds.values()))
    if plan.chosen is None or by_ladder.chosen is None:
        return
    old, new = spot_of(by_ladder.chosen.placement), spot_of(plan.chosen.placement)
    if old in speeds and new in speeds:
        assert speeds[new].request_s <= speeds[old].request_s
    if new != old:
        assert new in speeds
