"""The WebSocket /ws/generate of the older native form.

A frame with a JSON request in; the answer's pieces as frames of bare text out, and at the end
`{"done": true}`, after a failure with `{"error": "..."}` before it. Requests that come while one
is answered wait for it. A client that closes cancels.
"""

from __future__ import annotations

import asyncio
import contextlib
from contextlib import aclosing
from typing import Any

from aiohttp import WSCloseCode, WSMsgType, web

from shimpy.errors import ShimpyError, StoppingError, UserError
from shimpy.server.bodies import parse_body
from shimpy.server.choices import sum_up
from shimpy.server.errors import InternalError, ollama_error
from shimpy.server.generation import run_generation
from shimpy.server.ollama import answers
from shimpy.server.ollama.requests import parse_generate
from shimpy.server.ollama.routes import is_empty, load_or_unload
from shimpy.server.ollama.wire import GenerateBody
from shimpy.server.record import Record, log_bug, record_of
from shimpy.server.services import services_of
from shimpy.server.streaming import WRITE_TIMEOUT_S, encode_json

# Requests that wait on one connection.
MAX_WAITING = 16
# A client that answers no ping for this long has gone.
HEARTBEAT_S = 30.0

# For a client to take leave.
_CLOSE_TIMEOUT_S = 2.0


async def generate(request: web.Request) -> web.WebSocketResponse:
    """GET /ws/generate."""
    socket = web.WebSocketResponse(
        heartbeat=HEARTBEAT_S,
        max_msg_size=services_of(request).config.max_body,
        timeout=_CLOSE_TIMEOUT_S,
        # Done at the end by hand: the connection's loss would cancel this as a client's leaving.
        autoclose=False,
    )
    if not socket.can_prepare(request).ok:
        raise UserError("this is a WebSocket: connect with the protocol's upgrade")
    await socket.prepare(request)
    await _Connection(request, socket).serve()
    return socket


class _Connection:
    """Reads and answers side by side, so that a client's leaving is seen at once."""

    def __init__(self, request: web.Request, socket: web.WebSocketResponse) -> None:
        self._request = request
        self._socket = socket
        self._services = services_of(request)
        self._total = record_of(request)
        self._inbox: asyncio.Queue[bytes] = asyncio.Queue(MAX_WAITING)

    async def serve(self) -> None:
        """Answer requests until the client has gone or the daemon stops."""
        try:
            async with asyncio.TaskGroup() as tasks:
                both = [tasks.create_task(self._read()), tasks.create_task(self._work())]
                await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
                for task in both:
                    task.cancel()
        finally:
            await self._socket.close(code=WSCloseCode.GOING_AWAY)

    async def _read(self) -> None:
        async for message in self._socket:
            if message.type not in {WSMsgType.TEXT, WSMsgType.BINARY}:
                continue
            if self._inbox.full():
                text = f"more than {MAX_WAITING} requests at once"
                await self._socket.close(code=WSCloseCode.POLICY_VIOLATION, message=text.encode())
                return
            data = message.data
            self._inbox.put_nowait(data.encode() if isinstance(data, str) else data)

    async def _work(self) -> None:
        while (data := await self._next()) is not None:
            try:
                await self._answer(data)
            except (ConnectionError, TimeoutError):
                self._total.outcome = "client_gone"
                return

    async def _next(self) -> bytes | None:
        """Return the next request; None: the daemon stops."""
        got = asyncio.ensure_future(self._inbox.get())
        stopping = asyncio.ensure_future(self._services.lifecycle.stopping.wait())
        try:
            await asyncio.wait([got, stopping], return_when=asyncio.FIRST_COMPLETED)
            return None if stopping.done() else got.result()
        finally:
            got.cancel()
            stopping.cancel()

    async def _answer(self, data: bytes) -> None:
        """Answer one request; what goes wrong with it is a frame.

        Raises:
            TimeoutError: the client takes nothing any more.
            ConnectionError: it has gone.
        """
        record = Record(request_id=self._total.request_id, on_tokens=self._total.on_tokens)
        failure: ShimpyError | None = None
        try:
            await self._generate(data, record)
        except ShimpyError as error:
            failure = error
        except asyncio.CancelledError:
            if self._services.lifecycle.is_stopping:
                with contextlib.suppress(ConnectionError, TimeoutError):
                    await self._send(ollama_error(StoppingError()))
            raise
        except (ConnectionError, TimeoutError):
            raise
        except Exception as error:  # noqa: BLE001 - the boundary of a request
            log_bug(record, error)
            failure = InternalError(record.request_id)
        finally:
            self._total.model = record.model or self._total.model
            sum_up(self._total, [record, self._total])
        if failure is not None:
            self._total.outcome, self._total.error = failure.code, failure.message
            await self._send(ollama_error(failure))
        await self._send({"done": True})

    async def _generate(self, data: bytes, record: Record) -> None:
        asked = parse_generate(parse_body(data, GenerateBody))
        if is_empty(asked):
            await load_or_unload(self._services, asked, record)
            return
        events = run_generation(self._services, asked, record)
        async with aclosing(answers.bare_text(events)) as texts:
            async for text in texts:
                await self._send_text(text)

    async def _send(self, value: dict[str, Any]) -> None:
        await self._send_text(encode_json(value).decode())

    async def _send_text(self, text: str) -> None:
        """Send a frame; waits while the client reads slower than that."""
        async with asyncio.timeout(WRITE_TIMEOUT_S):
            await self._socket.send_str(text)


ROUTES = [web.get("/ws/generate", generate)]
