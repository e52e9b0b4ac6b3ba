"""The worker's end of its socket to the daemon: frames out under a lock, frames in."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

from shimpy.protocol.codec import encode_frame, worker_decoder
from shimpy.protocol.messages import ToDaemon, ToWorker

_RECEIVE_BYTES = 256 * 1024


class Channel:
    """A connected socket; any thread may send, one thread receives."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._lock = threading.Lock()

    def send(self, message: ToDaemon) -> None:
        """Send one message whole, waiting while the daemon is slow to read.

        Raises:
            OSError: the daemon is gone.
        """
        frame = encode_frame(message)
        with self._lock:
            self._socket.sendall(frame)

    def receive(self) -> Iterator[ToWorker]:
        """Yield messages until the daemon is gone.

        Raises:
            ProtocolError: what came is no message.
        """
        decoder = worker_decoder()
        while data := self._receive_some():
            yield from decoder.feed(data)

    def _receive_some(self) -> bytes:
        try:
            return self._socket.recv(_RECEIVE_BYTES)
        except ConnectionError:
            return b""
