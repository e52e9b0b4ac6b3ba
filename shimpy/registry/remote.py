"""Files on servers, read from any byte on: the form in which every source of models offers them.

Whoever opens a file gets its bytes or one of two kinds of error: `TransientError`, after which
trying again may help, or one of `shimpy.errors`, after which it does not.
"""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Final

import msgspec

from shimpy.errors import RemoteError

if TYPE_CHECKING:
    # Imported where it is used: the daemon starts without it.
    import httpx2

# Long enough for a slow server's first byte, short enough to notice a line that went dead.
CONNECT_TIMEOUT_S: Final = 10.0
READ_TIMEOUT_S: Final = 20.0
_BUSY: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
_CONTENT_RANGE: Final = re.compile(r"bytes (?P<start>\d+)-\d+/(?P<total>\d+|\*)")
_PARTIAL: Final = 206
_UNSATISFIABLE: Final = 416


class TransientError(Exception):
    """The line or the server failed in a way that may pass; `retry_after_s` is its own wish."""

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ShrunkError(TransientError):
    """The file ends before the byte that was asked for: it is another one than before."""


class Body(msgspec.Struct, frozen=True, kw_only=True):
    """The bytes of a file from `start` on, as they come in."""

    # 0 where the server sent the whole file though a part was asked for.
    start: int
    # The whole file's size; None: the server does not say.
    total_bytes: int | None
    # What tells versions of the file apart; "": nothing does.
    etag: str
    chunks: Iterator[bytes]
    # Ends a read that hangs, from another thread.
    abort: Callable[[], None]


# Called with the first byte wanted and the one after the last, None: to the end.
Opener = Callable[[int, int | None], AbstractContextManager[Body]]


class RemoteFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file on a server."""

    # Within its repository, with '/'; of a URL the last part.
    path: str
    # None: the server has not said.
    size_bytes: int | None
    # "sha256:<hex>"; "": the server does not know it.
    digest: str
    open: Opener
    # Git's own hash of a file that is in the repository itself; "": not known.
    git_oid: str = ""
    # For people and for telling files without a digest apart.
    url: str = ""

    @property
    def name(self) -> str:
        """The file's name without folders."""
        return PurePosixPath(self.path).name


# Raises the error that a response with a bad status means.
Check = Callable[["httpx2.Response"], None]


@contextmanager
def open_body(
    client: httpx2.Client,
    url: str,
    *,
    start: int,
    end: int | None,
    headers: Mapping[str, str],
    check: Check,
    follow_redirects: bool = True,
    read_timeout_s: float = READ_TIMEOUT_S,
) -> Iterator[Body]:
    """Ask for the bytes [start, end) of a URL and yield them.

    Raises:
        TransientError: the line broke, or the server is busy; also while the chunks are read.
        ShimpyError: what `check` makes of any other bad status.
    """
    import httpx2

    wanted = {**headers, "Accept-Encoding": "identity"}
    if start or end is not None:
        wanted["Range"] = f"bytes={start}-{'' if end is None else end - 1}"
    timeout = httpx2.Timeout(read_timeout_s, connect=CONNECT_TIMEOUT_S)
    with (
        translated(url),
        client.stream(
            "GET", url, headers=wanted, timeout=timeout, follow_redirects=follow_redirects
        ) as response,
    ):
        check_status(response, check)
        begins, total = _extent(response, start)
        yield Body(
            start=begins,
            total_bytes=total,
            etag=_etag(response),
            # As they come off the line: what was gathered to a size would be lost with it.
            chunks=response.iter_raw(),
            abort=_aborter(response),
        )


@contextmanager
def translated(url: str) -> Iterator[None]:
    """Turn what goes wrong on the line into ours."""
    import httpx2

    try:
        yield
    except httpx2.TooManyRedirects as error:
        raise RemoteError(f"{url}: redirects without end") from error
    except (httpx2.InvalidURL, httpx2.UnsupportedProtocol) as error:
        raise RemoteError(f"{url}: can't be asked for: {error}") from error
    except (httpx2.TransportError, httpx2.StreamError) as error:
        reason = str(error) or type(error).__name__
        raise TransientError(f"{url}: {reason}") from error


def check_status(response: httpx2.Response, check: Check) -> None:
    """Return if a response is good, else raise what it means."""
    if response.status_code in _BUSY:
        wish = response.headers.get("Retry-After", "")
        raise TransientError(
            f"{response.url}: the server answers {response.status_code} {response.reason_phrase}",
            retry_after_s=float(wish) if wish.isdigit() else None,
        )
    if response.status_code == _UNSATISFIABLE:
        raise ShrunkError(f"{response.url}: the file has become shorter")
    check(response)


def _extent(response: httpx2.Response, asked: int) -> tuple[int, int | None]:
    """Return where the body begins and how long the whole file is."""
    length = response.headers.get("Content-Length", "")
    if response.status_code != _PARTIAL:
        return 0, int(length) if length.isdigit() else None
    match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if match is None or int(match["start"]) != asked:
        raise RemoteError(
            f"{response.url}: bytes from {asked} on were asked for, and the server answers with "
            f"the range {response.headers.get('Content-Range', '(none)')!r}"
        )
    return asked, None if match["total"] == "*" else int(match["total"])


def _etag(response: httpx2.Response) -> str:
    """Return what tells versions of the file apart: the hub's own mark before the storage's."""
    for answer in (*response.history, response):
        linked = answer.headers.get("X-Linked-Etag")
        if linked:
            return linked.strip('"')
    etag: str = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
    return "" if etag.startswith("W/") else etag.strip('"')


def _aborter(response: httpx2.Response) -> Callable[[], None]:
    stream = response.extensions.get("network_stream")

    def abort() -> None:
        sock = stream.get_extra_info("socket") if stream is not None else None
        if sock is not None:
            # It may be closed already; the reader then needs no waking.
            with contextlib.suppress(OSError, ValueError):
                sock.shutdown(socket.SHUT_RDWR)

    return abort
