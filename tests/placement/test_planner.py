"""Plans for machines that people have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from msgspec.structs import replace

from shimpy.errors import InvalidOptionError
from shimpy.gguf.arch import ModelShape
from shimpy.placement.hardware import Hardware
from shimpy.placement.memory import Context, kv_layer_bytes
from shimpy.placement.placement import Plan, PlanOptions, Rung
from shimpy.placement.planner import plan_model
from shimpy.units import GIB, MIB
from tests.placement.machines import machine, model

# 27 MoE layers of 350 MiB, a dense one, and 970 MiB of all else: 10.2 GiB, like DeepSeek 16B.
MOE = model()
DENSE = model(n_expert=0, dense_mib=200, n_ctx_train=131072)


def chosen(plan: Plan) -> Rung:
    assert plan.chosen is not None, plan.reason
    return plan.chosen


@pytest.mark.parametrize(
    ("vram", "mode"),
    [(24, "gpu"), (8, "experts-in-ram"), (2.2, "partial-gpu"), (0.5, "cpu"), (None, "cpu")],
)
def test_the_ladder_goes_down_with_the_vram(vram: float | None, mode: str) -> None:
    hardware = machine(*([] if vram is None else [vram]))
    assert chosen(plan_model(MOE, hardware)).placement.mode == mode


def test_experts_in_ram_are_locked_and_used_by_many_tokens_at_once() -> None:
    """12 to 21 times the prefill of a mapped file and a micro-batch of 512."""
    placement = chosen(plan_model(MOE, machine(8))).placement
    assert (placement.load_mode, placement.n_ubatch) == ("locked", 2048)


def test_experts_are_mapped_where_locking_them_would_fill_the_ram() -> None:
    """Locked pages can't be taken back: a sixteenth of the RAM must stay free beside them."""
    roomy = chosen(plan_model(MOE, machine(8, ram=16), PlanOptions(cpu_moe="on")))
    tight = chosen(plan_model(MOE, machine(8, ram=10.2), PlanOptions(cpu_moe="on")))
    assert roomy.host.locked
    assert not tight.host.locked
    assert "page-locked they would leave too little" in tight.reason


def test_the_lock_limit_does_not_bind_a_driver_that_locks_itself() -> None:
    """Debian's default of 8 MiB would cost every CUDA host its prefill, for nothing."""
    rung = chosen(plan_model(MOE, machine(8, lockable_bytes=8 * MIB)))
    assert rung.placement.load_mode == "locked"


def test_experts_are_mapped_where_the_process_may_not_lock_them() -> None:
    hardware = machine(8, lockable_bytes=8 * MIB)
    other = replace(hardware, gpus=(replace(hardware.gpus[0], backend="NPU"),))
    rung = chosen(plan_model(MOE, other))
    assert rung.placement.load_mode == "mmap"
    assert "only 8.0 MiB may be page-locked" in rung.reason
    asked = plan_model(MOE, other, PlanOptions(load_mode="locked", cpu_moe="on"))
    assert "RLIMIT_MEMLOCK" in asked.ladder[0].reason


def test_a_smaller_micro_batch_is_taken_where_a_large_one_lacks_room() -> None:
    """Between the needs of 512 and of 2048 tokens with all experts in RAM."""
    options = PlanOptions(cpu_moe="on", n_ctx=4096)
    needed = {
        n: plan_model(MOE, machine(24), replace(options, n_ubatch=n)).ladder[0].devices[0]
        for n in (512, 2048)
    }
    sizes = {n: use.total_bytes + use.margin_bytes for n, use in needed.items()}
    between = (sizes[512] + sizes[2048]) / 2 / GIB
    placement = chosen(plan_model(MOE, machine(between), options)).placement
    assert (placement.mode, placement.n_ubatch) == ("experts-in-ram", 512)
    assert placement.load_mode == "locked"


def test_on_a_cpu_the_file_is_mapped() -> None:
    """Mapped pages are shared between loads and can be dropped."""
    rung = chosen(plan_model(MOE, machine()))
    assert not rung.host.locked
    assert rung.devices == ()
    assert rung.placement.n_ubatch == 512


def test_one_card_is_preferred_to_two() -> None:
    placement = chosen(plan_model(MOE, machine(12, 24))).placement
    assert placement.devices == ("CUDA1",)
    assert placement.tensor_split == ()


