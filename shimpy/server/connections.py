"""Connections: accepted up to a limit, and dropped when they bring nothing.

Beyond the limit a client is told so and hung up on, before the process runs out of file
descriptors: then nothing would work any more, not even what runs already.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
import ssl
from collections.abc import Callable, Sequence
from typing import cast

from aiohttp import web

from shimpy.logs import get_logger

# For a request's head to be there, from the connection's start or the last answer's end.
IDLE_TIMEOUT_S = 75.0
_HANDSHAKE_TIMEOUT_S = 15.0
# Files that the daemon needs beside connections: workers' pipes, the index, downloads.
_OTHER_FILES = 256
_MAX_REASON = 200

_BUSY = (
    b"HTTP/1.1 503 Service Unavailable\r\n"
    b"Content-Type: application/json\r\n"
    b"Content-Length: %d\r\nRetry-After: 1\r\nConnection: close\r\n\r\n%b"
)
_BUSY_BODY = b'{"error":"too many connections (max_connections); try again in a moment"}'

_log = get_logger("server")


class Connections:
    """The listening sockets of one runner."""

    def __init__(
        self, runner: web.AppRunner, *, limit: int, tls: ssl.SSLContext | None = None
    ) -> None:
        assert runner.server is not None, "the runner is set up"
        # Called, it makes the protocol of a connection, as asyncio wants it.
        make = cast("Callable[[], asyncio.Protocol]", runner.server)
        server = runner.server

        def accept() -> asyncio.Protocol:
            if len(server.connections) < limit:
                return make()
            _log.warning("too_many_connections", limit=limit)
            return _Refusal()

        self._accept = accept
        self._tls = tls
        self._servers: list[asyncio.Server] = []

    async def listen(self, sockets: Sequence[socket.socket]) -> None:
        """Take connections from now on; TLS is not for Unix sockets."""
        loop = asyncio.get_running_loop()
        for sock in sockets:
            tls = None if sock.family == socket.AF_UNIX else self._tls
            self._servers.append(
                await loop.create_server(
                    self._accept,
                    sock=sock,
                    ssl=tls,
                    ssl_handshake_timeout=_HANDSHAKE_TIMEOUT_S if tls else None,
                )
            )

    def stop_listening(self) -> None:
        """Take no more connections; those that are there stay."""
        for server in self._servers:
            server.close()


class _Refusal(asyncio.Protocol):
    """Says that there are too many, and hangs up."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        sender = cast("asyncio.Transport", transport)
        sender.write(_BUSY % (len(_BUSY_BODY), _BUSY_BODY))
        sender.close()


def http_logger() -> logging.Logger:
    """Return the logger for aiohttp's own complaints: one line each, in our form."""
    logger = logging.Logger("shimpy.http", logging.WARNING)  # noqa: LOG001 - ours, not global
    logger.addHandler(_OneLine())
    return logger


class _OneLine(logging.Handler):
    """What came was no HTTP, mostly: anybody can send that, and no traceback helps."""

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        reason = " ".join(str(error or record.getMessage()).split())
        _log.warning("bad_http", reason=reason[:_MAX_REASON])


def allow_files(n_connections: int) -> int:
    """Raise the limit of open files as far as is allowed; return the connections that it bears."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = n_connections + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return n_connections
    bearable = max(1, soft - _OTHER_FILES)
    _log.warning("few_files", limit=soft, max_connections=bearable, wanted=n_connections)
    return bearable
