"""Who may do what: API keys, and the users behind a Unix socket.

- Keys are demanded as soon as there is one, and always where other machines can connect (the
  daemon doesn't start there without a key, unless `insecure` says that anybody may come in).
- Over a Unix socket the kernel tells who connects: root and the daemon's own user may do
  everything; others whom the socket's mode lets in may infer, and whatever a key adds.
- What a route needs follows from its method and path; what is not known to be harmless needs
  `manage`.
"""

from __future__ import annotations

import os
import socket
import struct

import msgspec
from aiohttp import hdrs, web

from shimpy.errors import RegistryError
from shimpy.keys import Key, KeyFile, Scope
from shimpy.server.errors import ForbiddenError, UnauthorizedError

# For load balancers, monitors, and clients that look whether anybody is there.
_OPEN = frozenset({"/", "/health", "/v1/health", "/ready"})
# /diag names folders and settings.
_ADMIN = frozenset({"/api/reload", "/diag"})
# Ollama's and shimpy's own routes that change nothing though they are no GET.
_INFER = frozenset(
    {
        "/api/generate",
        "/api/chat",
        "/api/embed",
        "/api/embeddings",
        "/api/show",
        "/api/plan",
    }
)
_READING = frozenset({hdrs.METH_GET, hdrs.METH_HEAD, hdrs.METH_OPTIONS})
# struct ucred: pid, uid, gid.
_UCRED = struct.Struct("3i")


def scope_of(method: str, path: str) -> Scope | None:
    """Return what a request needs; None: nothing."""
    if path in _OPEN:
        return None
    if path in _ADMIN:
        return "admin"
    if method in _READING or path in _INFER:
        return "infer"
    # OpenAI's, Anthropic's and llama.cpp's dialects have no way to change what is installed.
    return "manage" if path.startswith("/api/") else "infer"


class Gate(msgspec.Struct, frozen=True, kw_only=True):
    """The rule for one daemon; `is_exposed`: other machines can connect, and need a key."""

    keys: KeyFile
    is_exposed: bool = False

    def check(self, request: web.Request) -> Key | None:
        """Let a request pass, and return the key that it came with.

        Raises:
            UnauthorizedError: it needs a key and has none that is known.
            ForbiddenError: its key may do other things, not this.
        """
        scope = scope_of(request.method, request.path)
        if scope is None:
            return None
        uid = peer_uid(request)
        if uid is not None and uid in {0, os.geteuid()}:
            return None
        key = self._key_of(request)
        if uid is not None and scope == "infer":
            return key
        if key is None and uid is None and not self._demands_key():
            return None
        if key is None and _tokens(request):
            raise UnauthorizedError(
                "the API key that was sent is none of this daemon's: it was revoked, or is "
                "another's; `shimpy keys list` names those that there are, `shimpy keys create` "
                "makes one"
            )
        if key is None:
            raise UnauthorizedError(
                "this needs an API key: send it as `Authorization: Bearer KEY` or `x-api-key`, "
                "or set SHIMPY_API_KEY for shimpy's own commands; `shimpy keys create` makes one"
            )
        if not key.allows(scope):
            raise ForbiddenError(
                f"the key {key.name!r} may {', '.join(key.scopes)}; this needs {scope}"
            )
        return key

    def _demands_key(self) -> bool:
        try:
            return self.is_exposed or bool(self.keys.all())
        except RegistryError as error:
            # There were keys: who can't be checked does not come in.
            raise UnauthorizedError(error.message) from error

    def _key_of(self, request: web.Request) -> Key | None:
        try:
            for token in _tokens(request):
                key = self.keys.find(token)
                if key is not None:
                    return key
        except RegistryError as error:
            raise UnauthorizedError(error.message) from error
        return None


def peer_uid(request: web.Request) -> int | None:
    """Return the user at the other end of a Unix socket; None: it is no Unix socket.

    Where the system doesn't tell, it is the daemon's own user: nobody else can open the socket
    there (`listening`).
    """
    transport = request.transport
    # The address of a network socket is a tuple; to ask the socket for its family takes longer.
    if transport is None or isinstance(transport.get_extra_info("sockname"), tuple):
        return None
    sock = transport.get_extra_info("socket")
    if sock is None or sock.family != socket.AF_UNIX:
        return None
    if not hasattr(socket, "SO_PEERCRED"):
        return os.geteuid()
    _, uid, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return int(uid)


def _tokens(request: web.Request) -> list[str]:
    scheme, _, bearer = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
    given = [bearer.strip()] if scheme.lower() == "bearer" else []
    given.append(request.headers.get("x-api-key", "").strip())
    return [token for token in given if token]