def test_a_model_is_spread_before_its_experts_leave() -> None:
    """Two cards of 8 GiB hold 10 GiB."""
    rung = chosen(plan_model(MOE, machine(8, 8)))
    assert rung.placement.mode == "gpu"
    assert rung.placement.devices == ("CUDA0", "CUDA1")
    assert sum(rung.placement.tensor_split) == 29


def test_unequal_cards_get_unequal_shares() -> None:
    """The larger card takes more layers, neither takes more than it has."""
    rung = chosen(plan_model(MOE, machine(4.5, 9)))
    first, second = rung.placement.tensor_split
    assert rung.placement.mode == "gpu"
    assert second > 1.5 * first


def test_shared_memory_gains_nothing_by_moving_experts() -> None:
    """On Apple or an integrated GPU the RAM is the VRAM: the total counts once against it."""
    plan = plan_model(MOE, machine(32, ram=16, is_shared=True))
    assert chosen(plan).placement.mode == "gpu"
    assert all(rung.placement.mode != "experts-in-ram" for rung in plan.ladder)
    assert plan_model(MOE, machine(32, ram=8, is_shared=True)).chosen is None


def test_a_card_of_its_own_memory_is_preferred_to_a_shared_one() -> None:
    hardware = machine(32, 16)
    integrated = replace(hardware.gpus[0], is_shared=True, overhead_bytes=0)
    mixed = replace(hardware, gpus=(integrated, hardware.gpus[1]))
    assert chosen(plan_model(MOE, mixed)).placement.devices == ("CUDA1",)


# --- options --------------------------------------------------------------------------------


def test_cpu_moe_off_gives_up_layers_instead() -> None:
    placement = chosen(plan_model(MOE, machine(8), PlanOptions(cpu_moe="off"))).placement
    assert placement.mode == "partial-gpu"
    assert placement.n_cpu_moe == 0


def test_the_experts_of_one_layer_may_be_none() -> None:
    """DeepSeek's first layer is dense: N=1 moves nothing, and the reason says so."""
    rung = chosen(plan_model(MOE, machine(24), PlanOptions(cpu_moe=1)))
    assert rung.placement.mode == "gpu"
    assert (rung.placement.n_cpu_moe, rung.placement.moe_layers_in_ram) == (1, 0)
    assert "have no experts" in rung.reason


def test_cpu_moe_is_kept_on_a_host_without_gpu() -> None:
    """So that llama.cpp's own log shows the override that was asked for."""
    placement = chosen(plan_model(MOE, machine(), PlanOptions(cpu_moe="on"))).placement
    assert (placement.mode, placement.n_cpu_moe, placement.moe_layers_in_ram) == ("cpu", 28, 27)


def test_layers_asked_for_are_ignored_where_there_is_no_gpu() -> None:
    """Clients send num_gpu 99 to any host."""
    assert chosen(plan_model(MOE, machine(), PlanOptions(n_gpu_layers=99))).placement.mode == "cpu"


def test_layers_asked_for_are_kept_to() -> None:
    rung = chosen(plan_model(DENSE, machine(24), PlanOptions(n_gpu_layers=10)))
    assert (rung.placement.mode, rung.placement.n_gpu_layers) == ("partial-gpu", 10)
    off = chosen(plan_model(DENSE, machine(24), PlanOptions(n_gpu_layers=0)))
    assert (off.placement.mode, off.placement.devices) == ("cpu", ())


def test_too_many_layers_asked_for_are_refused_by_name() -> None:
    plan = plan_model(DENSE, machine(3), PlanOptions(n_gpu_layers=29))
    assert plan.chosen is None
    assert "CUDA0 lacks" in plan.reason
    assert "n_gpu_layers below 29" in plan.reason


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (PlanOptions(n_ctx=0), "n_ctx"),
        (PlanOptions(n_slots=0), "n_slots"),
        (PlanOptions(n_slots=257), "n_slots"),
        (PlanOptions(n_ubatch=0), "n_ubatch"),
        (PlanOptions(n_gpu_layers=-1), "n_gpu_layers"),
        (PlanOptions(cpu_moe=-1), "cpu_moe"),
    ],
    ids=str,
)
def test_an_option_out_of_range_is_an_error_of_its_name(options: PlanOptions, word: str) -> None:
    with pytest.raises(InvalidOptionError, match=word) as caught:
        plan_model(MOE, machine(), options)
    assert caught.value.option == word


