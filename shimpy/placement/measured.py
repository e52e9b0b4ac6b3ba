"""Takes the fastest placement that was measured, where measurements say more than the ladder. Pure.

`shimpy bench` measures; what it found comes in as Speeds. The ladder's order is an expectation:
more on the GPU is faster. It holds until a measurement says otherwise:

1. Nothing was measured that may be used and fits now: the ladder's choice stays.
2. The ladder's choice was measured: another that fits is taken where it was faster by 5 % and
   by what the repetitions of both differed among themselves.
3. It was not, but placements with more and with less in RAM were: it is taken to be between
   them, since each layer in RAM costs about the same time for a token.
4. Only some with more in RAM were: it is no slower than those, and stays before them.
5. Else it stays, unless one with less in RAM was measured and fits.

A placement is as fast as its request_s: the time for a prompt of 512 tokens and an answer of
256, alone. It holds for every model of the same shape and quantization: what the weights say
changes nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Final

import msgspec
from msgspec.structs import replace

from shimpy.gguf.arch import ModelShape
from shimpy.placement.defaults import KV_TYPE
from shimpy.placement.figures import Setup
from shimpy.placement.hardware import Hardware
from shimpy.placement.placement import CpuMoe, Mode, Placement, Plan, PlanOptions, Rung
from shimpy.placement.reasons import describe_layout
from shimpy.protocol.messages import KvType, LoadMode
from shimpy.units import format_bytes

Planner = Callable[[ModelShape, Hardware, PlanOptions], Plan]

# The request that placements are compared by: tokens in and out.
N_PROMPT: Final = 512
N_ANSWER: Final = 256
# A gain of less is no reason to leave the ladder, besides the noise of measuring.
_LEAST_GAIN: Final = 0.05
_ORDER: Final[tuple[Mode, ...]] = ("gpu", "experts-in-ram", "partial-gpu", "cpu")


class Spot(msgspec.Struct, frozen=True, kw_only=True):
    """What of a placement decides its speed: all but the context and the slots."""

    mode: Mode
    n_gpu_layers: int
    n_cpu_moe: int
    n_ubatch: int
    load_mode: LoadMode
    kv_type: KvType
    flash_attn: bool
    n_devices: int


class Speed(msgspec.Struct, frozen=True, kw_only=True):
    """How fast a placement was, for one stream; rates in tokens per second."""

    spot: Spot
    prefill_per_s: float
    decode_per_s: float
    # How far repetitions differed from each other, as a part of the rate.
    noise: float = 0.0

    @property
    def request_s(self) -> float:
        """Seconds for a prompt of N_PROMPT tokens and an answer of N_ANSWER."""
        return N_PROMPT / self.prefill_per_s + N_ANSWER / self.decode_per_s


class _Candidate(msgspec.Struct, frozen=True):
    speed: Speed
    rung: Rung
    # What exact figures its own plan is in want of.
    doubts: tuple[Setup, ...] = ()


def spot_of(placement: Placement) -> Spot:
    """Return what of a placement decides its speed."""
    moves = placement.moe_layers_in_ram > 0
    return Spot(
        mode=placement.mode,
        n_gpu_layers=placement.n_gpu_layers,
        # On a model whose first layers are dense, 1 can move as little as 0.
        n_cpu_moe=placement.n_cpu_moe if moves and placement.devices else 0,
        n_ubatch=placement.n_ubatch,
        load_mode=placement.load_mode,
        kv_type=placement.kv_type,
        flash_attn=placement.flash_attn,
        n_devices=len(placement.devices),
    )


def shape_key(shape: ModelShape) -> str:
    """Return a name for all models whose placements are equally fast: 32 hex digits."""
    layers = [
        (layer.dense_bytes, layer.expert_bytes, layer.n_embd_k, layer.n_embd_v, layer.state_bytes)
        for layer in shape.layers
    ]
    facts = (
        shape.arch,
        shape.quantization,
        shape.file_bytes,
        shape.n_params,
        (shape.n_embd, shape.n_head, shape.n_ff, shape.n_vocab),
        (shape.n_expert, shape.n_expert_used, shape.n_expert_shared, shape.n_expert_ff),
        (shape.input_bytes, shape.output_bytes),
        layers,
    )
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]


def plan_measured(
    planner: Planner,
    shape: ModelShape,
    hardware: Hardware,
    options: PlanOptions,
    speeds: Sequence[Speed],
) -> Plan:
    """Return a plan that takes the fastest placement known, by the rules above.

    The rungs that were measured and fit are in its ladder, each where it belongs by how much it
    keeps on the GPU. Options that the user gave are kept to, and no KV cache becomes shorter
    or less precise.

    Raises:
        InvalidOptionError: as the planner.
    """
    plan = planner(shape, hardware, options)
    if plan.chosen is None or not speeds:
        return plan
    found = [
        candidate
        for candidate in _fitting(planner, shape, hardware, options, speeds)
        if _is_no_worse_cache(candidate.rung.placement, plan.chosen.placement)
    ]
    if not found:
        return plan
    found.sort(key=lambda candidate: candidate.speed.request_s)
    best, own = found[0], spot_of(plan.chosen.placement)
    if best.speed.spot == own or _stays(own, best.speed, speeds):
        known = next((c for c in found if c.speed.spot == own), None)
        if known is None:
            return plan
        reason = f"{_praise(shape, known, found)}. {plan.reason}"
        return replace(plan, reason=reason)
    chosen = replace(best.rung, reason=_praise(shape, best, found))
    reason = f"{chosen.reason}. By the ladder: {plan.chosen.reason}"
    return Plan(
        chosen=chosen, reason=reason, ladder=_insert(plan.ladder, chosen), doubts=best.doubts
    )


def _fitting(
    planner: Planner,
    shape: ModelShape,
    hardware: Hardware,
    options: PlanOptions,
    speeds: Sequence[Speed],
) -> list[_Candidate]:
    """Return what was measured, may be used and fits, weighed for this machine as it is now."""
    found = []
    for speed in speeds:
        wish = _options_for(shape, options, speed.spot)
        if wish is None:
            continue
        plan = planner(shape, hardware, wish)
        if plan.chosen is not None and spot_of(plan.chosen.placement) == speed.spot:
            found.append(_Candidate(speed, plan.chosen, plan.doubts))
    return found


def _is_no_worse_cache(placement: Placement, own: Placement) -> bool:
    """Whether a placement has as long a context as the ladder's choice, and as precise a cache."""
    return placement.n_ctx >= own.n_ctx and placement.kv_type in (own.kv_type, KV_TYPE)


