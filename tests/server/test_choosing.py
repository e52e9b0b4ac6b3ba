"""Which model is meant where none is named."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.scheduler.workshop import FAKE_ENGINE
from tests.server.harness import Running, running_app
from tests.synthetic import write_bert, write_chain, write_llama


@asynccontextmanager
async def _app(folder: Path, *names: str, **settings: Any) -> AsyncIterator[Running]:
    makers = {"chain": write_chain, "llama": write_llama, "bert": write_bert}
    for name in names:
        makers[name.partition("-")[0]](folder / f"{name}.gguf")
    async with running_app(folder, folder, engine_argv=FAKE_ENGINE, **settings) as running:
        yield running


async def _served_by(app: Running) -> str:
    answer = await _ask(app)
    assert answer.status_code == 200, answer.text
    model: str = answer.json()["model"]
    return model


async def _ask(app: Running) -> httpx.Response:
    return await app.client.post("/completion", json={"prompt": "x", "n_predict": 1})


async def _load(app: Running, name: str) -> None:
    assert (await app.client.post("/api/generate", json={"model": name})).status_code == 200


async def test_the_only_model_that_can_is_meant(tmp_path: Path) -> None:
    async with _app(tmp_path, "chain", "bert") as app:
        assert await _served_by(app) == "chain:latest"


async def test_the_only_loaded_one_is_meant(tmp_path: Path) -> None:
    async with _app(tmp_path, "chain-a", "chain-b", default_model="chain-b") as app:
        await _load(app, "chain-a")
        assert await _served_by(app) == "chain-a:latest"
        await _load(app, "chain-b")
        assert await _served_by(app) == "chain-b:latest"


async def test_the_default_is_meant_where_none_is_loaded(tmp_path: Path) -> None:
    async with _app(tmp_path, "chain-a", "chain-b", default_model="chain-b") as app:
        assert await _served_by(app) == "chain-b:latest"


@pytest.mark.parametrize("default", ["", "nix", "bert"])
async def test_several_that_could_be_meant_are_listed(tmp_path: Path, default: str) -> None:
    async with _app(tmp_path, "chain-a", "chain-b", "bert", default_model=default) as app:
        answer = await _ask(app)
        assert answer.status_code == 400
        message = answer.json()["error"]["message"]
        assert "chain-a:latest, chain-b:latest" in message
        listed, _, advice = message.partition(";")
        assert "bert" not in listed
        assert advice.endswith(
            f"default_model, which is {default!r}" if default else "default_model"
        )
        await _load(app, "chain-a")
        await _load(app, "chain-b")
        assert "2 loaded models" in (await _ask(app)).json()["error"]["message"]


async def test_there_may_be_none_that_can(tmp_path: Path) -> None:
    async with _app(tmp_path, "bert") as app:
        answer = await _ask(app)
        assert answer.status_code == 404
        assert "generate text" in answer.json()["error"]["message"]
        gap = await app.client.post("/infill", json={})
        assert "fill gaps" in gap.json()["error"]["message"]