def test_a_quantized_cache_needs_heads_of_whole_blocks() -> None:
    """llama.cpp refuses to make such a context; 80 is Phi-2's head."""
    narrow = replace(DENSE, n_embd_head=80)
    with pytest.raises(InvalidOptionError, match="80 wide"):
        plan_model(narrow, machine(), PlanOptions(kv_type="q8_0"))
    assert plan_model(narrow, machine()).chosen is not None


# --- refusals -------------------------------------------------------------------------------


def test_a_refusal_names_the_device_the_bytes_and_the_setting() -> None:
    plan = plan_model(MOE, machine(ram=9))
    assert plan.chosen is None
    assert "the RAM lacks 2.3 GiB" in plan.reason
    assert "9.0 GiB available" in plan.reason
    assert "n_ctx below" in plan.reason


def test_a_mapped_model_larger_than_the_ram_is_refused() -> None:
    """It would be read from the disk for every token."""
    assert plan_model(model(expert_mib=1000), machine(ram=24)).chosen is None


# --- defaults -------------------------------------------------------------------------------


def test_the_context_is_a_budget_for_all_slots() -> None:
    """16 slots of 1024 tokens, though the model was trained for 4096."""
    placement = chosen(plan_model(MOE, machine(24))).placement
    assert (placement.n_slots, placement.n_ctx) == (16, 16384)


def test_the_context_grows_where_vram_is_plentiful() -> None:
    assert chosen(plan_model(DENSE, machine(80))).placement.n_ctx == 32768
    assert chosen(plan_model(DENSE, machine(12))).placement.n_ctx == 16384


def test_the_context_shrinks_before_the_mode_does() -> None:
    """12.4 GiB hold the weights with 4096 tokens, not with 16384."""
    placement = chosen(plan_model(MOE, machine(12.4))).placement
    assert (placement.mode, placement.n_ctx) == ("gpu", 4096)


def test_a_context_that_was_asked_for_is_kept() -> None:
    options = PlanOptions(n_ctx=8192, kv_type="f16")
    placement = chosen(plan_model(MOE, machine(12.4), options)).placement
    assert (placement.mode, placement.n_ctx) == ("experts-in-ram", 8192)


def test_a_smaller_kv_cache_comes_before_a_slower_placement() -> None:
    """At 8192 tokens q8_0 takes 840 MiB less: on 12.4 GiB all layers stay on the card."""
    plan = plan_model(MOE, machine(12.4), PlanOptions(n_ctx=8192))
    placement = chosen(plan).placement
    assert (placement.mode, placement.n_ctx, placement.kv_type) == ("gpu", 8192, "q8_0")
    assert "KV cache q8_0, since f16 does not fit" in plan.reason
    assert chosen(plan_model(MOE, machine(14), PlanOptions(n_ctx=8192))).placement.kv_type == "f16"


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda s: replace(s, n_embd_head=96), id="odd-heads"),
        pytest.param(lambda s: replace(s, is_mla=True), id="latent"),
        pytest.param(lambda s: replace(s, is_embedding=True), id="embeds"),
    ],
)
def test_a_kv_cache_stays_as_it_is_where_it_may_not_be_readable(
    change: Callable[[ModelShape], ModelShape],
) -> None:
    for vram in (2, 3, 4, 8, 12):
        plan = plan_model(change(MOE), machine(vram))
        assert {rung.placement.kv_type for rung in plan.ladder} == {"f16"}


def test_two_cards_come_before_a_smaller_kv_cache() -> None:
    placement = chosen(plan_model(MOE, machine(12.4, 8), PlanOptions(n_ctx=8192))).placement
    assert (placement.mode, placement.kv_type) == ("gpu", "f16")
    assert len(placement.devices) == 2


def test_a_small_micro_batch_is_explained() -> None:
    """All experts in RAM on a card that has too little for the larger buffer beside them."""
    big = model(expert_mib=3000)
    for hundredths in range(200, 420, 5):
        plan = plan_model(big, machine(hundredths / 100, ram=120))
        rung = chosen(plan)
        is_small = rung.placement.mode not in {"gpu", "cpu"} and rung.placement.n_ubatch == 512
        assert ("512 (2048 needs more VRAM)" in rung.reason) == is_small


