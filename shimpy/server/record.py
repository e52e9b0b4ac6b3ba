"""The one canonical log line of each request, and the request's id.

Handlers fill the record as they learn things; the middleware in `app` logs it once, at the
end, whatever the end was. No prompt or answer is ever in it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

import msgspec
from aiohttp import web

from shimpy.logs import get_logger

_log = get_logger("server")

REQUEST_ID_HEADER = "X-Request-Id"
_SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
# Rounded to what is worth reading: tenths of a millisecond.
_DIGITS = 4
# The id has a name of its own in the line.
_UNLOGGED = frozenset({"request_id", "on_tokens"})


class Record(msgspec.Struct, kw_only=True):
    """What is known of one request; None: never learnt. Times in seconds."""

    request_id: str
    model: str | None = None
    # The id of the API key that it came with; never the key itself.
    key: str | None = None
    status: int | None = None
    # Why it ended: "stop", "length", "client_gone", "stopping"; an error's code.
    outcome: str | None = None
    # An error's message.
    error: str | None = None
    n_prompt: int | None = None
    n_cached: int | None = None
    n_generated: int | None = None
    # Time for a lease: the wait for a free model and, where it was needed, the load.
    acquire_s: float | None = None
    load_s: float | None = None
    queue_s: float | None = None
    prefill_s: float | None = None
    decode_s: float | None = None
    # From the request's arrival to its first token.
    first_token_s: float | None = None
    # Told of tokens that follow others: the model, how many, and the seconds between.
    on_tokens: Callable[[str, int, float], None] | None = None

    def tell_tokens(self, n_tokens: int, gap_s: float) -> None:
        """Tell whoever listens of tokens that came `gap_s` after those before them."""
        if self.on_tokens is not None and self.model is not None:
            self.on_tokens(self.model, n_tokens, gap_s)

    def fields(self) -> dict[str, Any]:
        """Return what is known, rounded, with the speed of the decode, for the log line."""
        known: dict[str, Any] = {}
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if value is not None and name not in _UNLOGGED:
                known[name] = round(value, _DIGITS) if isinstance(value, float) else value
        if self.decode_s and self.n_generated:
            known["decode_per_s"] = round(self.n_generated / self.decode_s, 1)
        return known


_RECORD = web.RequestKey("record", Record)


def request_id_of(request: web.Request) -> str:
    """Return the id that the client gave its request, or a new one."""
    given = request.headers.get(REQUEST_ID_HEADER)
    return given if given and _SANE_ID.fullmatch(given) else os.urandom(8).hex()


def attach_record(request: web.Request) -> Record:
    """Give a request its record and return it."""
    record = Record(request_id=request_id_of(request))
    request[_RECORD] = record
    return record


def record_of(request: web.Request) -> Record:
    """Return the record of a request that went through the app's middleware."""
    return request[_RECORD]


def log_bug(record: Record, error: BaseException) -> None:
    """Log an exception that nobody planned, with its traceback, under the request's id."""
    record.outcome = "internal"
    _log.error("bug", request=record.request_id, exc_info=error)
