"""/openapi.json describes every route truly; and whatever fits it or not, there is no 500.

SHIMPY_FUZZ_REQUESTS=5000 makes the long run of it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shimpy.units import MIB
from tests.daemon import Daemon, running_daemon
from tests.server.openapi_fuzz import Drawn, requests
from tests.synthetic import write_chain

pytestmark = pytest.mark.slow

N_REQUESTS = int(os.environ.get("SHIMPY_FUZZ_REQUESTS", "200"))
# Files that are open for a while: a worker's pipes, sockets in their last moments.
_FEW_FILES = 16
# What caches and the allocator come to in the half of the requests that is watched; measured
# over 5,000 of them: 0.3 MiB.
_LITTLE_BYTES = 12 * MIB


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One in a process of its own: in this one Hypothesis remembers what it has drawn."""
    folder: Path = tmp_path_factory.mktemp("fuzz")
    (folder / "models").mkdir()
    write_chain(folder / "models" / "chain.gguf")
    with running_daemon(folder / "home", folder / "models", "--offline", "on") as running:
        yield running


@pytest.fixture(scope="module")
def client(daemon: Daemon) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=daemon.url, timeout=50, trust_env=False) as made:
        yield made


@pytest.fixture(scope="module")
def description(client: httpx.Client) -> dict[str, Any]:
    found: dict[str, Any] = client.get("/openapi.json").json()
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
        "/api/models/{model}/pin",
        "/api/models/{model}/unpin",
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


@pytest.mark.timeout(3600 if N_REQUESTS > 1000 else 120)
def test_no_request_gives_a_500_or_leaks(
    daemon: Daemon, client: httpx.Client, description: dict[str, Any]
) -> None:
    process = psutil.Process(daemon.process.pid)
    n_sent = 0
    half: tuple[int, int] | None = None

    def measure() -> tuple[int, int]:
        return process.num_fds(), process.memory_info().rss

    @settings(
        deadline=None,
        max_examples=N_REQUESTS,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(data=st.data())
    def send(data: st.DataObject) -> None:
        nonlocal n_sent, half
        drawn: Drawn = data.draw(requests(description))
        # A path of the client's own making must not be tidied up by ours.
        url = httpx.URL(daemon.url).copy_with(raw_path=quote(drawn.path, safe="/:%").encode())
        answer = client.request(drawn.method, url, content=drawn.content, headers=drawn.headers)
        assert answer.status_code != 500, (drawn, answer.text)
        assert "Traceback" not in answer.text, drawn
        assert answer.headers["x-request-id"]
        n_sent += 1
        if n_sent == N_REQUESTS // 2:
            half = measure()

    send()
    end = measure()
    assert half is not None
    print(f"{n_sent} requests; files, RSS: {half} -> {end}")  # noqa: T201
    assert end[0] <= half[0] + _FEW_FILES
    assert end[1] <= half[1] + _LITTLE_BYTES
    assert "Traceback" not in daemon.log.read_text()
