"""Streams against real workers: many at once, clients that leave, workers that die."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from tests.fake_engine import Script
from tests.scheduler.workshop import FAKE_ENGINE
from tests.server.harness import Running, running_app
from tests.synthetic import write_chain

ENDLESS = {
    "model": "endless",
    "prompt": "x",
    "options": {"num_predict": 1_000_000},
    "shift": True,
}


@pytest.fixture
async def app(
    tmp_path: Path, chain_model: Path, llama_model: Path, deepseek_model: Path
) -> AsyncIterator[Running]:
    folder = tmp_path / "models"
    folder.mkdir()
    shutil.copy(chain_model, folder / "chain.gguf")
    shutil.copy(llama_model, folder / "llama.gguf")
    shutil.copy(deepseek_model, folder / "deepseek.gguf")
    write_chain(folder / "endless.gguf", endless=True)
    async with running_app(folder, tmp_path) as running:
        yield running


def _worker_pid(app: Running) -> int:
    (resident,) = app.services.scheduler.residents()
    assert resident.pid is not None
    return resident.pid


@pytest.mark.parametrize("model", ["llama", "deepseek"])
async def test_eight_streams_at_once_equal_the_same_eight_alone(app: Running, model: str) -> None:
    """Batching must not change what anyone gets."""
    bodies = [
        {
            "model": model,
            "prompt": f"story number {i} about " + "rivers " * i,
            "raw": True,
            "options": {"num_predict": 24, "temperature": 0},
        }
        for i in range(8)
    ]

    async def text(body: dict[str, Any]) -> str:
        return "".join(line["response"] for line in await app.lines("/api/generate", body))

    alone = [await text(body) for body in bodies]
    together = await asyncio.gather(*(text(body) for body in bodies))
    assert together == alone
    assert len(set(alone)) > 1


async def test_a_client_that_leaves_frees_its_slot_at_once(app: Running) -> None:
    async with app.client.stream("POST", "/api/generate", json=ENDLESS) as answer:
        await anext(answer.aiter_lines())
        (resident,) = app.services.scheduler.residents()
        assert resident.n_leases == 1
    async with asyncio.timeout(20):
        await app.services.lifecycle.wait_idle()
    (resident,) = app.services.scheduler.residents()
    assert (resident.n_leases, resident.state) == (0, "ready")


async def test_a_client_that_leaves_before_the_answer_begins_is_let_go(app: Running) -> None:
    """Its handler waits for the load; it must not wait on for nobody."""
    body = {"model": "endless", "prompt": "x"}
    with pytest.raises(httpx.ReadTimeout):
        await app.client.post("/api/generate", json=body, timeout=httpx.Timeout(20, read=0.001))
    async with asyncio.timeout(20):
        await app.services.lifecycle.wait_idle()


async def test_a_killed_worker_is_an_error_line_and_the_next_request_succeeds(
    app: Running,
) -> None:
    async with app.client.stream("POST", "/api/generate", json=ENDLESS) as answer:
        lines = answer.aiter_lines()
        await anext(lines)
        os.kill(_worker_pid(app), signal.SIGKILL)
        last = ""
        async for line in lines:
            last = line
    assert answer.status_code == 200
    error = msgspec.json.decode(last)
    assert list(error) == ["error"]
    assert "worker" in error["error"]
    again = ENDLESS | {"options": {"num_predict": 2}, "stream": False}
    whole = await app.client.post("/api/generate", json=again)
    assert whole.json()["response"]


async def test_a_worker_that_dies_before_the_answer_is_a_500(tmp_path: Path) -> None:
    """Nothing was sent yet, so the status can say it."""
    model = write_chain(tmp_path / "chain.gguf")
    Script(dies_on_submit="kill").save(model)
    async with running_app(tmp_path, tmp_path, engine_argv=FAKE_ENGINE) as app:
        answer = await app.client.post("/api/generate", json={"model": "chain", "prompt": "x"})
        assert answer.status_code == 500
        assert "worker" in answer.json()["error"]


async def test_a_load_that_fails_says_what_llama_cpp_said(tmp_path: Path) -> None:
    model = write_chain(tmp_path / "chain.gguf")
    Script(load_fails="tensor 'x' has wrong shape").save(model)
    async with running_app(tmp_path, tmp_path, engine_argv=FAKE_ENGINE) as app:
        answer = await app.client.post("/api/generate", json={"model": "chain", "prompt": "x"})
        assert answer.status_code == 500
        assert "tensor 'x' has wrong shape" in answer.json()["error"]


async def test_a_model_leaves_by_itself_after_keep_alive(app: Running) -> None:
    events = app.services.scheduler.events()
    first_event = asyncio.ensure_future(anext(events))
    body = {"model": "chain", "prompt": "x", "keep_alive": "10ms", "stream": False}
    assert (await app.client.post("/api/generate", json=body)).status_code == 200
    kinds = [(await first_event).kind]
    async with asyncio.timeout(20), aclosing(events):
        while kinds[-1] != "unload":
            kinds.append((await anext(events)).kind)
    assert kinds == ["load", "ready", "unload"]


async def test_server_sent_events_carry_the_error_of_a_killed_worker(app: Running) -> None:
    body = {"model": "endless", "prompt": "x", "max_tokens": 1_000_000, "shift": True}
    headers = {"Accept": "text/event-stream"}
    async with app.client.stream("POST", "/api/generate", json=body, headers=headers) as answer:
        lines = answer.aiter_lines()
        await anext(lines)
        os.kill(_worker_pid(app), signal.SIGKILL)
        rest = [line async for line in lines if line]
    assert rest[-1].startswith("data: [ERROR] ")
    assert "data: [DONE]" not in rest


async def test_a_full_queue_is_a_503_with_retry_after(tmp_path: Path) -> None:
    write_chain(tmp_path / "endless.gguf", endless=True)
    async with running_app(tmp_path, tmp_path, max_queue=0) as app:
        # It is not loaded, and waiting for a load needs a place in the queue.
        refused = await app.client.post("/api/generate", json=ENDLESS)
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1


async def test_a_body_over_the_limit_is_a_413(tmp_path: Path) -> None:
    async with running_app(tmp_path, tmp_path, max_body=1000) as app:
        body = {"model": "chain", "prompt": "x" * 2000}
        answer = await app.client.post("/api/generate", json=body)
        assert answer.status_code == 413
        assert "max_body" in answer.json()["error"]


async def test_a_stopping_daemon_takes_nothing_new(app: Running) -> None:
    app.services.lifecycle.is_stopping = True
    answer = await app.client.get("/api/tags")
    assert answer.status_code == 503
    assert answer.headers["retry-after"]
