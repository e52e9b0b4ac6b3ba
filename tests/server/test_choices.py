"""Several answers in one request: they end together, however they end."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.harness import Running, running_app
from tests.server.openai.conftest import sse_events
from tests.synthetic import write_chain

N_CTX = 1 << 18
ENDLESS: dict[str, Any] = {
    "model": "endless",
    "prompt": ["a", "b"],
    "n": 2,
    "stream": True,
    "options": {"num_ctx": N_CTX},
}


@pytest.fixture
async def app(tmp_path: Path) -> AsyncIterator[Running]:
    write_chain(tmp_path / "endless.gguf", endless=True, n_ctx_train=N_CTX)
    async with running_app(tmp_path, tmp_path, n_slots=4) as running:
        yield running


async def test_a_client_that_leaves_frees_the_slots_of_all_its_answers(app: Running) -> None:
    async with app.client.stream("POST", "/v1/completions", json=ENDLESS) as answer:
        lines = answer.aiter_lines()
        heard: set[str] = set()
        while len(heard) < 4:
            line = await anext(lines)
            heard |= {f'"index":{index},' for index in range(4) if f'"index":{index},' in line}
    async with asyncio.timeout(20):
        await app.services.lifecycle.wait_idle()
        # Were one slot still at it, this would never end.
        short = ENDLESS | {"prompt": ["a"] * 4, "n": 1, "max_tokens": 2, "stream": False}
        whole = await app.client.post("/v1/completions", json=short)
    assert [choice["finish_reason"] for choice in whole.json()["choices"]] == ["length"] * 4


async def test_a_killed_worker_ends_all_answers_with_one_error(app: Running) -> None:
    async with app.client.stream("POST", "/v1/completions", json=ENDLESS) as answer:
        lines = answer.aiter_lines()
        first = await anext(lines)
        (resident,) = app.services.scheduler.residents()
        assert resident.pid is not None
        os.kill(resident.pid, signal.SIGKILL)
        rest = [line async for line in lines]
    *chunks, last = sse_events("\n".join([first, *rest]))
    assert all("choices" in chunk for chunk in chunks)
    assert last["error"]["type"] == "server_error"
    assert "worker" in last["error"]["message"]


async def test_the_log_line_has_the_sums_over_all_answers(
    app: Running, capsys: pytest.CaptureFixture[str]
) -> None:
    body = ENDLESS | {"max_tokens": 3, "stream": False}
    usage = (await app.client.post("/v1/completions", json=body)).json()["usage"]
    (line,) = (one for one in capsys.readouterr().out.splitlines() if "path=/v1/comp" in one)
    assert usage["completion_tokens"] == 12
    assert "n_generated=12" in line
    assert "outcome=length" in line
