"""The sockets that the daemon listens on."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Sequence

from shimpy.errors import UserError

_BACKLOG = 1024


def split_bind(bind: str) -> tuple[str, int]:
    """Return the host, without brackets, and the port of "host:port"."""
    host, _, port = bind.rpartition(":")
    return host.strip("[]"), int(port)


async def open_sockets(host: str, port: int) -> list[socket.socket]:
    """Return listening sockets, one for each address of `host`; port 0: a free port for all.

    Raises:
        UserError: the address can't be listened on; says why and what to do.
    """
    try:
        found = await asyncio.get_running_loop().getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except OSError as error:
        raise _refusal(host, port, f"there is no such address ({error.strerror})") from error
    opened: list[socket.socket] = []
    try:
        for family, _, _, _, address in dict.fromkeys(found):
            if opened and port == 0:
                address = (address[0], opened[0].getsockname()[1], *address[2:])  # noqa: PLW2901
            opened.append(_open(family, address))
    except OSError as error:
        for sock in opened:
            sock.close()
        raise _refusal(host, port, _reason(error)) from error
    return opened


def urls_of(sockets: Sequence[socket.socket]) -> list[str]:
    """Return the URLs under which listening sockets are reached."""
    urls = []
    for sock in sockets:
        host, port = sock.getsockname()[:2]
        urls.append(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")
    return urls


def _open(family: int, address: tuple[object, ...]) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            # "localhost" has a socket of its own for IPv4.
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
        sock.listen(_BACKLOG)
        sock.setblocking(False)  # noqa: FBT003 - the socket module's own signature
    except OSError:
        sock.close()
        raise
    return sock


def _reason(error: OSError) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            return "another program listens there already (another shimpy serve?)"
        case errno.EACCES:
            return "only root may listen on ports below 1024"
        case errno.EADDRNOTAVAIL:
            return "this machine has no such address"
        case _:
            return error.strerror or str(error)


def _refusal(host: str, port: int, reason: str) -> UserError:
    return UserError(
        f"can't listen on {host} port {port}: {reason}; choose another with --bind HOST:PORT"
    )
