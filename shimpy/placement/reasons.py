"""Says in words why a placement is as it is, or what it lacks. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from shimpy.gguf.arch import ModelShape
from shimpy.placement.defaults import KV_TYPE, N_UBATCH_STREAMED
from shimpy.placement.hardware import Hardware
from shimpy.placement.placement import DeviceUse, HostUse, Placement, PlanOptions, Rung
from shimpy.units import format_bytes

# Backends whose driver page-locks memory on its own account.
DRIVERS_THAT_LOCK: Final = frozenset(
    ("CUDA", "ROCm", "HIP", "MUSA", "SYCL", "Vulkan", "Metal", "MTL")
)


def describe_rung(shape: ModelShape, hardware: Hardware, options: PlanOptions, rung: Rung) -> str:
    """Return what speaks for a rung that fits, or what one that does not lacks."""
    what, lacks = describe_layout(shape, rung.placement), describe_lack(hardware, rung)
    if lacks:
        return f"{what}: {lacks}"
    if rung.placement.mode == "cpu":
        why = "mapped" if not rung.host.locked else "in private memory, as asked for"
        return f"{what}: {format_bytes(rung.host.total_bytes)} of RAM, {why}"
    parts = [what, *(_taken(device) for device in rung.devices)]
    if rung.placement.mode != "gpu":
        parts.append(_streamed(hardware, options, rung))
    if rung.devices and rung.placement.kv_type != (options.kv_type or KV_TYPE):
        parts.append(f"KV cache {rung.placement.kv_type}, since {KV_TYPE} does not fit")
    return "; ".join(parts)


def describe_choice(
    shape: ModelShape, options: PlanOptions, chosen: Rung | None, rungs: Sequence[Rung]
) -> str:
    """Return why a rung was chosen and the better ones were not; or why there is none."""
    if chosen is not None:
        above = [rung.reason for rung in rungs[: rungs.index(chosen)]]
        return f"{chosen.reason}. Better but too large: {above[0]}" if above else chosen.reason
    nearest = min(rungs, key=missing_bytes)
    advice = _advice(shape, options, nearest)
    return f"it fits nowhere; nearest is {nearest.reason}. To lower the need: {advice}"


def missing_bytes(rung: Rung) -> int:
    """Return what all devices together lack for a rung."""
    return rung.host.missing_bytes + sum(device.missing_bytes for device in rung.devices)


def lock_limit(hardware: Hardware, devices: Sequence[str]) -> int | None:
    """Return how many bytes may be page-locked for these devices; None: there is no limit.

    A driver that locks memory itself does not count it against RLIMIT_MEMLOCK: with a limit of
    64 KiB and no capabilities, cudaMallocHost gave 8 GiB, and VmLck stayed 0. Should a driver
    have less to give, llama.cpp goes on with pageable memory.
    """
    locks_itself = all(
        gpu.backend in DRIVERS_THAT_LOCK for gpu in hardware.gpus if gpu.name in devices
    )
    return None if locks_itself else hardware.host.lockable_bytes


def exceeds_lock_limit(hardware: Hardware, placement: Placement, host: HostUse) -> bool:
    """Whether more would be page-locked for a GPU than the process may lock."""
    limit = lock_limit(hardware, placement.devices)
    return host.locked and limit is not None and host.weights_bytes > limit


def describe_layout(shape: ModelShape, placement: Placement) -> str:
    """Return where the layers and experts of a placement are, in a few words."""
    n_moe = len(shape.moe_layers)
    gpus = " and ".join(placement.devices)
    if placement.tensor_split:
        shares = ", ".join(f"{share:.0f}" for share in placement.tensor_split)
        gpus += f" (layers {shares})"
    experts = ""
    if placement.moe_layers_in_ram:
        which = "all" if placement.moe_layers_in_ram == n_moe else placement.moe_layers_in_ram
        experts = f"experts of {which} of {n_moe} MoE layers in RAM"
        if which == "all":
            experts = "all experts in RAM"
    match placement.mode:
        case "gpu":
            text = f"all {placement.n_layers} layers on {gpus}"
            if placement.n_cpu_moe:
                text += f" (the first {placement.n_cpu_moe} have no experts to keep in RAM)"
            return text
        case "experts-in-ram":
            return f"{experts}, the rest on {gpus}"
        case "partial-gpu":
            on_gpu = max(0, placement.n_gpu_layers - 1)
            text = f"{on_gpu} of {placement.n_layers} layers on {gpus}"
            return f"{text}, {experts}" if experts else text
        case "cpu":
            return "on the CPU alone"


def _taken(device: DeviceUse) -> str:
    total, free = format_bytes(device.total_bytes), format_bytes(device.free_bytes)
    return f"{device.name} gives {total} of {free} free"


def _streamed(hardware: Hardware, options: PlanOptions, rung: Rung) -> str:
    """Return how the weights in RAM are held, and why so."""
    placement, host = rung.placement, rung.host
    held = format_bytes(host.weights_bytes)
    batch = f"micro-batch {placement.n_ubatch}"
    if options.n_ubatch is None and placement.n_ubatch < min(N_UBATCH_STREAMED, placement.n_ctx):
        batch += f" ({N_UBATCH_STREAMED} needs more VRAM)"
    if host.locked:
        return f"{held} of weights page-locked in RAM, from where the GPU reads fastest, {batch}"
    limit = lock_limit(hardware, placement.devices)
    if limit is not None and limit < host.weights_bytes:
        return f"{held} of weights mapped, {batch}: only {format_bytes(limit)} may be page-locked"
    return (
        f"{held} of weights mapped, {batch}: page-locked they would leave too little of "
        f"{format_bytes(host.available_bytes)} RAM"
    )


def describe_lack(hardware: Hardware, rung: Rung) -> str:
    """Return which devices lack how many bytes; empty: none does."""
    parts = [
        f"{device.name} lacks {format_bytes(device.missing_bytes)} "
        f"(needs {format_bytes(device.most_bytes + device.margin_bytes)}, "
        f"{format_bytes(device.free_bytes)} free)"
        for device in rung.devices
        if device.missing_bytes
    ]
    host = rung.host
    if host.missing_bytes:
        parts.append(
            f"the RAM lacks {format_bytes(host.missing_bytes)} "
            f"(needs {format_bytes(host.total_bytes + host.margin_bytes)}, "
            f"{format_bytes(host.available_bytes)} available)"
        )
    elif exceeds_lock_limit(hardware, rung.placement, host):
        limit = format_bytes(lock_limit(hardware, rung.placement.devices) or 0)
        parts.append(f"only {limit} may be page-locked (RLIMIT_MEMLOCK)")
    return ", ".join(parts)


def _advice(shape: ModelShape, options: PlanOptions, nearest: Rung) -> str:
    """Return the settings that would lower what the nearest rung needs, the strongest first."""
    placement = nearest.placement
    gpu_lacks = any(device.missing_bytes for device in nearest.devices)
    kv_bytes = nearest.host.kv_bytes + sum(device.kv_bytes for device in nearest.devices)
    advice = []
    if gpu_lacks and shape.is_moe and options.cpu_moe not in ("auto", "on"):
        advice.append("cpu_moe auto")
    if gpu_lacks and options.n_gpu_layers:
        advice.append(f"n_gpu_layers below {options.n_gpu_layers}, or none given")
    if kv_bytes and any(layer.state_bytes for layer in shape.layers):
        advice.append(f"n_slots below {placement.n_slots} ({format_bytes(kv_bytes)} of state)")
    elif kv_bytes:
        advice.append(
            f"n_ctx below {placement.n_ctx} (its KV cache takes {format_bytes(kv_bytes)})"
        )
        if placement.kv_type in ("f16", "bf16", "f32"):
            advice.append("kv_type q8_0")
    if options.n_ubatch:
        advice.append(f"n_ubatch below {options.n_ubatch}")
    advice.append("a smaller quantization of the model, or less memory used by others")
    return "; ".join(advice)
