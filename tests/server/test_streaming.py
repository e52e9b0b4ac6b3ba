from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from shimpy.errors import UserError
from shimpy.server import app, streaming
from shimpy.server.app import make_app
from shimpy.server.services import Services
from shimpy.server.streaming import NDJSON, SSE, StreamForm, sse_data, sse_json, stream_chunks
from tests.server.harness import running_app
from tests.server.test_bodies import busy

FORMS = {
    "ndjson": StreamForm(content_type=NDJSON, error_chunk=lambda e: b"E " + e.code.encode()),
    "sse": StreamForm(content_type=SSE, error_chunk=lambda e: sse_data("E " + e.code)),
    "named": StreamForm(
        content_type=SSE,
        error_chunk=lambda e: sse_data("E " + e.code),
        ping=sse_json({}, event="ping"),
    ),
}


@pytest.fixture
async def services(tmp_path: Path) -> AsyncIterator[Services]:
    async with running_app(tmp_path, tmp_path) as app:
        yield app.services


@asynccontextmanager
async def _serving(
    services: Services, chunks: AsyncGenerator[bytes, None], form: str
) -> AsyncIterator[httpx.AsyncClient]:
    async def handle(request: web.Request) -> web.StreamResponse:
        return await stream_chunks(request, chunks, FORMS[form])

    runner = web.AppRunner(
        make_app(services, [web.get("/", handle)]), handler_cancellation=True, shutdown_timeout=1.0
    )
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        async with httpx.AsyncClient(
            base_url=f"http://{host}:{port}", timeout=20, trust_env=False
        ) as client:
            yield client
    finally:
        await runner.cleanup()


async def test_an_error_before_the_first_chunk_is_a_status(services: Services) -> None:
    async def chunks() -> AsyncGenerator[bytes, None]:
        raise UserError("no")
        yield b""

    async with _serving(services, chunks(), "ndjson") as client:
        answer = await client.get("/")
    assert (answer.status_code, answer.json()) == (400, {"error": "no"})


async def test_a_stop_after_the_last_chunk_adds_nothing(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An events stream ends as the daemon stops, which also cancels what still runs."""
    close = streaming._Stream.close
    seen: list[BaseException] = []

    async def close_and_stop(stream: streaming._Stream) -> None:
        await close(stream)
        services.lifecycle.begin_stop()
        raise asyncio.CancelledError

    async def chunks() -> AsyncGenerator[bytes, None]:
        yield b"data: a\n\n"

    monkeypatch.setattr(streaming._Stream, "close", close_and_stop)
    monkeypatch.setattr(app, "log_bug", lambda _, error: seen.append(error))
    async with _serving(services, chunks(), "sse") as client:
        answer = await client.get("/")
    assert answer.content == b"data: a\n\n"
    assert not seen


@pytest.mark.parametrize(("form", "expected"), [("ndjson", b"aE "), ("sse", b"adata: E ")])
@pytest.mark.parametrize(
    ("error", "code"), [(UserError("no"), b"bad_request"), (ValueError("bug"), b"internal")]
)
async def test_an_error_in_the_middle_is_the_last_chunk(
    services: Services, form: str, expected: bytes, error: Exception, code: bytes
) -> None:
    """A bug too: the client must not take half an answer for a whole one."""

    async def chunks() -> AsyncGenerator[bytes, None]:
        yield b"a"
        raise error

    async with _serving(services, chunks(), form) as client:
        answer = await client.get("/")
    assert answer.status_code == 200
    assert answer.content.strip() == expected + code


async def test_a_bug_before_the_first_chunk_is_a_500_without_a_traceback(
    services: Services,
) -> None:
    async def chunks() -> AsyncGenerator[bytes, None]:
        raise ValueError("secret")
        yield b""

    async with _serving(services, chunks(), "sse") as client:
        answer = await client.get("/", headers={"X-Request-Id": "r1"})
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert "r1" in answer.json()["error"]


async def test_silence_is_filled_with_comments(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first event too: a model may load for minutes behind a proxy."""
    monkeypatch.setattr(streaming, "PING_AFTER_S", 0.01)
    go_on = asyncio.Event()

    async def chunks() -> AsyncGenerator[bytes, None]:
        await go_on.wait()
        yield sse_data("x")

    async with _serving(services, chunks(), "sse") as client, client.stream("GET", "/") as answer:
        lines = answer.aiter_lines()
        assert (await anext(lines)).startswith(":")
        go_on.set()
        assert "data: x" in [line async for line in lines]


async def test_ndjson_gets_no_comments(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "PING_AFTER_S", 0.0)

    async def chunks() -> AsyncGenerator[bytes, None]:
        yield b"a\n"
        await asyncio.sleep(0)
        yield b"b\n"

    async with _serving(services, chunks(), "ndjson") as client:
        assert (await client.get("/")).content == b"a\nb\n"


async def test_a_reader_that_stops_reading_is_dropped(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "WRITE_TIMEOUT_S", 0.05)
    closed = asyncio.Event()

    async def chunks() -> AsyncGenerator[bytes, None]:
        try:
            while True:
                yield b"x" * 65536
        finally:
            closed.set()

    async with (
        _serving(services, chunks(), "ndjson") as client,
        client.stream("GET", "/") as answer,
    ):
        assert answer.status_code == 200
        async with asyncio.timeout(20):
            await closed.wait()


async def test_the_daemons_end_is_told_in_the_stream(services: Services) -> None:
    async def chunks() -> AsyncGenerator[bytes, None]:
        yield b"a "
        await asyncio.Event().wait()

    async with (
        _serving(services, chunks(), "ndjson") as client,
        client.stream("GET", "/") as answer,
    ):
        parts = answer.aiter_bytes()
        assert await anext(parts) == b"a "
        services.lifecycle.is_stopping = True
        assert services.lifecycle.cancel_running() == 1
        assert await anext(parts) == b"E stopping"


@busy
@given(st.text())
def test_any_text_survives_as_an_event(text: str) -> None:
    """Source of the reading rules: WHATWG HTML, 9.2.6."""
    event = sse_data(text).decode()
    assert event.endswith("\n\n")
    lines = event[:-2].split("\n")
    assert all(line.startswith("data: ") for line in lines)
    normal = text.replace("\r\n", "\n").replace("\r", "\n")
    assert "\n".join(line.removeprefix("data: ") for line in lines) == normal


def test_a_named_event_of_json() -> None:
    assert sse_json({"a": 1}, event="x") == b'event: x\ndata: {"a":1}\n\n'
    assert sse_json("é\n") == 'data: "é\\n"\n\n'.encode()


@pytest.mark.parametrize(
    ("form", "ping"), [("sse", b": ping\n\n"), ("named", b"event: ping\ndata: {}\n\n")]
)
async def test_a_silence_is_filled_with_the_dialects_ping(
    services: Services, monkeypatch: pytest.MonkeyPatch, form: str, ping: bytes
) -> None:
    monkeypatch.setattr(streaming, "PING_AFTER_S", 0.01)
    heard = asyncio.Event()

    async def chunks() -> AsyncGenerator[bytes, None]:
        yield sse_data("a")
        await heard.wait()
        yield sse_data("b")

    text = b""
    async with _serving(services, chunks(), form) as client, client.stream("GET", "/") as answer:
        async for part in answer.aiter_bytes():
            text += part
            if ping in text:
                heard.set()
    assert text.replace(ping, b"") == sse_data("a") + sse_data("b")
