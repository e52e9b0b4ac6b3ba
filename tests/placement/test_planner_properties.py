"""What holds of every plan, whatever the model and the machine."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from shimpy.gguf.arch import ModelShape
from shimpy.placement.hardware import Hardware
from shimpy.placement.memory import Context, Layout, estimate_memory
from shimpy.placement.placement import Plan, PlanOptions, Rung
from shimpy.placement.planner import plan_model
from shimpy.units import GIB
from tests.placement.machines import MACHINES, MODELS, machine

RANKS = {"gpu": 0, "experts-in-ram": 1, "partial-gpu": 2, "cpu": 3}
CPU_MOE = st.one_of(st.sampled_from(["auto", "on", "off"]), st.integers(0, 45))
OPTIONS = st.builds(
    PlanOptions,
    n_ctx=st.sampled_from([None, 512, 4096, 20000]),
    n_slots=st.sampled_from([None, 1, 32]),
    kv_type=st.sampled_from([None, "q8_0"]),
    cpu_moe=CPU_MOE,
    n_gpu_layers=st.sampled_from([None, None, None, 0, 5, 99]),
    n_ubatch=st.sampled_from([None, 512]),
    load_mode=st.sampled_from([None, "mmap", "locked"]),
)
# Settings that leave only the layout to choose.
FIXED = PlanOptions(n_ctx=4096, n_slots=4, n_ubatch=512, load_mode="mmap", kv_type="f16")


# Of a model's size: so that every rung of the ladder comes up.
SHARES = st.floats(0, 1.2, allow_nan=False)


def tight_machine(shape: ModelShape, vram: float, ram: float) -> Hardware:
    """A machine about as large as the model; a card's first GiB goes to context and buffers."""
    size = shape.file_bytes / GIB
    return machine(1.2 + vram * size, ram=1 + ram * size)


def rank(plan: Plan) -> int:
    return len(RANKS) if plan.chosen is None else RANKS[plan.chosen.placement.mode]


def fits(shape: ModelShape, hardware: Hardware, n_gpu_layers: int, n_cpu_moe: int) -> bool:
    """Whether a layout fits, worked out without the planner."""
    n_gpus = 1 if n_gpu_layers else 0
    use = estimate_memory(
        shape,
        Layout(n_gpu_layers=n_gpu_layers, n_cpu_moe=n_cpu_moe, split=(1.0,) * n_gpus),
        Context(n_ctx=min(4096, 4 * shape.n_ctx_train), n_slots=4, n_ubatch=512),
    )
    for gpu, part in zip(hardware.gpus, use.gpus, strict=False):
        margin = (64 << 20) + part.compute_bytes // 10
        if part.total_bytes + gpu.overhead_bytes + margin > gpu.free_bytes:
            return False
    process = (96 << 20) + (256 << 20) * n_gpus + shape.n_vocab * 4 * 4
    host = use.host.total_bytes + process + (64 << 20)
    return host <= hardware.host.available_bytes


@given(MODELS, MACHINES, OPTIONS)
def test_nothing_chosen_is_over_any_device(
    shape: ModelShape, hardware: Hardware, options: PlanOptions
) -> None:
    """Each device and the RAM keep their margins; what is refused says who lacks something."""
    plan = plan_model(shape, hardware, options)
    for rung in plan.ladder:
        over = [use for use in (*rung.devices, rung.host) if use.missing_bytes]
        assert not (rung.fits and over)
        for device in rung.devices:
            if rung.fits:
                assert device.total_bytes + device.margin_bytes <= device.free_bytes
    if plan.chosen is None:
        assert "lacks" in plan.reason or "page-locked" in plan.reason
    else:
        host = plan.chosen.host
        assert host.total_bytes + host.margin_bytes <= hardware.host.available_bytes


@given(MODELS, MACHINES, OPTIONS)
def test_the_first_rung_that_fits_is_chosen(
    shape: ModelShape, hardware: Hardware, options: PlanOptions
) -> None:
    plan = plan_model(shape, hardware, options)
    assert plan.ladder
    assert plan.chosen == next((rung for rung in plan.ladder if rung.fits), None)
    ranks = [RANKS[rung.placement.mode] for rung in plan.ladder]
    assert ranks == sorted(ranks)


