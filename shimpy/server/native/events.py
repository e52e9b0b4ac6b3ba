"""GET /api/events: loads, unloads and evictions with their reasons, as server-sent events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from aiohttp import web

from shimpy.errors import InvalidOptionError, ShimpyError
from shimpy.scheduler.reports import HistoryEvent, event_id
from shimpy.server.services import Services, services_of
from shimpy.server.streaming import SSE, StreamForm, encode_json, sse_json, stream_chunks
from shimpy.units import parse_duration

# How long a client of the EventSource kind waits before it comes back; sent at once, so that
# the client knows that it is heard.
_HELLO = b"retry: 2000\n\n"
_FORM = StreamForm(content_type=SSE, error_chunk=lambda error: sse_json(_error(error)))


async def events(request: web.Request) -> web.StreamResponse:
    """GET /api/events: what is loaded, unloaded and evicted, and why, as it happens.

    Server-sent events. `since` in the query or the header Last-Event-ID: first what is
    remembered of what happened after that; `follow=false`: end with that.
    """
    services = services_of(request)
    after = _after(request)
    if request.query.get("follow", "true").lower() in {"false", "0", "no", "off"}:
        return await stream_chunks(request, _past(services, after or 0), _FORM)
    return await stream_chunks(request, _lines(services, after), _FORM)


# Without HEAD, which would wait for an end that never comes.
ROUTES = [web.get("/api/events", events, allow_head=False)]


def _after(request: web.Request) -> int | None:
    """Return the id after which to begin; None: with what comes.

    Raises:
        InvalidOptionError: the header or the query is no such thing.
    """
    last = request.headers.get("Last-Event-ID", "").strip()
    since = request.query.get("since", "").strip()
    if last:
        if not last.isascii() or not last.isdigit():
            raise InvalidOptionError(f"Last-Event-ID is {last[:40]!r}, which is no event's id")
        return int(last)
    return event_id(parse_since(since, time.time())) if since else None


def parse_since(text: str, now: float) -> float:
    """Return a time in seconds since the epoch: such a number, or a duration before now (10m).

    Raises:
        InvalidOptionError: neither.
    """
    try:
        at_s = float(text) if text[:1].isdigit() and text[-1:].isdigit() else None
        at_s = now - parse_duration(text) if at_s is None else at_s
        event_id(at_s)
    except (ValueError, OverflowError):
        raise InvalidOptionError(
            f"since is {text[:40]!r}; it must be a duration back like 10m, or seconds since the "
            "epoch",
            option="since",
        ) from None
    return at_s


async def _past(services: Services, after: int) -> AsyncGenerator[bytes, None]:
    yield _HELLO
    for event in services.scheduler.history():
        if event.id > after:
            yield _chunk(event)


async def _lines(services: Services, after: int | None) -> AsyncGenerator[bytes, None]:
    """Yield the events until the daemon stops."""
    stopping = asyncio.ensure_future(services.lifecycle.stopping.wait())
    try:
        async with aclosing(services.scheduler.events(after)) as happening:
            yield _HELLO
            while (event := await _next(happening, stopping)) is not None:
                yield _chunk(event)
    finally:
        stopping.cancel()


async def _next(
    happening: AsyncGenerator[HistoryEvent, None], stopping: asyncio.Future[Any]
) -> HistoryEvent | None:
    """Return the next event; None: the daemon stops first."""
    coming = asyncio.ensure_future(anext(happening))
    both: set[asyncio.Future[Any]] = {coming, stopping}
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
    finally:
        if not coming.done():
            coming.cancel()
            # Until it has ended the generator can't be closed.
            await asyncio.wait({coming})
    return None if coming.cancelled() else coming.result()


def _chunk(event: HistoryEvent) -> bytes:
    return b"id: %d\ndata: %s\n\n" % (event.id, encode_json(event))


def _error(error: ShimpyError) -> dict[str, str]:
    return {"error": error.message}
