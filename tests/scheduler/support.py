"""Models, a planner and a machine for the scheduler's tests, all of round numbers."""

from __future__ import annotations

from pathlib import Path

from msgspec.structs import replace

from shimpy.gguf.arch import LayerShape, ModelShape
from shimpy.names import parse_model_name
from shimpy.placement.hardware import Gpu, Hardware, Host
from shimpy.placement.placement import (
    DeviceUse,
    HostUse,
    Mode,
    Placement,
    Plan,
    PlanOptions,
    Rung,
)
from shimpy.registry.model import Model

MIB = 1024 * 1024
DEFAULT_N_CTX = 8192
N_SLOTS = 2


def make_shape(*, dense_mib: int = 100, expert_mib: int = 0, kv_bytes: int = 0) -> ModelShape:
    """A model of one layer; `kv_bytes` is what one token of context takes."""
    layer = LayerShape(
        index=0,
        dense_bytes=dense_mib * MIB,
        expert_bytes=expert_mib * MIB,
        n_expert_tensors=3 if expert_mib else 0,
        n_embd_k=kv_bytes,
        n_embd_v=0,
    )
    return ModelShape(
        arch="llama",
        title="test",
        quantization="F16",
        n_params=1,
        file_bytes=(dense_mib + expert_mib) * MIB,
        n_layer=1,
        n_ctx_train=131072,
        n_embd=64,
        n_vocab=512,
        n_head=1,
        n_ff=64,
        layers=(layer,),
        input_bytes=0,
        output_bytes=0,
    )


def make_model(
    name: str = "a", shape: ModelShape | None = None, *, path: Path | None = None, digest: str = ""
) -> Model:
    shape = shape or make_shape()
    return Model(
        name=parse_model_name(name),
        files=(path or Path(f"/models/{name}.gguf"),),
        size_bytes=shape.file_bytes,
        modified_s=0.0,
        digest=digest or name,
        source="test",
        shape=shape,
    )


def make_hardware(
    *, vram_mib: int | None = None, ram_mib: int = 10_000, n_cores: int = 4, others_mib: int = 0
) -> Hardware:
    """A machine with so much free memory, and with as much more that other programs hold."""
    gpus = ()
    if vram_mib is not None:
        gpu = Gpu(
            name="GPU0",
            description="test",
            backend="test",
            free_bytes=vram_mib * MIB,
            total_bytes=(vram_mib + others_mib) * MIB,
            overhead_bytes=0,
        )
        gpus = (gpu,)
    host = Host(
        total_bytes=(ram_mib + others_mib) * MIB,
        available_bytes=ram_mib * MIB,
        lockable_bytes=None,
        n_cores=n_cores,
    )
    return Hardware(gpus=gpus, unusable=(), host=host)


def taken(hardware: Hardware, *, vram: int = 0, ram: int = 0) -> Hardware:
    """The same machine with so many bytes less free."""
    gpus = tuple(replace(gpu, free_bytes=gpu.free_bytes - vram) for gpu in hardware.gpus)
    host = replace(hardware.host, available_bytes=hardware.host.available_bytes - ram)
    return replace(hardware, gpus=gpus, host=host)


def plan(
    shape: ModelShape, hardware: Hardware, options: PlanOptions, *, margin_mib: int = 0
) -> Plan:
    """A planner of three rungs: all on the GPU, experts in RAM, and all in RAM."""
    modes: tuple[Mode, ...] = ("gpu", "experts-in-ram", "cpu")
    if options.cpu_moe == "on" and shape.is_moe and hardware.gpus:
        modes = ("experts-in-ram", "cpu")
    rungs = tuple(
        _rung(shape, hardware, options, mode, margin_mib * MIB)
        for mode in modes
        if (mode == "cpu" or hardware.gpus) and (mode != "experts-in-ram" or shape.is_moe)
    )
    chosen = next((rung for rung in rungs if rung.fits), None)
    reason = chosen.reason if chosen else "; ".join(rung.reason for rung in rungs)
    return Plan(chosen=chosen, reason=reason, ladder=rungs)


def _rung(
    shape: ModelShape, hardware: Hardware, options: PlanOptions, mode: Mode, margin: int
) -> Rung:
    n_ctx = options.n_ctx or DEFAULT_N_CTX
    dense = sum(layer.dense_bytes for layer in shape.layers)
    kv = n_ctx * sum(layer.n_embd_k for layer in shape.layers)
    on_gpu, in_ram = {
        "gpu": (dense + shape.expert_bytes, 0),
        "experts-in-ram": (dense, shape.expert_bytes),
        "cpu": (0, dense + shape.expert_bytes),
    }[mode]
    devices = tuple(
        DeviceUse(
            name=gpu.name,
            free_bytes=gpu.free_bytes,
            weights_bytes=on_gpu,
            kv_bytes=kv,
            compute_bytes=0,
            overhead_bytes=0,
            margin_bytes=margin,
        )
        for gpu in (hardware.gpus if mode != "cpu" else ())
    )
    host = HostUse(
        available_bytes=hardware.host.available_bytes,
        weights_bytes=in_ram,
        kv_bytes=kv if mode == "cpu" else 0,
        compute_bytes=0,
        locked=True,
        margin_bytes=margin,
    )
    missing = [device.missing_bytes for device in devices] + [host.missing_bytes]
    placement = Placement(
        mode=mode,
        n_gpu_layers=0 if mode == "cpu" else 2,
        n_layers=1,
        n_cpu_moe=1 if mode == "experts-in-ram" else 0,
        moe_layers_in_ram=1 if mode == "experts-in-ram" else 0,
        n_ctx=n_ctx,
        n_slots=options.n_slots or N_SLOTS,
        n_ubatch=512,
        load_mode="locked",
        kv_type="f16",
        flash_attn=mode == "gpu",
        devices=tuple(device.name for device in devices),
    )
    return Rung(
        placement=placement,
        devices=devices,
        host=host,
        fits=not any(missing),
        reason=f"{mode} lacks {max(missing) // MIB} MiB" if any(missing) else f"{mode} fits",
    )
