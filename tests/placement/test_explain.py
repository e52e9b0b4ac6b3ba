"""What is told of a plan: JSON of a fixed shape, and lines for people."""

from __future__ import annotations

import json
from typing import Any

import pytest
from msgspec.structs import replace

from shimpy.placement.explain import plan_lines, plan_report, plan_to_json
from shimpy.placement.hardware import Hardware, UnusableGpu, suppose
from shimpy.placement.memory import MemoryModel
from shimpy.placement.placement import PlanOptions
from shimpy.placement.planner import plan_model
from shimpy.units import GIB
from tests.placement.machines import OVERHEAD_BYTES, machine, model

MOE = model()
PLACEMENT_KEYS = {
    "mode": str,
    "n_gpu_layers": int,
    "n_layers": int,
    "n_cpu_moe": int,
    "moe_layers_in_ram": int,
    "n_ctx": int,
    "n_slots": int,
    "n_ubatch": int,
    "load_mode": str,
    "kv_type": str,
    "flash_attn": bool,
    "kv_unified": bool,
    "tensor_split": list,
}
DEVICE_KEYS = [
    "name",
    "free_bytes",
    "weights_bytes",
    "kv_bytes",
    "compute_bytes",
    "overhead_bytes",
    "workspace_bytes",
    "total_bytes",
]
HOST_KEYS = ["available_bytes", "weights_bytes", "total_bytes", "locked"]


def as_json(hardware: Hardware, options: PlanOptions | None = None) -> dict[str, Any]:
    report = plan_report("deepseek:q4_k_m", MOE, hardware, options or PlanOptions())
    data: dict[str, Any] = json.loads(json.dumps(plan_to_json(report)))
    return data


def test_the_json_has_its_shape() -> None:
    data = as_json(machine(8))
    assert list(data) == [
        "model", "fits", "reason", "figures", "placement", "devices", "host", "experts", "ladder",
        "lines", "unusable_gpus",
    ]  # fmt: skip
    assert data["model"] == "deepseek:q4_k_m"
    assert data["fits"] is True
    assert {key: type(value) for key, value in data["placement"].items()} == PLACEMENT_KEYS
    assert [list(device) for device in data["devices"]] == [DEVICE_KEYS]
    assert list(data["host"]) == HOST_KEYS
    assert data["experts"] == {
        "n_expert": 64,
        "n_expert_used": 6,
        "n_expert_shared": 0,
        "tensors": 81,
        "bytes": MOE.expert_bytes,
    }
    for rung in data["ladder"]:
        assert list(rung) == [
            "fits", "chosen", "reason", "layout", "lack", "figures", "placement", "devices", "host",
        ]  # fmt: skip


def test_the_json_tells_the_chosen_rung() -> None:
    data = as_json(machine(8))
    chosen = next(rung for rung in data["ladder"] if rung["fits"])
    assert [rung for rung in data["ladder"] if rung["chosen"]] == [chosen]
    assert data["placement"] == chosen["placement"]
    assert data["devices"] == chosen["devices"]
    device = data["devices"][0]
    parts = ("weights_bytes", "kv_bytes", "compute_bytes", "overhead_bytes")
    assert device["total_bytes"] == sum(device[part] for part in parts)
    # The experts in RAM are page-locked, and the card keeps a table of their pages.
    page_table = data["host"]["weights_bytes"] // 512
    assert device["overhead_bytes"] == OVERHEAD_BYTES + page_table


def test_what_does_not_fit_is_told_with_its_nearest_placement() -> None:
    data = as_json(machine(ram=4))
    assert data["fits"] is False
    assert data["placement"]["mode"] == "cpu"
    assert data["host"]["total_bytes"] > data["host"]["available_bytes"]
    assert "To lower the need" in data["reason"]


def test_the_headline_has_the_sizes_that_count() -> None:
    report = plan_report("deepseek", MOE, machine(8), PlanOptions(cpu_moe="on", n_ctx=4096))
    assert plan_lines(report)[0] == (
        "10.2 GiB: all experts in RAM, the rest on CUDA0: 2.8 GiB VRAM, 9.7 GiB RAM"
    )


def test_each_device_has_a_line_that_adds_up() -> None:
    report = plan_report("deepseek", MOE, machine(8, 8), PlanOptions(n_ctx=4096))
    lines = plan_lines(report)
    assert [line.split(":")[0] for line in lines] == [
        "10.2 GiB", "why", "settings", "CUDA0", "CUDA1", "RAM", "figures", "experts",
    ]  # fmt: skip
    assert "layers" in lines[0]
    assert "of 8.0 GiB free" in lines[3]
    assert lines[3].endswith("stay so for heavy work and as a margin")


def test_it_is_told_whether_figures_are_exact() -> None:
    report = plan_report("deepseek", MOE, machine(8), PlanOptions(n_ctx=4096))
    assert "figures: estimated by formulas" in plan_lines(report)
    assert plan_to_json(report)["figures"] == "estimated"
    use = MemoryModel(MOE).estimate
    figures = {doubt: use(doubt.layout, doubt.context) for doubt in report.plan.doubts}
    plan = plan_model(MOE, machine(8), PlanOptions(n_ctx=4096), figures)
    exact = replace(report, plan=plan)
    assert "figures: exact, as llama.cpp itself simulates the load" in plan_lines(exact)
    assert plan_to_json(exact)["figures"] == "exact"
    assert plan.doubts == ()


def test_a_dense_model_has_no_line_on_experts() -> None:
    report = plan_report("llama", model(n_expert=0), machine(), PlanOptions())
    assert not any(line.startswith("experts") for line in plan_lines(report))


def test_cards_that_can_not_be_used_are_named() -> None:
    card = UnusableGpu(
        description="RTX 4090", total_bytes=24 * GIB, reason="no CUDA", remedy="pip install it"
    )
    hardware = replace(machine(), unusable=(card,))
    assert as_json(hardware)["unusable_gpus"][0]["remedy"] == "pip install it"
    report = plan_report("deepseek", MOE, hardware, PlanOptions())
    assert plan_lines(report)[-1] == (
        "not used: RTX 4090 (24.0 GiB): no CUDA; to use it: pip install it"
    )


@pytest.mark.parametrize("vram", [[], [8 * GIB], [8 * GIB, 4 * GIB]], ids=len)
def test_a_supposed_machine_has_the_memory_supposed(vram: list[int]) -> None:
    supposed = suppose(machine(80, ram=64), vram_bytes=vram, ram_bytes=16 * GIB)
    assert [gpu.free_bytes for gpu in supposed.gpus] == vram
    assert supposed.host.available_bytes == 16 * GIB


def test_what_is_not_supposed_is_as_it_is() -> None:
    actual = machine(80, ram=64)
    assert suppose(actual, vram_bytes=None, ram_bytes=None) == actual
    assert suppose(actual, vram_bytes=[], ram_bytes=None).host == actual.host
    assert suppose(actual, vram_bytes=None, ram_bytes=GIB).gpus == actual.gpus
