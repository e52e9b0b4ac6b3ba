"""shimpy's own routes: plans of models for this machine and for others."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from shimpy.units import GIB
from tests.server.harness import MACHINE, Running, running_app

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def app(
    tmp_path_factory: pytest.TempPathFactory, deepseek_model: Path
) -> AsyncIterator[Running]:
    folder = tmp_path_factory.mktemp("plan")
    shutil.copy(deepseek_model, folder / "deepseek.gguf")
    async with running_app(folder, folder, n_ctx=None, n_slots=None) as running:
        yield running


async def _plan(app: Running, **body: Any) -> dict[str, Any]:
    answer = await app.client.post("/api/plan", json={"model": "deepseek"} | body)
    assert answer.status_code == 200, answer.text
    plan: dict[str, Any] = answer.json()
    return plan


async def test_a_plan_for_this_machine(app: Running) -> None:
    plan = await _plan(app)
    assert plan["model"] == "deepseek:latest"
    assert plan["fits"] is True
    assert plan["placement"]["mode"] == "cpu"
    assert plan["host"]["available_bytes"] == MACHINE.host.available_bytes
    assert plan["experts"]["tensors"] > 0
    assert plan["ladder"]


async def test_a_plan_for_a_supposed_machine(app: Running) -> None:
    plan = await _plan(app, vram=["24GiB", 24 * GIB], ram="64GiB", n_ctx=128, cpu_moe="on")
    assert plan["placement"]["mode"] == "experts-in-ram"
    assert plan["placement"]["n_ctx"] >= 128
    assert plan["host"]["available_bytes"] == 64 * GIB
    for load_mode in ("mmap", "locked"):
        mapped = await _plan(app, vram="24GiB", ram="64GiB", cpu_moe="on", load_mode=load_mode)
        assert mapped["placement"]["load_mode"] == load_mode
    one_card = await _plan(app, vram="24GiB", cpu_moe=False)
    assert one_card["placement"]["mode"] == "gpu"
    assert [device["free_bytes"] for device in one_card["devices"]] == [24 * GIB]
    assert (await _plan(app, vram=[]))["placement"]["mode"] == "cpu"


async def test_what_does_not_fit_is_an_answer_too(app: Running) -> None:
    plan = await _plan(app, vram=[], ram="1MiB")
    assert plan["fits"] is False
    assert plan["reason"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"vram": "lots"}, "vram"),
        ({"ram": -1}, "ram"),
        ({"cpu_moe": "maybe"}, "cpu_moe"),
        ({"kv_type": "q3"}, "kv_type must be one of f32, f16,"),
        ({"load_mode": "disk"}, "load_mode must be one of mmap, locked, not 'disk'"),
        ({"n_ctx": "8k"}, "n_ctx"),
        ({"n_ctx": -8}, "n_ctx"),
        ({"vram": [True]}, "vram"),
    ],
)
async def test_what_cannot_be_supposed_is_named(
    app: Running, body: dict[str, Any], words: str
) -> None:
    answer = await app.client.post("/api/plan", json={"model": "deepseek"} | body)
    assert answer.status_code == 400, answer.text
    assert words in answer.json()["error"]


async def test_show_brings_the_plan(app: Running) -> None:
    shown = (await app.client.post("/api/show", json={"model": "deepseek"})).json()
    assert shown["plan"]["placement"]["mode"] == "cpu"
    assert shown["experts"]["n_expert"] > 1
