"""/openapi.json describes every route truly; and whatever fits it or not, there is no 500.

SHIMPY_FUZZ_REQUESTS=5000 makes the long run of it.
"""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.scheduler.workshop import FAKE_ENGINE
from tests.server.harness import Running, running_app
from tests.server.openapi_fuzz import Drawn, requests
from tests.synthetic import write_chain

N_REQUESTS = int(os.environ.get("SHIMPY_FUZZ_REQUESTS", "200"))
# Files that are open for a while: workers' pipes, sockets in their last moments.
_FEW_FILES = 40


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner(debug=False) as made:
        yield made


@pytest.fixture(scope="module")
def app(runner: asyncio.Runner, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder: Path = tmp_path_factory.mktemp("fuzz")
    write_chain(folder / "chain.gguf")
    context = running_app(folder, folder, engine_argv=FAKE_ENGINE, offline=True)
    running = runner.run(context.__aenter__())
    yield running
    runner.run(context.__aexit__(None, None, None))


@pytest.fixture(scope="module")
def description(runner: asyncio.Runner, app: Running) -> dict[str, Any]:
    found: dict[str, Any] = runner.run(app.client.get("/openapi.json")).json()
    return found


def test_every_route_that_reads_json_says_what(description: dict[str, Any]) -> None:
    without = {
        path
        for path, item in description["paths"].items()
        if "post" in item and "requestBody" not in item["post"]
    }
    assert without <= {
        "/api/blobs/{digest}",
        "/api/push",
        "/api/reload",
        "/api/models/{model}/unload",
    }


def test_every_operation_has_a_summary_and_no_reference_leads_nowhere(
    description: dict[str, Any],
) -> None:
    known = description["components"]["schemas"]
    for item in description["paths"].values():
        for operation in item.values():
            assert operation["summary"]
            schema = (
                operation.get("requestBody", {})
                .get("content", {})
                .get("application/json", {})
                .get("schema")
            )
            if schema is not None:
                assert schema["$ref"].rpartition("/")[2] in known


@pytest.mark.slow
@pytest.mark.timeout(3600 if N_REQUESTS > 1000 else 120)
def test_no_request_gives_a_500_or_leaks(
    runner: asyncio.Runner, app: Running, description: dict[str, Any]
) -> None:
    process = psutil.Process()
    n_sent = 0
    before: tuple[int, int, int] | None = None

    def measure() -> tuple[int, int, int]:
        gc.collect()
        n_tasks = len(asyncio.all_tasks(runner.get_loop()))
        return process.num_fds(), n_tasks, process.memory_info().rss

    @settings(
        deadline=None,
        max_examples=N_REQUESTS,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(data=st.data())
    def send(data: st.DataObject) -> None:
        nonlocal n_sent, before
        drawn: Drawn = data.draw(requests(description))
        answer: httpx.Response = runner.run(_send(app, drawn))
        assert answer.status_code != 500, (drawn, answer.text)
        assert "Traceback" not in answer.text, drawn
        assert answer.headers["x-request-id"]
        n_sent += 1
        if n_sent == N_REQUESTS // 4:
            before = measure()

    send()
    after = measure()
    assert before is not None
    assert after[0] <= before[0] + _FEW_FILES
    assert after[1] <= before[1] + _FEW_FILES
    print(f"{n_sent} requests; files, tasks, RSS: {before} -> {after}")  # noqa: T201
    if N_REQUESTS > 1000:
        # Hypothesis remembers in this process, too, what it has drawn.
        assert after[2] <= before[2] * 2


async def _send(app: Running, drawn: Drawn) -> httpx.Response:
    # A path of the client's own making must not be tidied up by ours.
    url = httpx.URL(app.url).copy_with(raw_path=_raw(drawn.path))
    return await app.client.request(drawn.method, url, content=drawn.content, headers=drawn.headers)


def _raw(path: str) -> bytes:
    from urllib.parse import quote

    return quote(path, safe="/:%").encode()