def _options_for(shape: ModelShape, options: PlanOptions, spot: Spot) -> PlanOptions | None:
    """Return the options that lead to a measured placement; None: the user's forbid it."""
    cpu_moe: CpuMoe = spot.n_cpu_moe or "off"
    wanted = replace(
        options,
        n_gpu_layers=spot.n_gpu_layers,
        # On the CPU alone it changes nothing.
        cpu_moe=cpu_moe if spot.n_devices else options.cpu_moe,
        n_ubatch=spot.n_ubatch,
        load_mode=spot.load_mode,
        kv_type=spot.kv_type,
        flash_attn=spot.flash_attn,
    )
    for name in ("n_gpu_layers", "n_ubatch", "load_mode", "kv_type", "flash_attn"):
        if getattr(options, name) not in (None, getattr(wanted, name)):
            return None
    if options.cpu_moe == "auto" or not spot.n_devices:
        return wanted
    asked = {"on": shape.n_layer, "off": 0}.get(str(options.cpu_moe), options.cpu_moe)
    return wanted if _n_moved(shape, int(asked)) == _n_moved(shape, spot.n_cpu_moe) else None


def _n_moved(shape: ModelShape, n_cpu_moe: int) -> int:
    """Return how many layers' experts are moved by llama.cpp's --n-cpu-moe."""
    return sum(index < n_cpu_moe for index in shape.moe_layers)


