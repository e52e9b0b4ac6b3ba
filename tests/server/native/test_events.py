"""GET /api/events: what the scheduler does and why, to whoever listens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import pytest_asyncio

from shimpy.errors import InvalidOptionError
from shimpy.server.native.events import parse_since
from tests.scheduler.workshop import FAKE_ENGINE
from tests.server.harness import Running, running_app
from tests.synthetic import write_chain

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def app(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    folder: Path = tmp_path_factory.mktemp("events")
    write_chain(folder / "chain.gguf")
    async with running_app(folder, folder, engine_argv=FAKE_ENGINE) as running:
        yield running


async def load_and_unload(app: Running) -> None:
    await app.client.post("/api/models/chain/load")
    await app.client.post("/api/models/chain/unload")


async def events_of(response: httpx.Response, count: int) -> list[dict[str, Any]]:
    """Read so many events; each has its id twice, for EventSource and for people."""
    found: list[dict[str, Any]] = []
    last_id = ""
    async for line in response.aiter_lines():
        name, _, value = line.partition(": ")
        if name == "id":
            last_id = value
        if name == "data":
            found.append(msgspec.json.decode(value))
            assert str(found[-1]["id"]) == last_id
        if len(found) == count:
            break
    return found


async def past(app: Running, since: str = "0", **headers: str) -> list[dict[str, Any]]:
    query = {"follow": "false", "since": since}
    async with app.client.stream("GET", "/api/events", params=query, headers=headers) as response:
        assert response.status_code == 200
        return await events_of(response, 1000)


async def test_a_listener_hears_what_happens_from_now_on(app: Running) -> None:
    await load_and_unload(app)
    async with app.client.stream("GET", "/api/events") as response:
        assert response.headers["content-type"] == "text/event-stream"
        _, found = await asyncio.gather(load_and_unload(app), events_of(response, 3))
    assert [event["kind"] for event in found] == ["load", "ready", "unload"]
    assert {event["model"] for event in found} == {"chain:latest"}
    assert found[2]["reason"] == "somebody asked for it"


async def test_a_listener_that_comes_back_misses_nothing(app: Running) -> None:
    """Last-Event-ID is what EventSource sends by itself; it wins over a page's own `since`."""
    await load_and_unload(app)
    everything = await past(app)
    first = everything[-3]
    assert await past(app, **{"Last-Event-ID": str(first["id"])}) == everything[-2:]
    assert await past(app, since="1h") == everything
    assert await past(app, since=str(everything[-1]["at_s"] + 1)) == []
    headers = {"Last-Event-ID": str(first["id"])}
    async with app.client.stream("GET", "/api/events", headers=headers) as response:
        _, found = await asyncio.gather(load_and_unload(app), events_of(response, 5))
    assert found[:2] == everything[-2:]
    assert [event["kind"] for event in found[2:]] == ["load", "ready", "unload"]


@pytest.mark.parametrize(
    ("query", "headers"),
    [
        ({"since": "yesterday"}, {}),
        ({"since": "5"}, {"Last-Event-ID": "x"}),
        ({"since": "1e400"}, {}),
        ({"since": "9" * 400 + "h"}, {}),
    ],
)
async def test_what_is_no_beginning_is_named(
    app: Running, query: dict[str, str], headers: dict[str, str]
) -> None:
    answer = await app.client.get("/api/events", params=query, headers=headers)
    assert answer.status_code == 400
    assert "since" in answer.text or "Last-Event-ID" in answer.text


async def test_a_silence_is_filled(app: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shimpy.server.streaming.PING_AFTER_S", 0.05)
    async with app.client.stream("GET", "/api/events") as response:
        async for line in response.aiter_lines():
            if line == ": ping":
                break


async def test_those_who_leave_are_forgotten(app: Running) -> None:
    for _ in range(20):
        async with app.client.stream("GET", "/api/events"):
            assert app.services.lifecycle.n_running >= 1
    async with asyncio.timeout(20):
        await app.services.lifecycle.wait_idle()


async def test_the_stream_ends_when_the_daemon_stops(tmp_path: Path) -> None:
    """Else a drain would wait for a listener that only wants to listen."""
    async with (
        running_app(tmp_path, tmp_path, engine_argv=FAKE_ENGINE) as app,
        app.client.stream("GET", "/api/events") as response,
    ):
        app.services.lifecycle.begin_stop()
        assert await events_of(response, 1000) == []


@pytest.mark.parametrize(
    ("text", "at_s"),
    [("0", 0.0), ("1700000000", 1.7e9), ("12.5", 12.5), ("10m", 9400.0), ("1.5h", 4600.0)],
)
async def test_a_time_or_a_duration_back(text: str, at_s: float) -> None:
    assert parse_since(text, 10_000.0) == at_s


@pytest.mark.parametrize("text", ["", "x", "5 m", "1e999", "inf", "--1h"])
async def test_other_texts_are_no_time(text: str) -> None:
    with pytest.raises(InvalidOptionError, match="since"):
        parse_since(text, 0.0)