@given(MODELS, SHARES, SHARES, st.floats(0.3, 3), CPU_MOE)
def test_more_vram_never_gives_a_slower_mode(
    shape: ModelShape, one: float, other: float, ram: float, cpu_moe: int
) -> None:
    options = PlanOptions(cpu_moe=cpu_moe)
    less, more = sorted((one, other))
    with_more = plan_model(shape, tight_machine(shape, more, ram), options)
    assert rank(with_more) <= rank(plan_model(shape, tight_machine(shape, less, ram), options))


@given(MODELS, SHARES, st.floats(0.8, 3))
def test_the_fewest_experts_that_must_leave_do(shape: ModelShape, vram: float, ram: float) -> None:
    """No smaller N would have fitted the card with the same settings."""
    hardware = tight_machine(shape, vram, ram)
    chosen = plan_model(shape, hardware, FIXED).chosen
    if chosen is None or chosen.placement.mode != "experts-in-ram":
        return
    # Layers of no experts behind the last one that has some may be counted in or not.
    fewer = range(shape.moe_layers[chosen.placement.moe_layers_in_ram - 1] + 1)
    assert not any(fits(shape, hardware, shape.n_layer + 1, n) for n in fewer)


@given(MODELS, SHARES, st.floats(0.8, 3))
def test_the_most_layers_that_fit_stay(shape: ModelShape, vram: float, ram: float) -> None:
    """On the rung of fewer layers no larger number of them would have fitted."""
    hardware = tight_machine(shape, vram, ram)
    chosen = plan_model(shape, hardware, FIXED).chosen
    if chosen is None or chosen.placement.mode != "partial-gpu":
        return
    placement = chosen.placement
    more = range(placement.n_gpu_layers + 1, shape.n_layer + 1)
    assert not any(fits(shape, hardware, n, placement.n_cpu_moe) for n in more)


@given(MODELS, SHARES, st.floats(0, 1.3), st.booleans())
def test_it_refuses_only_what_fits_nowhere(
    shape: ModelShape, vram: float, ram: float, has_gpu: bool
) -> None:
    """Every layout that the ladder has a rung for is tried by brute force."""
    hardware = tight_machine(shape, vram, ram)
    if not has_gpu:
        hardware = replace(hardware, gpus=())
    plan = plan_model(shape, hardware, FIXED)
    n_all = shape.n_layer + 1
    layouts = [(0, 0)]
    if has_gpu:
        layouts += [(n_all, n) for n in range(n_all)]
        moved = shape.n_layer if shape.is_moe else 0
        layouts += [(n, moved) for n in range(2, n_all)]
    fitting = [layout for layout in layouts if fits(shape, hardware, *layout)]
    assert (plan.chosen is not None) == bool(fitting)


@given(MODELS, MACHINES, CPU_MOE)
def test_cpu_moe_is_kept_to(shape: ModelShape, hardware: Hardware, cpu_moe: int) -> None:
    """off: never; on: all; a number: just those layers."""
    for rung in plan_model(shape, hardware, PlanOptions(cpu_moe=cpu_moe)).ladder:
        n_cpu_moe = rung.placement.n_cpu_moe
        if cpu_moe == "off" or not shape.is_moe:
            assert n_cpu_moe == 0
            assert rung.placement.mode != "experts-in-ram"
        elif cpu_moe == "on":
            assert n_cpu_moe == shape.n_layer
        elif cpu_moe != "auto":
            assert n_cpu_moe == min(cpu_moe, shape.n_layer)
        assert rung.placement.moe_layers_in_ram == sum(i < n_cpu_moe for i in shape.moe_layers)


@given(MODELS, MACHINES, OPTIONS)
def test_the_parts_add_up(shape: ModelShape, hardware: Hardware, options: PlanOptions) -> None:
    """Every byte of weights is on one device, and totals are the sums of their parts."""
    for rung in plan_model(shape, hardware, options).ladder:
        weights = rung.host.weights_bytes + sum(use.weights_bytes for use in rung.devices)
        assert weights == shape.file_bytes
        for device in rung.devices:
            parts = device.weights_bytes + device.kv_bytes + device.compute_bytes
            assert device.total_bytes == parts + device.overhead_bytes
        assert_split_is_whole(rung)


def assert_split_is_whole(rung: Rung) -> None:
    placement = rung.placement
    assert placement.devices == tuple(use.name for use in rung.devices)
    if len(placement.devices) > 1:
        assert sum(placement.tensor_split) == placement.n_gpu_layers
        assert len(placement.tensor_split) == len(placement.devices)
    else:
        assert placement.tensor_split == ()
