"""POST /api/pull against a real app and store, from a hub that fails."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from msgspec.structs import replace

from tests.hub_server import Fault, HubServer
from tests.hubs import hub
from tests.server.harness import MACHINE, Running, running_app
from tests.synthetic import CHAIN_TEXT

__all__ = ["hub"]

NAME = "hf.co/org/chain-gguf:q8_0"


@pytest.fixture
async def app(tmp_path: Path, hub: HubServer, chain_model: Path) -> AsyncIterator[Running]:
    hub.add("org/Chain-GGUF", {"Chain-Q8_0.gguf": chain_model})
    folder = tmp_path / "models"
    folder.mkdir()
    async with running_app(folder, tmp_path / "state") as running:
        yield running


@asynccontextmanager
async def pulling(app: Running, **body: Any) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
    """The lines of a pull, as they come."""
    asked = {"model": "hf.co/org/Chain-GGUF", **body}
    async with app.client.stream("POST", "/api/pull", json=asked) as response:
        assert response.status_code == 200

        async def lines() -> AsyncIterator[dict[str, Any]]:
            async for line in response.aiter_lines():
                yield json.loads(line)

        yield lines()


async def names(app: Running) -> list[str]:
    tags = (await app.client.get("/api/tags")).json()["models"]
    return [model["name"] for model in tags]


async def test_a_pull_speaks_ollamas_lines_with_the_plan_first(
    app: Running, chain_model: Path
) -> None:
    lines = await app.lines("/api/pull", {"model": "hf.co/org/Chain-GGUF"})
    statuses = [line["status"] for line in lines]
    assert statuses[0] == "pulling manifest"
    assert statuses[1].endswith("RAM")
    assert ": will run on the CPU alone: " in statuses[1]
    assert statuses[-3:] == ["verifying sha256 digest", "writing manifest", "success"]
    planned = lines[1]
    assert (planned["model"], planned["fits"]) == (NAME, True)
    assert planned["plan"]["ladder"]
    progress = [line for line in lines if "digest" in line]
    assert all(line["status"] == f"pulling {line['digest'][7:19]}" for line in progress)
    size = chain_model.stat().st_size  # noqa: ASYNC240 - a temporary file
    assert (progress[-1]["completed"], progress[-1]["total"]) == (size, size)
    assert lines[-1] == {"status": "success", "model": NAME}


async def test_a_pulled_model_answers_at_once(app: Running) -> None:
    await app.lines("/api/pull", {"name": "hf.co/org/Chain-GGUF"})
    assert await names(app) == [NAME]
    body = {"model": "hf.co/org/chain-gguf", "prompt": "x", "stream": False}
    answer = (await app.client.post("/api/generate", json=body)).json()
    assert answer["response"] == CHAIN_TEXT


async def test_without_streaming_the_last_line_is_the_answer(app: Running) -> None:
    body = {"model": "hf.co/org/Chain-GGUF", "stream": False}
    response = await app.client.post("/api/pull", json=body)
    assert response.json() == {"status": "success", "model": NAME}


@pytest.mark.parametrize(
    ("model", "status", "said"),
    [
        ("nope", 404, "catalog has no"),
        ("grin-moe", 400, "no converter"),
        ("file:///etc/passwd.gguf", 400, "https://"),
        ("", 400, "model"),
    ],
)
async def test_a_name_that_means_nothing_is_told_by_the_status(
    app: Running, model: str, status: int, said: str
) -> None:
    response = await app.client.post("/api/pull", json={"model": model})
    assert response.status_code == status
    assert said in response.json()["error"]


async def test_a_failure_is_the_last_line_or_without_streaming_the_status(app: Running) -> None:
    body = {"model": "hf.co/org/gone"}
    lines = await app.lines("/api/pull", body)
    assert [*lines[-1]] == ["error"]
    assert "no repository org/gone" in lines[-1]["error"]
    response = await app.client.post("/api/pull", json={**body, "stream": False})
    assert response.status_code == 404
    assert "no repository org/gone" in response.json()["error"]


async def test_two_clients_share_one_pull(app: Running, hub: HubServer) -> None:
    """The second is told what the first was told, and both of the end."""
    hub.faults = [Fault(), Fault(stall_after=100_000)]
    async with pulling(app) as first:
        assert (await anext(first))["status"] == "pulling manifest"
        await asyncio.to_thread(hub.wait_stalled)
        async with pulling(app) as second:
            assert (await anext(second))["status"] == "pulling manifest"
            assert (await anext(second))["plan"]
            hub.go_on()
            ends = [[line async for line in lines][-1] for lines in (first, second)]
    assert ends == [{"status": "success", "model": NAME}] * 2
    assert hub.count("api") == 1


def wait_for_bytes(folder: Path) -> None:
    """Wait until some of a blob is on disk: what was sent need not have been taken yet."""
    deadline_s = time.monotonic() + 20
    while not any(file.stat().st_size for file in folder.rglob("partial/sha256-*")):
        assert time.monotonic() < deadline_s, "nothing of the file has come"
        time.sleep(0.005)


async def test_one_client_that_leaves_does_not_end_the_pull_of_another(
    app: Running, hub: HubServer
) -> None:
    hub.faults = [Fault(), Fault(stall_after=100_000)]
    async with pulling(app) as stays:
        await anext(stays)
        async with pulling(app) as leaves:
            await anext(leaves)
            await asyncio.to_thread(hub.wait_stalled)
        hub.go_on()
        assert [line async for line in stays][-1]["status"] == "success"


async def test_when_all_have_left_the_pull_stops_and_the_next_goes_on(
    app: Running,
    hub: HubServer,
    chain_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 60.0)
    hub.faults = [Fault(), Fault(stall_after=1_000_000)]
    async with pulling(app) as lines:
        await anext(lines)
        await asyncio.to_thread(hub.wait_stalled)
        await asyncio.to_thread(wait_for_bytes, tmp_path)
    # It ends without waiting for the server; the next pull waits for its end.
    lines_after = await app.lines("/api/pull", {"model": "hf.co/org/Chain-GGUF"})
    hub.go_on()
    assert lines_after[-1]["status"] == "success"
    size = chain_model.stat().st_size  # noqa: ASYNC240 - a temporary file
    resumed = [s for s in hub.seen if s.where == "storage" and s.range.endswith("-")]
    assert len(resumed) == 1
    assert resumed[0].n_bytes < size


async def test_what_can_not_run_here_is_refused_unless_forced(
    app: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = replace(MACHINE, host=replace(MACHINE.host, available_bytes=0))
    monkeypatch.setattr(app.services.machine, "_probe", lambda: tiny)
    lines = await app.lines("/api/pull", {"model": "hf.co/org/Chain-GGUF"})
    assert "can't run here" in lines[-1]["error"]
    assert "--force" in lines[-1]["error"]
    lines = await app.lines("/api/pull", {"model": "hf.co/org/Chain-GGUF", "force": True})
    assert lines[-1]["status"] == "success"
    assert next(line for line in lines if "fits" in line)["fits"] is False


async def test_offline_refuses_at_once(tmp_path: Path, hub: HubServer) -> None:
    async with running_app(tmp_path, tmp_path / "state", offline=True) as app:
        response = await app.client.post("/api/pull", json={"model": "hf.co/org/Chain-GGUF"})
        assert response.status_code == 403
        assert "`offline` is on" in response.json()["error"]
        assert hub.seen == []


async def test_a_daemon_that_stops_tells_who_follows(app: Running, hub: HubServer) -> None:
    hub.faults = [Fault(), Fault(stall_after=100_000)]
    async with pulling(app) as lines:
        await anext(lines)
        await asyncio.to_thread(hub.wait_stalled)
        await app.services.pulls.close()
        assert "what came is kept" in [line async for line in lines][-1]["error"]
    response = await app.client.post("/api/pull", json={"model": "hf.co/org/x", "stream": False})
    assert response.status_code == 503


async def test_the_catalog_is_listed_with_what_is_here(app: Running, tmp_path: Path) -> None:
    own = tmp_path / "state" / "registry.toml"
    own.write_text('[models.mine]\ntitle = "Mine"\nrepo = "org/Chain-GGUF"')
    await app.lines("/api/pull", {"model": "mine"})
    rows = {row["name"]: row for row in (await app.client.get("/api/catalog")).json()["models"]}
    assert rows["mine"]["installed"] == ["mine:q8_0"]
    assert rows["grin-moe"]["unavailable"]
    assert rows["deepseek-moe-16b"]["tags"] == ["f16", "q8_0", "q4_k_m", "q2_k"]


async def test_a_broken_catalog_of_the_user_is_told_by_the_pull(
    app: Running, tmp_path: Path
) -> None:
    (tmp_path / "state" / "registry.toml").write_text("[models.mine]\nrepo = 1")
    response = await app.client.post("/api/pull", json={"model": "mine"})
    assert response.status_code == 422
    assert "registry.toml" in response.json()["error"]


async def test_catalog_defaults_hold_for_a_pulled_model(app: Running, tmp_path: Path) -> None:
    (tmp_path / "state" / "registry.toml").write_text(
        '[models.mine]\ntitle = "Mine"\nrepo = "org/Chain-GGUF"\noptions = { num_predict = 2 }'
    )
    await app.lines("/api/pull", {"model": "mine"})
    body = {"model": "mine", "prompt": "x", "stream": False}
    answer: httpx.Response = await app.client.post("/api/generate", json=body)
    assert answer.json()["eval_count"] == 2
    own = await app.client.post("/api/generate", json={**body, "options": {"num_predict": 3}})
    assert own.json()["eval_count"] == 3
