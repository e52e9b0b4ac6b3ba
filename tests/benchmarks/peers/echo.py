"""A server that answers whatever comes with one event at once, and does nothing else.

What an answer of it takes is the kernel's and the client's part of a time to a first token. It
prints its URL, and is ended by a signal.
"""

from __future__ import annotations

import asyncio
from typing import cast

_ANSWER = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
    b"data: {}\n\ndata: [DONE]\n\n"
)


class _Echo(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._transport.write(_ANSWER)
        self._transport.close()


async def main() -> None:
    """Serve."""
    server = await asyncio.get_running_loop().create_server(_Echo, "127.0.0.1", 0)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
