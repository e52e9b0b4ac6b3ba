"""The canonical log line: one a request, whatever its end, and no word of what was said."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from structlog.testing import LogCapture

from tests.server.harness import running_app
from tests.synthetic import write_chain


@pytest.fixture
def log() -> Iterator[LogCapture]:
    capture = LogCapture()
    before = structlog.get_config()
    structlog.configure(processors=[capture], cache_logger_on_first_use=False)
    yield capture
    structlog.configure(**before)


def _requests(log: LogCapture) -> list[dict[str, Any]]:
    return [dict(entry) for entry in log.entries if entry["event"] == "request"]


async def test_one_line_a_request_without_its_text(log: LogCapture, tmp_path: Path) -> None:
    write_chain(tmp_path / "chain.gguf")
    async with running_app(tmp_path, tmp_path) as app:
        body = {"model": "chain", "prompt": "sesame", "options": {"num_predict": 5}}
        await app.client.post("/api/generate", json=body, headers={"X-Request-Id": "r-7"})
        await app.client.post("/api/generate", json={"model": "nix", "prompt": "sesame"})
        await app.client.get("/api/nothing")
    good, bad, missing = _requests(log)
    assert good["request"] == "r-7"
    assert (good["path"], good["model"], good["status"]) == ("/api/generate", "chain:latest", 200)
    assert (good["outcome"], good["n_generated"]) == ("length", 5)
    for name in ("total_s", "load_s", "prefill_s", "decode_per_s", "first_token_s", "n_prompt"):
        assert good[name] > 0, name
    assert (bad["status"], bad["outcome"]) == (404, "not_found")
    assert missing["status"] == 404
    assert "sesame" not in str(_requests(log))


async def test_a_client_that_leaves_is_on_record(log: LogCapture, tmp_path: Path) -> None:
    write_chain(tmp_path / "endless.gguf", endless=True)
    async with running_app(tmp_path, tmp_path) as app:
        body = {"model": "endless", "prompt": "x", "shift": True}
        async with app.client.stream("POST", "/api/generate", json=body) as answer:
            await anext(answer.aiter_lines())
        await app.services.lifecycle.wait_idle()
    (line,) = _requests(log)
    assert line["outcome"] == "client_gone"
    assert line["n_generated"] > 0
