"""Reports a plan: as the JSON of `shimpy plan` and /api/plan, and in lines for people. Pure."""

from __future__ import annotations

from typing import Any

import msgspec

from shimpy.gguf.arch import ModelShape
from shimpy.placement.hardware import Hardware, UnusableGpu
from shimpy.placement.placement import DeviceUse, HostUse, Placement, Plan, PlanOptions, Rung
from shimpy.placement.planner import plan_model
from shimpy.placement.reasons import describe_lack, describe_layout, missing_bytes
from shimpy.units import format_bytes


class PlanReport(msgspec.Struct, frozen=True, kw_only=True):
    """A plan with what it was made from."""

    model: str
    shape: ModelShape
    hardware: Hardware
    plan: Plan

    @property
    def rung(self) -> Rung:
        """The rung that was chosen; where none fits, the one that lacks least."""
        return self.plan.chosen or min(self.plan.ladder, key=missing_bytes)


def plan_report(
    model: str, shape: ModelShape, hardware: Hardware, options: PlanOptions
) -> PlanReport:
    """Plan a model and return the report of it.

    Raises:
        InvalidOptionError: as `plan_model`.
    """
    plan = plan_model(shape, hardware, options)
    return PlanReport(model=model, shape=shape, hardware=hardware, plan=plan)


def plan_to_json(report: PlanReport) -> dict[str, Any]:
    """Return a report as JSON values; all sizes are bytes.

    Where nothing fits, the placement is the one that lacks least. `lines`, and `layout` and
    `lack` of each rung, say the same in words.
    """
    shape, plan = report.shape, report.plan
    return {
        "model": report.model,
        "fits": plan.chosen is not None,
        "reason": plan.reason,
        **_rung_parts(report.rung),
        "experts": {
            "n_expert": shape.n_expert,
            "n_expert_used": shape.n_expert_used,
            "n_expert_shared": shape.n_expert_shared,
            "tensors": shape.n_expert_tensors,
            "bytes": shape.expert_bytes,
        },
        "ladder": [
            {
                "fits": rung.fits,
                "chosen": rung is plan.chosen,
                "reason": rung.reason,
                "layout": describe_layout(shape, rung.placement),
                "lack": describe_lack(report.hardware, rung),
                **_rung_parts(rung),
            }
            for rung in plan.ladder
        ],
        "lines": plan_lines(report),
        "unusable_gpus": [
            {
                "description": card.description,
                "total_bytes": card.total_bytes,
                "reason": card.reason,
                "remedy": card.remedy,
            }
            for card in report.hardware.unusable
        ],
    }


def plan_lines(report: PlanReport) -> list[str]:
    """Return the choice and its figures in a few lines of text."""
    rung, shape = report.rung, report.shape
    lines = [_headline(report), f"why: {report.plan.reason}", _settings_line(rung.placement)]
    lines += [_device_line(device) for device in rung.devices]
    lines.append(_host_line(rung.host))
    lines.append(f"figures: {_SOURCES[rung.is_exact]}")
    if shape.is_moe:
        lines.append(
            f"experts: {shape.n_expert} of which {shape.n_expert_used} are used per token"
            f"{_shared(shape)}; {shape.n_expert_tensors} tensors, "
            f"{format_bytes(shape.expert_bytes)} of {format_bytes(shape.file_bytes)}"
        )
    return lines + [unusable_line(card) for card in report.hardware.unusable]


def figures_word(rung: Rung) -> str:
    """Return where a rung's bytes come from: "exact", llama.cpp's simulation, or "estimated"."""
    return "exact" if rung.is_exact else "estimated"


def forecast_line(report: PlanReport) -> str:
    """Return what to expect of a model that is not here yet, in one line.

    "10.1 GiB: will run with the experts of 27 layers in RAM: 1.9 GiB VRAM, 9.5 GiB RAM", or
    "41.4 GiB: can't run here".
    """
    rung, size = report.rung, format_bytes(report.shape.file_bytes)
    if not rung.fits:
        return f"{size}: can't run here"
    return f"{size}: will run {_manner(rung.placement)}: {_takes(rung)}"


def unusable_line(card: UnusableGpu) -> str:
    """Return what to know of a card that this build of llama.cpp can't use."""
    size = f" ({format_bytes(card.total_bytes)})" if card.total_bytes else ""
    return f"not used: {card.description}{size}: {card.reason}; to use it: {card.remedy}"


