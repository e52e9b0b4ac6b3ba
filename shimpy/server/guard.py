"""Who may ask: the Host and Origin checks against DNS rebinding and foreign web pages.

A browser lets any page send requests to loopback, and a name that an attacker owns can be
made to resolve to it. So on a loopback address only loopback's own names are accepted as
Host; and an Origin, which browsers and editors' web views send, must be this machine or an
application's own scheme. Tools send no Origin and are not affected.
"""

from __future__ import annotations

import ipaddress
import re
from functools import lru_cache
from urllib.parse import urlsplit

import msgspec

from shimpy.server.errors import ForbiddenError

# Schemes of applications' own web views: no web page can have them.
APP_SCHEMES = frozenset({"app", "file", "tauri", "vscode-webview", "vscode-file"})
ALLOWED_METHODS = "GET, POST, PUT, PATCH, DELETE, HEAD, OPTIONS"
MAX_AGE_S = 600


class Guard(msgspec.Struct, frozen=True, kw_only=True):
    """The rule for one bind address; `host` is the address that the daemon listens on."""

    host: str
    # Of the `origins` setting: pages elsewhere that may use the daemon; "*": all.
    origins: tuple[str, ...] = ()

    def check(self, *, host: str | None, origin: str | None) -> None:
        """Let a request pass by its Host and Origin headers.

        Raises:
            ForbiddenError: one of them is foreign.
        """
        if _is_loopback(self.host) and host and not self._is_own_or_proxy(_hostname(host)):
            raise ForbiddenError(
                f"the Host {host!r} is not this machine; reach the daemon as localhost, bind it to "
                f"an address of the network, or name a proxy's own in --origins"
            )
        if origin is not None and not self.allows_origin(origin):
            raise ForbiddenError(f"requests from the Origin {origin!r} are not let in (--origins)")

    def allows_origin(self, origin: str) -> bool:
        """Whether a page or application of this Origin may use the daemon."""
        scheme, separator, netloc = origin.partition("://")
        if not separator:
            return False
        if any(_matches(origin.lower(), listed) for listed in self.origins):
            return True
        if scheme.lower() in APP_SCHEMES:
            return True
        return scheme.lower() in {"http", "https"} and self._is_own(_hostname(netloc))

    def _is_own_or_proxy(self, name: str) -> bool:
        """Whether a Host is ours, or that of a listed origin: a proxy passes its own on."""
        if self._is_own(name):
            return True
        return name in {_hostname(origin.partition("://")[2]) for origin in self.origins} - {""}

    def _is_own(self, name: str) -> bool:
        if not name:
            return False
        # 0.0.0.0 reaches this machine and no other.
        return _is_loopback(name) or name in {self.host.lower(), "0.0.0.0", "::"}  # noqa: S104


def cors_headers(origin: str, requested: str | None) -> dict[str, str]:
    """Return what tells a browser that the Origin may read the answer.

    Args:
        origin: an Origin that passed the guard.
        requested: the preflight's Access-Control-Request-Headers; None outside a preflight.
    """
    headers = {"Access-Control-Allow-Origin": origin, "Vary": "Origin"}
    if requested is not None:
        headers["Access-Control-Allow-Methods"] = ALLOWED_METHODS
        headers["Access-Control-Max-Age"] = str(MAX_AGE_S)
        if requested:
            headers["Access-Control-Allow-Headers"] = requested
    return headers


def _matches(origin: str, listed: str) -> bool:
    """Whether an origin is the listed one, in which * stands for any text."""
    return re.fullmatch(".*".join(map(re.escape, listed.split("*"))), origin) is not None


# Clients send the same few again and again.
@lru_cache(maxsize=64)
def _hostname(netloc: str) -> str:
    """Return the host of "host:port" in lower case, without brackets; "" for nonsense."""
    try:
        return (urlsplit(f"//{netloc}").hostname or "").rstrip(".")
    except ValueError:
        return ""


@lru_cache(maxsize=64)
def _is_loopback(name: str) -> bool:
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return address.is_loopback
