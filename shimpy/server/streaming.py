"""Streamed answers: NDJSON and server-sent events, with backpressure and a clean end.

Until the first chunk is there nothing is sent, so a failure up to then is an ordinary
status. After it, a failure is a last chunk in the dialect's own form. A client that leaves
cancels its handler (the app runs with handler_cancellation), and with it the generator that
makes the chunks; one that stops reading is dropped after WRITE_TIMEOUT_S.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

import msgspec
from aiohttp import web

from shimpy.errors import ShimpyError, StoppingError
from shimpy.server.errors import InternalError
from shimpy.server.record import Record, log_bug, record_of
from shimpy.server.services import services_of

NDJSON = "application/x-ndjson"
SSE = "text/event-stream"
JSON = "application/json; charset=utf-8"
# llama.cpp's server pings after 30 s of silence; many proxies cut at 60 s.
PING_AFTER_S = 15.0
# A reader that takes nothing for this long holds a slot for nothing.
WRITE_TIMEOUT_S = 60.0
# After so much into an empty buffer asyncio's transports, of 64 KiB, ask nobody to wait.
_FREE_BYTES = 32 * 1024
_PING = b": ping\n\n"

encode_json = msgspec.json.Encoder().encode


class StreamForm(msgspec.Struct, frozen=True, kw_only=True):
    """How a dialect streams: its content type and what an error looks like inside a stream."""

    content_type: str
    error_chunk: Callable[[ShimpyError], bytes]
    # What is sent in a silence of server-sent events; a comment, unless the dialect has more.
    ping: bytes = _PING


async def stream_chunks(
    request: web.Request,
    chunks: AsyncGenerator[bytes, None],
    form: StreamForm,
) -> web.StreamResponse:
    """Send chunks as they come and return the response, closed.

    Args:
        request: the request that is answered.
        chunks: whole chunks in the dialect's form; closed here, whatever happens.
        form: the dialect's form.

    Raises:
        ShimpyError: it came before the first chunk.
    """
    stream = _Stream(request, form)
    record = record_of(request)
    async with aclosing(chunks):
        try:
            await _pump(chunks, stream)
        except ShimpyError as error:
            if not stream.is_open:
                raise
            await stream.finish_with(form.error_chunk(error), record, error)
        except asyncio.CancelledError:
            is_unfinished = stream.is_open and not stream.is_ended
            if is_unfinished and services_of(request).lifecycle.is_stopping:
                stopping = StoppingError()
                await stream.finish_with(form.error_chunk(stopping), record, stopping)
            raise
        except (ConnectionError, TimeoutError):
            # The client left or stopped reading; there is nobody to tell.
            record.outcome = "client_gone"
            stream.abort()
        except Exception as error:
            if not stream.is_open:
                raise
            log_bug(record, error)
            internal = InternalError(record.request_id)
            await stream.finish_with(form.error_chunk(internal), record, internal)
    return stream.response


async def _pump(chunks: AsyncGenerator[bytes, None], stream: _Stream) -> None:
    if not stream.content_type.startswith(SSE):
        async for chunk in chunks:
            await stream.write(chunk)
        await stream.close()
        return
    pinger = _Pinger(stream)
    try:
        async for chunk in chunks:
            await stream.write(chunk)
        await stream.close()
    finally:
        await pinger.stop()


class _Response(web.StreamResponse):
    """A response whose head goes out together with its first chunk."""

    _send_headers_immediately = False


class _Stream:
    """One streamed response; writes are whole chunks, from the handler and from the pinger."""

    def __init__(self, request: web.Request, form: StreamForm) -> None:
        self._request = request
        self._ping = form.ping
        self.content_type = form.content_type
        self.response = _Response(headers={"Content-Type": form.content_type})
        if form.content_type.startswith(SSE):
            self.response.headers["Cache-Control"] = "no-cache"
            # nginx would collect the events otherwise.
            self.response.headers["X-Accel-Buffering"] = "no"
        self.is_open = False
        self.is_ended = False
        self._lock = asyncio.Lock()
        self._loop = asyncio.get_running_loop()
        self.last_write_s = self._loop.time()

    async def write(self, chunk: bytes) -> None:
        """Send one chunk; waits while the client reads slower than that.

        Raises:
            TimeoutError: it took nothing for WRITE_TIMEOUT_S.
            ConnectionError: it has gone.
        """
        if not self.is_open:
            # Nothing is sent yet: the head waits for the first chunk.
            await self.response.prepare(self._request)
            self.is_open = True
        if self._is_free() and len(chunk) <= _FREE_BYTES:
            # It waits for nobody: it needs no turn and no timeout.
            await self.response.write(chunk)
        else:
            async with self._lock, asyncio.timeout(WRITE_TIMEOUT_S):
                await self.response.write(chunk)
        self.last_write_s = self._loop.time()

    async def ping(self) -> bool:
        """Show that there is somebody; return whether the client is there, too."""
        try:
            await self.write(self._ping)
        except (ConnectionError, TimeoutError):
            self.abort()
            return False
        return True

    def _is_free(self) -> bool:
        """Whether all that was written has gone."""
        transport = self._request.transport
        return transport is not None and not transport.get_write_buffer_size()

    async def close(self) -> None:
        """End the response properly."""
        if self.is_open:
            self.is_ended = True
            async with asyncio.timeout(WRITE_TIMEOUT_S):
                await self.response.write_eof()

    async def finish_with(self, chunk: bytes, record: Record, error: ShimpyError) -> None:
        """Send an error as the last chunk, as far as the client still listens."""
        record.outcome, record.error = error.code, error.message
        try:
            await self.write(chunk)
            await self.close()
        except (ConnectionError, TimeoutError):
            self.abort()

    def abort(self) -> None:
        """Drop the connection: the client must not take this for a whole answer."""
        if self._request.transport is not None:
            self._request.transport.abort()


class _Pinger:
    """Pings a stream whenever nothing was sent for PING_AFTER_S, until it is stopped.

    A stream that is never silent costs it no more than a timer.
    """

    def __init__(self, stream: _Stream) -> None:
        self._stream = stream
        self._loop = asyncio.get_running_loop()
        # Once the request is on its way: what is done before that, its client waits for.
        self._timer: asyncio.Handle = self._loop.call_soon(self._look)
        self._pinging: asyncio.Future[None] | None = None

    def _look(self) -> None:
        due_s = self._stream.last_write_s + PING_AFTER_S
        if due_s > self._loop.time():
            self._timer = self._loop.call_at(due_s, self._look)
        else:
            self._pinging = asyncio.ensure_future(self._ping())

    async def _ping(self) -> None:
        if await self._stream.ping():
            self._look()

    async def stop(self) -> None:
        """Ping no more."""
        self._timer.cancel()
        if self._pinging is not None:
            self._pinging.cancel()
            await asyncio.gather(self._pinging, return_exceptions=True)


def ndjson_line(value: Any) -> bytes:
    """Return a value as one line of NDJSON."""
    return encode_json(value) + b"\n"


def sse_data(text: str | bytes) -> bytes:
    """Return one server-sent event; each line of the text becomes a `data:` line.

    Source: WHATWG HTML, 9.2.6: CR, LF and CRLF all end a line; one space after the colon is
    not part of the data.
    """
    data = text.encode() if isinstance(text, str) else text
    lines = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
    return b"".join(b"data: " + line + b"\n" for line in lines) + b"\n"


def sse_json(value: Any, *, event: str | None = None) -> bytes:
    """Return a value as one server-sent event of JSON, with an event name where one is given."""
    name = f"event: {event}\n".encode() if event else b""
    return name + b"data: " + encode_json(value) + b"\n\n"


def json_response(value: Any, *, status: int = 200) -> web.Response:
    """Return a value as a JSON answer."""
    return web.Response(body=encode_json(value), status=status, headers={"Content-Type": JSON})