def slots_of(shape: ModelShape, hardware: Hardware, **options: Any) -> tuple[int, int, bool]:
    """Return the slots, their context, and whether they share it."""
    placement = chosen(plan_model(shape, hardware, PlanOptions(**options))).placement
    return placement.n_slots, placement.n_ctx, placement.kv_unified


def test_a_cpu_serves_fewer_at_once_and_each_slot_has_its_own_cells() -> None:
    """As many as are asked for, in an eighth of the RAM that the weights leave; else they share."""
    context = Context(n_ctx=4096, n_slots=1, n_ubatch=512, flash_attn=False)
    kv_bytes = sum(kv_layer_bytes(MOE, context))
    nine = machine(ram=(MOE.file_bytes + 8 * 9 * kv_bytes) / GIB)
    assert slots_of(MOE, nine, n_slots=9) == (9, 4096, False)
    assert slots_of(MOE, nine, n_slots=10) == (10, 10240, True)
    assert slots_of(MOE, nine, n_ctx=1000, n_slots=1) == (1, 1000, True)


@pytest.mark.parametrize(("n_fitting", "found"), [(8, (8, False)), (4, (4, False)), (3, (8, True))])
def test_four_slots_with_cells_of_their_own_are_better_than_none(
    n_fitting: int, found: tuple[int, bool]
) -> None:
    context = Context(n_ctx=8192, n_slots=1, n_ubatch=512, flash_attn=False)
    kv_bytes = sum(kv_layer_bytes(DENSE, context))
    ram = (DENSE.file_bytes + 8 * (n_fitting + 0.5) * kv_bytes) / GIB
    assert slots_of(DENSE, machine(ram=ram)) == (found[0], 8192, found[1])


def test_slots_share_their_cells_where_those_of_one_cannot_be_copied_to_another() -> None:
    """On a GPU, with flash attention, with sliding windows and with states."""
    cpu, gpu = machine(ram=1000), machine(80, ram=1000)
    assert not slots_of(MOE, cpu, n_slots=4)[2]
    assert not slots_of(MOE, cpu, n_slots=4, flash_attn=False)[2]
    assert slots_of(MOE, cpu, n_slots=4, flash_attn=True)[2]
    assert slots_of(MOE, gpu, n_slots=4)[2]
    assert slots_of(MOE, gpu, n_slots=4, flash_attn=False)[2]
    assert slots_of(model(n_expert=0, state_bytes=400_000), cpu, n_slots=4)[2]
    assert slots_of(replace(MOE, n_swa=512), cpu, n_slots=4)[2]


def test_each_slot_of_a_recurrent_model_costs_its_state() -> None:
    recurrent = model(n_expert=0, state_bytes=400_000)
    assert chosen(plan_model(recurrent, machine(80))).placement.n_slots == 8
    assert chosen(plan_model(recurrent, machine())).placement.n_slots == 4


def test_an_encoder_gets_a_micro_batch_for_whole_texts() -> None:
    """BERT aborts on a text that is longer than the micro-batch."""
    layers = tuple(replace(layer, n_embd_k=0, n_embd_v=0) for layer in DENSE.layers)
    bert = replace(DENSE, is_embedding=True, n_ctx_train=512, layers=layers)
    placement = chosen(plan_model(bert, machine(8))).placement
    assert placement.n_ubatch == placement.n_ctx == 2048
    long = replace(bert, n_ctx_train=8192)
    placement = chosen(plan_model(long, machine(8))).placement
    assert placement.n_ubatch == placement.n_ctx == 8192


def test_a_fallback_of_fewer_experts_on_the_gpu_follows_the_choice() -> None:
    """Where a forecast was too tight the next rung gives back a good deal, not everything."""
    plan = plan_model(MOE, machine(8))
    at = plan.ladder.index(chosen(plan))
    taken, following = (rung.placement.n_cpu_moe for rung in plan.ladder[at : at + 2])
    assert taken < following < 28


def test_a_long_micro_batch_is_taken_where_it_is_small_beside_the_vram() -> None:
    found = [chosen(plan_model(model(), machine(gib))).placement for gib in (12, 16)]
    assert [(p.mode, p.n_ubatch) for p in found] == [("gpu", 512), ("gpu", 2048)]
    asked = plan_model(model(), machine(16), PlanOptions(n_ubatch=256))
    assert chosen(asked).placement.n_ubatch == 256
