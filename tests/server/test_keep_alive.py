"""keep_alive and num_ctx mean the same in every dialect; unsent, they are the model's or ours."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.scheduler.workshop import FAKE_ENGINE
from tests.server.harness import Running, running_app
from tests.synthetic import write_chain

pytestmark = pytest.mark.asyncio(loop_scope="module")

USER = [{"role": "user", "content": "hi"}]
BODIES: dict[str, dict[str, Any]] = {
    "/api/generate": {"prompt": "hi", "stream": False},
    "/api/chat": {"messages": USER, "stream": False},
    "/api/embed": {"input": "hi"},
    "/api/embeddings": {"prompt": "hi"},
    "/api/models/chain/load": {},
    "/v1/chat/completions": {"messages": USER},
    "/v1/completions": {"prompt": "hi"},
    "/v1/responses": {"input": "hi"},
    "/v1/embeddings": {"input": "hi"},
    "/v1/messages": {"messages": USER, "max_tokens": 9},
    "/completion": {"prompt": "hi"},
    "/infill": {"input_prefix": "a", "input_suffix": "b"},
    "/embedding": {"content": "hi"},
}
every_dialect = pytest.mark.parametrize("path", BODIES)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def app(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    folder: Path = tmp_path_factory.mktemp("keep")
    write_chain(folder / "chain.gguf")
    settings = {"keep_alive": 600.0, "n_ctx": None, "spare_worker": False}
    async with running_app(folder, folder, engine_argv=FAKE_ENGINE, **settings) as running:
        yield running


async def ask(app: Running, path: str, **more: Any) -> float:
    """Ask and return how long the model is kept after the answer, in seconds."""
    answer = await app.client.post(path, json={"model": "chain", **BODIES[path], **more})
    assert answer.status_code == 200, answer.text
    residents = app.services.scheduler.residents()
    if not residents:
        # It was to go at once, and has gone.
        return 0.0
    (resident,) = residents
    if resident.state == "stopping":
        await app.services.scheduler.wait_unloaded("chain:latest")
        return 0.0
    return resident.expires_at_s - time.time()


@every_dialect
async def test_a_request_says_how_long_its_model_stays(app: Running, path: str) -> None:
    """As Ollama reads it: a duration, seconds, negative for ever, 0 for not at all."""
    assert await ask(app, path, keep_alive="7m") == pytest.approx(420, abs=5)
    assert await ask(app, path) == pytest.approx(420, abs=5)
    assert await ask(app, path, keep_alive=90) == pytest.approx(90, abs=5)
    assert await ask(app, path, keep_alive=-1) == math.inf
    assert await ask(app, path, keep_alive=0) == 0
    assert await ask(app, path) == pytest.approx(600, abs=5)
    assert await ask(app, path, keep_alive="0s") == 0


@every_dialect
async def test_a_model_has_its_own(app: Running, path: str) -> None:
    """Set for the model it wins over the daemon's; a request wins over both."""
    changed = {"model": "chain", "set": {"keep_alive": "20m"}}
    assert (await app.client.post("/api/settings", json=changed)).status_code == 200
    try:
        assert await ask(app, path) == pytest.approx(1200, abs=5)
        assert await ask(app, path, keep_alive="3s") == pytest.approx(3, abs=2)
    finally:
        undo = {"model": "chain", "unset": ["keep_alive"]}
        assert (await app.client.post("/api/settings", json=undo)).status_code == 200
    assert await ask(app, path, keep_alive=0) == 0


async def test_clients_with_different_contexts_share_one_load(app: Running) -> None:
    """Less than is loaded is served as it is, in whatever dialect, by turns."""
    await ask(app, "/api/generate", options={"num_ctx": 8192})
    before = len(app.services.scheduler.history())
    for path in ["/api/chat", "/v1/chat/completions", "/v1/messages", "/completion"] * 3:
        await ask(app, path, options={"num_ctx": 2048})
        await ask(app, path, options={"num_ctx": 8192})
        await ask(app, path)
    assert app.services.scheduler.history()[before:] == ()
    await ask(app, "/api/generate", keep_alive=0)


async def test_a_longer_context_reloads_once(app: Running) -> None:
    await ask(app, "/api/generate", options={"num_ctx": 1024})
    before = len(app.services.scheduler.history())
    for _ in range(5):
        await ask(app, "/api/generate", options={"num_ctx": 4096})
        await ask(app, "/v1/chat/completions", options={"num_ctx": 1024})
    kinds = [event.kind for event in app.services.scheduler.history()[before:]]
    assert kinds == ["reload", "load", "ready"]
    await ask(app, "/api/generate", keep_alive=0)
