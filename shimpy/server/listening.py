"""The sockets that the daemon listens on."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import socket
from collections.abc import Sequence
from pathlib import Path

from shimpy.errors import UserError
from shimpy.values import UNIX

_BACKLOG = 1024


def split_bind(bind: str) -> tuple[str, int]:
    """Return the host, without brackets, and the port of "host:port"."""
    host, _, port = bind.rpartition(":")
    return host.strip("[]"), int(port)


async def open_bind(bind: str) -> list[socket.socket]:
    """Return listening sockets for a `bind` setting; errors as `open_sockets`."""
    if bind.startswith(UNIX):
        path = Path(bind.removeprefix(UNIX))
        return [await asyncio.to_thread(_open_unix, path)]
    return await open_sockets(*split_bind(bind))


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


def urls_of(sockets: Sequence[socket.socket], *, scheme: str = "http") -> list[str]:
    """Return the URLs under which listening sockets are reached; unix:/path for Unix sockets."""
    urls = []
    for sock in sockets:
        if sock.family == socket.AF_UNIX:
            urls.append(f"{UNIX}{sock.getsockname()}")
            continue
        host, port = sock.getsockname()[:2]
        urls.append(f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}")
    return urls


def exposed_host(sockets: Sequence[socket.socket]) -> str | None:
    """Return the address among those listened on that other machines reach; None: none."""
    for sock in sockets:
        if sock.family != socket.AF_UNIX:
            host = str(sock.getsockname()[0])
            if not ipaddress.ip_address(host.partition("%")[0]).is_loopback:
                return host
    return None


def unix_paths(sockets: Sequence[socket.socket]) -> list[Path]:
    """Return the files of Unix sockets that are open."""
    return [Path(sock.getsockname()) for sock in sockets if sock.family == socket.AF_UNIX]


def _open_unix(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.is_socket() and not _is_answered(path):
            # Left by a daemon that was killed.
            path.unlink()
        sock.bind(str(path))
        # Nobody can connect before listen(). Where the system tells who connects, the group may.
        path.chmod(0o660 if hasattr(socket, "SO_PEERCRED") else 0o600)
        sock.listen(_BACKLOG)
        sock.setblocking(False)  # noqa: FBT003 - the socket module's own signature
    except OSError as error:
        sock.close()
        raise UserError(f"can't listen on {path}: {_unix_reason(error)}") from error
    return sock


def _is_answered(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(str(path)) == 0


def _unix_reason(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "another program listens there already (another shimpy serve?), or it is a file"
    return error.strerror or str(error)


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
