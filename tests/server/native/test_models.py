"""The older native form's routes: load and unload that do so, health and a diagnosis."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

import shimpy
from shimpy.config import Config
from shimpy.placement.placement import PlanOptions
from shimpy.server.native import diagnosis
from tests.fake_engine import Script
from tests.scheduler.workshop import FAKE_ENGINE
from tests.server.harness import Running, running_app
from tests.synthetic import write_chain

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def app(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    folder: Path = tmp_path_factory.mktemp("native")
    write_chain(folder / "chain.gguf")
    write_chain(folder / "other-Q8_0.gguf")
    (folder / "broken.gguf").write_bytes(b"<!doctype html>")
    async with running_app(folder, tmp_path_factory.mktemp("state")) as running:
        yield running


async def _post(app: Running, path: str, **body: Any) -> dict[str, Any]:
    answer = await app.client.post(path, json=body) if body else await app.client.post(path)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def _loaded(app: Running) -> set[str]:
    answer = await app.client.get("/api/ps")
    return {model["name"] for model in answer.json()["models"]}


async def test_load_and_unload_do_so(app: Running) -> None:
    loaded = await _post(app, "/api/models/chain/load")
    assert (loaded["status"], loaded["model"]) == ("loaded", "chain:latest")
    assert "chain:latest" in await _loaded(app)
    status = (await app.client.get("/api/models/chain/status")).json()
    assert (status["loaded"], status["status"]) == (True, "ready")
    pid = status["pid"]
    unloaded = await _post(app, "/api/models/chain/unload")
    assert unloaded["status"] == "unloaded"
    assert "chain:latest" not in await _loaded(app)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    again = await _post(app, "/api/models/chain:latest/unload")
    assert again["status"] == "not loaded"
    status = (await app.client.get("/api/models/chain/status")).json()
    assert status == {"status": "not loaded", "loaded": False, "model": "chain:latest"}


async def test_what_is_loaded_can_be_unloaded_though_its_file_has_gone(app: Running) -> None:
    models = (await app.client.get("/api/models")).json()["models"]
    path = next(Path(model["path"]) for model in models if model["name"] == "other:q8_0")
    copy = path.with_name("gone-Q8_0.gguf")
    write_chain(copy)
    await _post(app, "/api/models/gone/load", keep_alive=-1)
    copy.unlink()
    assert (await app.client.post("/api/models/gone:f16/unload")).status_code == 404
    status = (await app.client.get("/api/models/gone/status")).json()
    assert (status["loaded"], status["model"]) == (True, "gone:q8_0")
    assert (await _post(app, "/api/models/gone/unload"))["status"] == "unloaded"
    assert "gone:q8_0" not in await _loaded(app)
    assert (await app.client.post("/api/models/gone/unload")).status_code == 404


async def test_load_takes_ollamas_options(app: Running) -> None:
    loaded = await _post(
        app, "/api/models/other:q8_0/load", keep_alive=-1, options={"num_ctx": 512}
    )
    assert loaded["context_length"] == 512
    assert int(loaded["expires_at"][:4]) > 2300
    await _post(app, "/api/models/other:q8_0/unload")


async def test_a_model_that_works_is_unloaded_later(
    app: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shimpy.server.native.models.UNLOAD_WAIT_S", 0.0)
    registry, scheduler = app.services.registry, app.services.scheduler
    model = await registry.resolve("chain")
    async with scheduler.acquire(model, PlanOptions()):
        assert (await _post(app, "/api/models/chain/unload"))["status"] == "unloading"
    await scheduler.wait_unloaded("chain:latest")
    assert "chain:latest" not in await _loaded(app)


async def test_a_pinned_model_is_not_let_go(app: Running) -> None:
    pinned = await _post(app, "/api/models/chain/pin")
    assert (pinned["model"], pinned["pinned"]) == ("chain:latest", True)
    loaded = await _post(app, "/api/models/chain/load", keep_alive="1ms")
    assert loaded["pinned"] is True
    assert int(loaded["expires_at"][:4]) > 2300
    assert (await _post(app, "/api/models/chain/pin"))["loaded"] is True
    unpinned = await _post(app, "/api/models/chain/unpin")
    assert unpinned["pinned"] is False
    await app.services.scheduler.wait_unloaded("chain:latest")
    assert "chain:latest" not in await _loaded(app)


async def test_ps_says_why_models_are_not_loaded(tmp_path: Path) -> None:
    """The last to leave with the reason; those held back with what they died of."""
    write_chain(tmp_path / "chain.gguf")
    bad = write_chain(tmp_path / "bad.gguf")
    Script(dies_on_submit="abort").save(bad)
    async with running_app(tmp_path, tmp_path, engine_argv=FAKE_ENGINE) as app:
        await _post(app, "/api/models/chain/load")
        await _post(app, "/api/models/chain/unload")
        for _ in range(3):
            failed = await app.client.post("/api/generate", json={"model": "bad", "prompt": "x"})
            assert failed.status_code == 500
        state = (await app.client.get("/api/ps")).json()
    assert state["models"] == []
    (held,) = state["waiting"]
    assert (held["name"], held["n_deaths"]) == ("bad:latest", 3)
    assert "GGML_ASSERT" in held["last_death"]
    assert held["held_until_s"] > 0
    *died, left = state["recent"]
    assert (left["kind"], left["reason"]) == ("unload", "somebody asked for it")
    assert [event["kind"] for event in died] == ["died"] * 3


@pytest.mark.parametrize("what", ["load", "unload", "status", "pin", "unpin"])
async def test_unknown_and_broken_models_are_errors(app: Running, what: str) -> None:
    method = "GET" if what == "status" else "POST"
    missing = await app.client.request(method, f"/api/models/nix/{what}")
    assert missing.status_code == 404
    assert "'nix' not found" in missing.json()["error"]
    broken = await app.client.request(method, f"/api/models/broken/{what}")
    assert broken.status_code == 422
    nested = await app.client.request(method, f"/api/models/a/b:c/{what}")
    assert nested.status_code == 404
    assert "a/b:c" in nested.json()["error"]


async def test_bad_options_are_named(app: Running) -> None:
    body = {"options": {"num_ctx": "x"}}
    answer = await app.client.post("/api/models/chain/load", json=body)
    assert answer.status_code == 400
    assert "num_ctx" in answer.json()["error"]


async def test_models_are_listed_as_the_older_form_names_them(app: Running) -> None:
    models = (await app.client.get("/api/models")).json()["models"]
    chain = next(model for model in models if model["name"] == "chain:latest")
    assert chain["size_bytes"] == chain["size"] > 0
    assert chain["model_type"] == "llama"
    assert chain["parameter_count"] == chain["details"]["parameter_size"]
    assert chain["source"]


@pytest.mark.parametrize("path", ["/health", "/v1/health"])
async def test_health_is_ok(app: Running, path: str) -> None:
    answer = await app.client.get(path)
    assert answer.json() == {"status": "ok", "service": "shimpy", "version": shimpy.__version__}
    assert (await app.client.head(path)).status_code == 200


async def test_the_diagnosis_says_what_there_is(app: Running) -> None:
    await _post(app, "/api/models/chain/load")
    found = (await app.client.get("/diag")).json()
    assert found["versions"]["shimpy"] == shimpy.__version__
    assert found["versions"]["llama-cpp-python"][0].isdigit()
    assert found["cores"] >= 1
    assert found["mem_total_mb"] == 16 * 1024
    assert found["hardware"]["host"]["available_bytes"] > 0
    assert found["hardware"]["gpus"] == []
    assert found["config"]["model_dirs"] == [str(app.services.config.model_dirs[0])]
    assert found["models"]["total"] == 3
    assert [model["name"] for model in found["models"]["broken"]] == ["broken:latest"]
    assert isinstance(found["problems"], list)
    assert [model["name"] for model in found["residents"]] == ["chain:latest"]
    assert found["waiting"] == []
    assert found["events"][-1]["kind"] == "ready"


async def test_the_diagnosis_shows_settings_that_exist() -> None:
    """By a list: what comes new is not shown by itself, as it may be secret."""
    entry = diagnosis._config_entry(Config())
    assert entry["keep_alive"] == 300
    assert not [name for name in entry if "key" in name or "tls" in name]