def _stays(own: Spot, best: Speed, speeds: Sequence[Speed]) -> bool:
    """Whether the ladder's choice is expected to be no slower than the best that fits."""
    expected_s = _expected_s(own, speeds)
    if expected_s is not None:
        noise = best.noise + sum(speed.noise for speed in speeds if speed.spot == own)
        return expected_s <= best.request_s * (1 + _LEAST_GAIN + noise)
    return not (_is_on_line(best.spot, own) and _amount(best.spot) < _amount(own))


def _expected_s(own: Spot, speeds: Sequence[Speed]) -> float | None:
    """Return how long the request is expected to take on a placement; None: nothing is known."""
    points = [(_amount(s.spot), s.request_s) for s in speeds if _is_on_line(s.spot, own)]
    here = _amount(own)
    for speed in speeds:
        if speed.spot == own:
            return speed.request_s
    above = [point for point in points if point[0] > here]
    below = [point for point in points if point[0] < here]
    if not above:
        return None
    if not below:
        return min(seconds for _, seconds in above)
    (n_more, more_s), (n_less, less_s) = min(above), max(below)
    return less_s + (more_s - less_s) * (here - n_less) / (n_more - n_less)


def _is_on_line(spot: Spot, own: Spot) -> bool:
    """Whether two placements differ only in how many layers, or their experts, are in RAM."""
    if _line(spot) != _line(own):
        return False
    # With all on the GPU nothing is streamed from RAM, however it would be held there.
    if "gpu" in (spot.mode, own.mode):
        return True
    return (spot.load_mode, spot.n_ubatch) == (own.load_mode, own.n_ubatch)


def _line(spot: Spot) -> tuple[object, ...]:
    fixed = (spot.kv_type, spot.flash_attn, spot.n_devices)
    if spot.mode in ("gpu", "experts-in-ram"):
        return "experts", *fixed
    return spot.mode, spot.n_cpu_moe, *fixed


def _amount(spot: Spot) -> int:
    """Return how much is in RAM, growing: layers whose experts are, or that wholly are."""
    return -spot.n_gpu_layers if spot.mode == "partial-gpu" else spot.n_cpu_moe


def _insert(ladder: Sequence[Rung], chosen: Rung) -> tuple[Rung, ...]:
    """Return the ladder with a rung before the first that keeps less on the GPU."""
    rungs = [rung for rung in ladder if rung.placement != chosen.placement]
    rank = _rank(chosen)
    at = next((i for i, rung in enumerate(rungs) if _rank(rung) >= rank), len(rungs))
    return (*rungs[:at], chosen, *rungs[at:])


def _rank(rung: Rung) -> tuple[int, int, int]:
    placement = rung.placement
    return _ORDER.index(placement.mode), placement.moe_layers_in_ram, -placement.n_gpu_layers


def _praise(shape: ModelShape, taken: _Candidate, found: Sequence[_Candidate]) -> str:
    """Return "measured: 61 tok/s with experts of 12 ... in RAM, 4.1 GiB; next 55 with ..."."""
    text = f"measured: {_speed_text(shape, taken)}"
    second = next((other for other in found if other is not taken), None)
    return text if second is None else f"{text}; next {_speed_text(shape, second)}"


def _speed_text(shape: ModelShape, candidate: _Candidate) -> str:
    vram = sum(device.total_bytes for device in candidate.rung.devices)
    size = f", {format_bytes(vram)}" if vram else ""
    return f"{candidate.speed.decode_per_s:.3g} tok/s {_manner(shape, candidate.rung)}{size}"


def _manner(shape: ModelShape, rung: Rung) -> str:
    """Return a placement in words that tell it from the others that were measured."""
    placement = rung.placement
    layout = describe_layout(shape, placement)
    if placement.mode == "gpu":
        return f"with {layout}"
    batch = f"micro-batch {placement.n_ubatch}"
    if placement.mode == "cpu":
        attention = "flash" if placement.flash_attn else "plain"
        return f"{layout}, {attention} attention, {batch}"
    return f"with {layout}, {placement.held}, {batch}"
