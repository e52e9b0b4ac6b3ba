"""Files at plain addresses. An address is asked for only because a user wrote it.

It may lead on to another one a few times, but not from https to http, and not from the public
internet into the network that the daemon is in: that a user wants to reach something is no
reason to let a stranger's server choose what.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cached_property, partial
from typing import TYPE_CHECKING, Final
from urllib.parse import urljoin, urlsplit

import shimpy
from shimpy.errors import NotFoundError, RemoteError
from shimpy.registry.reference import UrlReference
from shimpy.registry.remote import Body, RemoteFile, open_body

if TYPE_CHECKING:
    import httpx2

MAX_REDIRECTS: Final = 5
_REDIRECT: Final = 3
_REFUSED: Final = frozenset({401, 403})
_GONE: Final = frozenset({404, 410})
_HEADERS: Final = {"User-Agent": f"shimpy/{shimpy.__version__}"}


class _RedirectError(Exception):
    """The server sends us elsewhere."""


class Web:
    """A client for plain addresses; it knows proxies and certificates from the environment."""

    @cached_property
    def _client(self) -> httpx2.Client:
        # Reading certificates takes some 20 ms, and few daemons ever need them.
        import httpx2

        return httpx2.Client(follow_redirects=False)

    def close(self) -> None:
        """Close all connections."""
        self._client.close()

    def describe(self, reference: UrlReference) -> RemoteFile:
        """Return the file at an address; blocking.

        Raises:
            TransientError: the line broke, or the server is busy.
            NotFoundError: there is no such file.
            RemoteError: the server refuses, or leads where it must not.
        """
        with self.open(reference.url, 0, 1) as body:
            size = body.total_bytes
        return RemoteFile(
            path=reference.file_name,
            size_bytes=size,
            digest="",
            open=partial(self.open, reference.url),
            url=reference.url,
        )

    def open(self, url: str, start: int, end: int | None) -> AbstractContextManager[Body]:
        """Open an address, or where it leads to, from a byte on; errors as `describe`."""
        return self._opened(url, start, end)

    def read(self, url: str, *, accept: str, most_bytes: int) -> bytes:
        """Return all of a small answer.

        Raises:
            RemoteError: it is larger than `most_bytes`; else as `describe`.
        """
        headers = {**_HEADERS, "Accept": accept}
        data = b""
        with self._following(url, 0, None, headers) as body:
            for chunk in body.chunks:
                data += chunk
                if len(data) > most_bytes:
                    raise RemoteError(f"{url}: the answer has more than {most_bytes} bytes")
        return data

    @contextmanager
    def _opened(self, url: str, start: int, end: int | None) -> Iterator[Body]:
        with self._following(url, start, end, _HEADERS) as body:
            yield body

    @contextmanager
    def _following(
        self, url: str, start: int, end: int | None, headers: dict[str, str]
    ) -> Iterator[Body]:
        target = url
        with ExitStack() as stack:
            for _ in range(MAX_REDIRECTS + 1):
                try:
                    body = stack.enter_context(
                        open_body(
                            self._client,
                            target,
                            start=start,
                            end=end,
                            headers=headers,
                            check=_check,
                            follow_redirects=False,
                        )
                    )
                except _RedirectError as error:
                    target = urljoin(target, str(error))
                    check_hop(url, target)
                    continue
                yield body
                return
        raise RemoteError(f"{url}: leads on to another address more than {MAX_REDIRECTS} times")


def check_hop(first: str, target: str) -> None:
    """Return if an address may lead to another one; blocking, it asks for names' addresses.

    Raises:
        RemoteError: it may not.
    """
    from_parts, to_parts = urlsplit(first), urlsplit(target)
    schemes = (from_parts.scheme, to_parts.scheme)
    if to_parts.scheme not in {"http", "https"} or schemes == ("https", "http"):
        raise RemoteError(
            f"{first}: leads to {target}, and from {from_parts.scheme} only https is followed"
        )
    if _is_inside(to_parts.hostname) and not _is_inside(from_parts.hostname):
        raise RemoteError(
            f"{first}: leads into this machine's own network ({to_parts.hostname}), where a "
            "stranger's server may send nobody; ask for that address itself if you mean it"
        )


def _is_inside(host: str | None) -> bool:
    """Whether a host is not of the public internet, by any of its addresses."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        # Nothing can be reached there, or only a proxy knows it.
        return False
    return any(
        not ipaddress.ip_address(str(entry[4][0]).partition("%")[0]).is_global for entry in found
    )


def _check(response: httpx2.Response) -> None:
    status = response.status_code
    said = f"{status} {response.reason_phrase}".strip()
    if status // 100 == _REDIRECT and "Location" in response.headers:
        raise _RedirectError(response.headers["Location"])
    if status in _GONE:
        raise NotFoundError(f"{response.url}: there is nothing there ({said})")
    if status in _REFUSED:
        raise RemoteError(f"{response.url}: the server refuses ({said}); it may want a login")
    if not response.is_success:
        raise RemoteError(f"{response.url}: the server answers {said}")
