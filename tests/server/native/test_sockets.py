"""The WebSocket of the older native form, against the real llama.cpp."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from shimpy.server.native import sockets
from tests.daemon import running_daemon
from tests.server.harness import Running, running_app
from tests.synthetic import CHAIN_TEXT, write_bert, write_chain

pytestmark = pytest.mark.asyncio(loop_scope="module")

DONE = {"done": True}
ENDLESS = {"model": "endless", "prompt": "x", "options": {"num_ctx": 2048}}


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def app(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    folder: Path = tmp_path_factory.mktemp("sockets")
    write_chain(folder / "chain.gguf")
    # Of so many tokens that no test sees the end.
    write_chain(folder / "endless.gguf", "la le li lo lu " * 3, endless=True, n_ctx_train=2**20)
    write_bert(folder / "bert.gguf")
    async with running_app(folder, tmp_path_factory.mktemp("state"), n_ctx=None) as running:
        yield running


@asynccontextmanager
async def _socket(app: Running, **options: Any) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(f"{app.url}/ws/generate", **options) as socket,
    ):
        yield socket


async def _frames(socket: aiohttp.ClientWebSocketResponse, body: Any) -> tuple[str, list[Any]]:
    """Send a request; return its text, and the frames that are no text, {"done": true} last."""
    await socket.send_str(body if isinstance(body, str) else json.dumps(body))
    texts: list[str] = []
    others: list[Any] = []
    while DONE not in others:
        frame = await socket.receive_str()
        if frame.startswith("{"):
            others.append(json.loads(frame))
        else:
            texts.append(frame)
    return "".join(texts), others


async def test_the_text_comes_bare_and_then_the_end(app: Running) -> None:
    async with _socket(app) as socket:
        await socket.send_json({"model": "chain", "prompt": "hi", "max_tokens": 1})
        assert await socket.receive_str() == "Once"
        assert await socket.receive_str() == '{"done":true}'


async def test_a_connection_takes_one_request_after_the_other(app: Running) -> None:
    messages = [{"role": "user", "content": "hi"}]
    async with _socket(app) as socket:
        for body in (
            {"model": "chain", "prompt": "hi", "temperature": 0.5, "top_p": 0.9, "top_k": 10},
            {"model": "chain", "messages": messages, "system": "Be brief.", "stream": True},
        ):
            assert await _frames(socket, body) == (CHAIN_TEXT, [DONE])
        await socket.send_bytes(json.dumps({"model": "chain", "prompt": "hi"}).encode())
        assert (await socket.receive_str()).startswith("On")


async def test_requests_that_come_at_once_wait_for_each_other(app: Running) -> None:
    async with _socket(app) as socket:
        for _ in range(3):
            await socket.send_json({"model": "chain", "prompt": "hi", "max_tokens": 2})
        frames = ""
        while frames.count('{"done":true}') < 3:
            frames += await socket.receive_str()
        first, second, third, nothing = frames.split('{"done":true}')
        assert first == second == third
        assert (first, nothing) == ("Once upon", "")


async def test_a_prompt_of_nothing_loads(app: Running) -> None:
    async with _socket(app) as socket:
        assert await _frames(socket, {"model": "chain"}) == ("", [DONE])


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("nonsense", "not valid JSON"),
        ("", "missing request body"),
        ({}, "model is required"),
        ({"model": "nix", "prompt": "x"}, "not found"),
        ({"model": "bert", "prompt": "x"}, "does not support generate"),
        ({"model": "chain", "prompt": "x", "max_tokens": "5"}, "max_tokens"),
        ({"model": "chain", "prompt": "x", "temperature": -5}, "temperature"),
        ([1], "object"),
    ],
)
async def test_what_goes_wrong_is_a_frame_and_not_the_end(
    app: Running, body: Any, words: str
) -> None:
    async with _socket(app) as socket:
        text, others = await _frames(socket, body)
        assert text == ""
        assert words in others[0]["error"]
        after = {"model": "chain", "prompt": "hi"}
        assert await _frames(socket, after) == (CHAIN_TEXT, [DONE])


async def test_a_client_that_closes_cancels(app: Running) -> None:
    async with _socket(app) as socket:
        await socket.send_json(ENDLESS)
        assert await socket.receive_str()
    # Its slot is free once no lease is held.
    async for event in _until_idle(app):
        assert event is None


async def _until_idle(app: Running) -> AsyncIterator[None]:
    while any(resident.n_leases for resident in app.services.scheduler.residents()):
        yield None
        await asyncio.sleep(0)


async def test_too_many_requests_close_the_connection(app: Running) -> None:
    async with _socket(app) as socket:
        for _ in range(sockets.MAX_WAITING + 2):
            await socket.send_json(ENDLESS)
        async for _ in socket:
            pass
        assert socket.close_code == aiohttp.WSCloseCode.POLICY_VIOLATION


async def test_a_plain_request_is_told_what_this_is(app: Running) -> None:
    answer = await app.client.get("/ws/generate")
    assert answer.status_code == 400
    assert "WebSocket" in answer.json()["error"]


async def test_a_foreign_page_does_not_get_in(app: Running) -> None:
    """Browsers put no limits on WebSockets of their own."""
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        async with _socket(app, origin="https://evil.example"):
            pass
    assert refused.value.status == 403


async def test_a_frame_over_the_limit_closes_the_connection(
    tmp_path: Path,
) -> None:
    write_chain(tmp_path / "chain.gguf")
    async with running_app(tmp_path, tmp_path, max_body=1000) as small, _socket(small) as socket:
        await socket.send_json({"model": "chain", "prompt": "x" * 2000})
        assert (await socket.receive()).type is aiohttp.WSMsgType.CLOSE
        assert socket.close_code == aiohttp.WSCloseCode.MESSAGE_TOO_BIG


async def test_a_waiting_connection_ends_when_the_daemon_stops(tmp_path: Path) -> None:
    """It must not keep the daemon for as long as requests may."""
    write_chain(tmp_path / "chain.gguf")
    async with running_app(tmp_path, tmp_path) as stopping, _socket(stopping) as socket:
        assert (await _frames(socket, {"model": "chain", "prompt": "x"}))[0] == CHAIN_TEXT
        lifecycle = stopping.services.lifecycle
        lifecycle.begin_stop()
        message = await socket.receive()
        assert message.type is aiohttp.WSMsgType.CLOSE
        assert socket.close_code == aiohttp.WSCloseCode.GOING_AWAY
        await lifecycle.wait_idle()


async def test_an_answer_is_told_that_the_daemon_stops(tmp_path: Path) -> None:
    text = "la le li lo lu " * 3
    write_chain(tmp_path / "endless.gguf", text, endless=True, n_ctx_train=2**20)
    async with (
        running_app(tmp_path, tmp_path, n_ctx=2**16) as stopping,
        _socket(stopping) as socket,
    ):
        await socket.send_json({"model": "endless", "prompt": "x"})
        assert await socket.receive_str()
        lifecycle = stopping.services.lifecycle
        lifecycle.begin_stop()
        lifecycle.cancel_running()
        frames = [message.data async for message in socket]
        assert "stopping" in json.loads(frames[-1])["error"]
        assert socket.close_code == aiohttp.WSCloseCode.GOING_AWAY


async def test_a_waiting_connection_does_not_keep_a_real_daemon(
    tmp_path: Path, chain_model: Path
) -> None:
    """It would for as long as requests may take to end, which is more than the test may."""
    flags = ("--drain-timeout", "300")
    with running_daemon(tmp_path, chain_model.parent, *flags) as daemon:
        url = f"{daemon.url}/ws/generate"
        async with aiohttp.ClientSession() as session, session.ws_connect(url) as socket:
            assert (await _frames(socket, {"model": "chain"}))[1] == [DONE]
            daemon.process.terminate()
            message = await socket.receive()
            assert message.type is aiohttp.WSMsgType.CLOSE
            assert socket.close_code == aiohttp.WSCloseCode.GOING_AWAY
            await asyncio.to_thread(daemon.process.wait, 50)
        assert daemon.process.returncode == 0