# Where a rung's bytes are from, by whether they are exact.
_SOURCES = {True: "exact, as llama.cpp itself simulates the load", False: "estimated by formulas"}


def _headline(report: PlanReport) -> str:
    """Return "10.1 GiB: experts of 27 layers in RAM: 1.9 GiB VRAM, 9.5 GiB RAM"."""
    rung = report.rung
    verdict = "" if rung.fits else "does not fit: "
    what = describe_layout(report.shape, rung.placement)
    return f"{format_bytes(report.shape.file_bytes)}: {verdict}{what}: {_takes(rung)}"


def _takes(rung: Rung) -> str:
    ram = f"{format_bytes(rung.host.total_bytes)} RAM"
    if not rung.devices:
        return ram
    vram = sum(device.total_bytes for device in rung.devices)
    return f"{format_bytes(vram)} VRAM, {ram}"


def _manner(placement: Placement) -> str:
    """Return how a model runs, in the words that follow "will run"."""
    gpus = " and ".join(placement.devices)
    n_moved = placement.moe_layers_in_ram
    experts = f"with the experts of {n_moved} layer{'' if n_moved == 1 else 's'} in RAM"
    match placement.mode:
        case "gpu":
            return f"wholly on {gpus}"
        case "experts-in-ram":
            return experts
        case "partial-gpu":
            on_gpu = max(0, placement.n_gpu_layers - 1)
            text = f"with {on_gpu} of {placement.n_layers} layers on {gpus}"
            return f"{text}, {experts}" if n_moved else text
        case "cpu":
            return "on the CPU alone"


def _settings_line(placement: Placement) -> str:
    of_slots = "shared by" if placement.kv_unified else "for each of"
    return (
        f"settings: context {placement.n_ctx} {of_slots} {placement.n_slots} slots, "
        f"KV cache {placement.kv_type}, micro-batch {placement.n_ubatch}, "
        f"weights in RAM {placement.held}"
    )


def _device_line(device: DeviceUse) -> str:
    kept = device.workspace_bytes + device.margin_bytes
    return (
        f"{device.name}: {_sum(device)} + context {format_bytes(device.overhead_bytes)} = "
        f"{format_bytes(device.total_bytes)} of {format_bytes(device.free_bytes)} free, of which "
        f"{format_bytes(kept)} stay so for heavy work and as a margin"
    )


def _host_line(host: HostUse) -> str:
    return (
        f"RAM: {_sum(host)} + process {format_bytes(host.overhead_bytes)} = "
        f"{format_bytes(host.total_bytes)} of {format_bytes(host.available_bytes)} available"
    )


def _sum(use: DeviceUse | HostUse) -> str:
    return (
        f"weights {format_bytes(use.weights_bytes)} + KV {format_bytes(use.kv_bytes)} + "
        f"compute {format_bytes(use.compute_bytes)}"
    )


def _shared(shape: ModelShape) -> str:
    return f" beside {shape.n_expert_shared} shared" if shape.n_expert_shared else ""


def _rung_parts(rung: Rung) -> dict[str, Any]:
    placement = rung.placement
    return {
        "figures": figures_word(rung),
        "placement": {
            "mode": placement.mode,
            "n_gpu_layers": placement.n_gpu_layers,
            "n_layers": placement.n_layers,
            "n_cpu_moe": placement.n_cpu_moe,
            "moe_layers_in_ram": placement.moe_layers_in_ram,
            "n_ctx": placement.n_ctx,
            "n_slots": placement.n_slots,
            "n_ubatch": placement.n_ubatch,
            "load_mode": placement.load_mode,
            "kv_type": placement.kv_type,
            "flash_attn": placement.flash_attn,
            "kv_unified": placement.kv_unified,
            "tensor_split": list(placement.tensor_split),
        },
        "devices": [
            {
                "name": device.name,
                "free_bytes": device.free_bytes,
                "weights_bytes": device.weights_bytes,
                "kv_bytes": device.kv_bytes,
                "compute_bytes": device.compute_bytes,
                "overhead_bytes": device.overhead_bytes,
                "workspace_bytes": device.workspace_bytes,
                "total_bytes": device.total_bytes,
            }
            for device in rung.devices
        ],
        "host": {
            "available_bytes": rung.host.available_bytes,
            "weights_bytes": rung.host.weights_bytes,
            "total_bytes": rung.host.total_bytes,
            "locked": rung.host.locked,
        },
    }
