"""The daemon's end of a worker's socket: bytes in as they come, bytes out with backpressure."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import cast


class WorkerChannel(asyncio.Protocol):
    """A connected socket; what comes is handed on within the turn of the loop that read it.

    asyncio's streams put it aside and wake a task, a turn later, for each step of the engine.
    """

    def __init__(self, on_data: Callable[[bytes], None]) -> None:
        self._on_data = on_data
        self._transport: asyncio.Transport | None = None
        # Set while the worker reads as fast as is written.
        self._writable = asyncio.Event()
        self._writable.set()
        self._closed = asyncio.Event()
        # What went wrong with what came.
        self._fault: Exception | None = None

    @classmethod
    async def open(cls, sock: socket.socket, on_data: Callable[[bytes], None]) -> WorkerChannel:
        """Return the channel over a connected socket, which it owns from now on."""
        loop = asyncio.get_running_loop()
        _, channel = await loop.create_connection(lambda: cls(on_data), sock=sock)
        return channel

    def write(self, data: bytes) -> None:
        """Send bytes, in order; nothing happens when the worker is gone."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    async def wait_writable(self) -> None:
        """Wait until the worker has read most of what was written, or is gone."""
        if not self._writable.is_set():
            await self._writable.wait()

    async def wait_closed(self) -> None:
        """Wait until the worker will say no more, and all that it said has been handed on.

        Raises:
            Exception: what `on_data` raised; the channel is closed then.
        """
        await self._closed.wait()
        if self._fault is not None:
            raise self._fault

    def close(self) -> None:
        """Close the socket."""
        if self._transport is not None:
            self._transport.close()

    # --- called by the loop ---------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the transport."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Hand on what came."""
        try:
            self._on_data(data)
        except Exception as error:  # noqa: BLE001 - `wait_closed` raises it
            self._fault = error
            if self._transport is not None:
                self._transport.abort()

    def pause_writing(self) -> None:
        """Have writers wait."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """Let writers go on."""
        self._writable.set()

    def eof_received(self) -> bool:
        """Let those go on who wait for the worker's last word; our end stays open."""
        self._closed.set()
        return True

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's
        """Let all go on who wait."""
        self._writable.set()
        self._closed.set()
