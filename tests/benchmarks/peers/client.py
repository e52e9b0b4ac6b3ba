"""A client light enough not to slow what it measures: OpenAI's streams, timed as they come."""

from __future__ import annotations

import asyncio
import bisect
import itertools
import json
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import aiohttp

# Eight long prompts take a peer that computes each beside all others five minutes.
_PATIENCE_S = 900.0
_PATIENCE = aiohttp.ClientTimeout(total=_PATIENCE_S)
_READ_BYTES = 65536
_EVENT = b"data: "
_END = b"[DONE]"
ACCEPTED_S = 0.02
# Tokens of each answer that tell how fast decoding is.
_LEAST_DECODED = 8


@dataclass(slots=True)
class Stream:
    """When the events of one streamed answer came, in seconds since `started_s`."""

    started_s: float
    arrivals_s: list[float] = field(default_factory=list)
    # What came each time; nothing is known of the bare loop's but that it is a token each time.
    arrived: list[bytes] = field(default_factory=list)
    n_events: int = 0
    end_s: float = 0.0
    # Of the servers that tell.
    usage: dict[str, Any] | None = None

    @property
    def first_s(self) -> float:
        return self.arrivals_s[0]

    @property
    def n_tokens(self) -> int:
        """Tokens of the answer; who tells no count sends an event for each."""
        if self.usage is None:
            return self.n_events or len(self.arrivals_s)
        return int(self.usage["completion_tokens"])

    def n_tokens_until(self, when_s: float) -> float:
        """Return how many tokens had come by then.

        Of a server that tells a count an event may hold several: the first to come is one token,
        the rest has as many as its part of the text.
        """
        n_arrivals = bisect.bisect_right(self.arrivals_s, when_s)
        if not n_arrivals or not self.arrived:
            return n_arrivals
        if self.usage is None:
            return sum(map(_n_events, self.arrived[:n_arrivals]))
        n_later = sum(map(_n_characters, self.arrived[1:n_arrivals]))
        n_all_later = n_later + sum(map(_n_characters, self.arrived[n_arrivals:]))
        return 1 + (self.n_tokens - 1) * (n_later / n_all_later if n_all_later else 0)


def connect() -> aiohttp.ClientSession:
    """Return a client; each request has a connection of its own, which some servers close."""
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    return aiohttp.ClientSession(timeout=_PATIENCE, connector=connector)


async def stream(
    url: str,
    body: dict[str, Any],
    *,
    request_id: str = "",
    began: asyncio.Event | None = None,
    began_after: int = 1,
) -> Stream:
    """Read one streamed answer to its end; `began` is set after `began_after` events.

    Over a connection that is there already, as clients keep them, and without an HTTP client: its
    time would count, and on a machine of few cores it would take the server's.
    """
    parts = urlsplit(url)
    data = json.dumps(body).encode()
    named = f"X-Request-Id: {request_id}\r\n" if request_id else ""
    head = (
        f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\n{named}"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n"
        "Connection: close\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        # The kernel has made the connection; the server takes it a moment later.
        await asyncio.sleep(ACCEPTED_S)
        async with asyncio.timeout(_PATIENCE_S):
            found = Stream(time.perf_counter())
            writer.write(head.encode() + data)
            answered = await reader.readuntil(b"\r\n\r\n")
            if not answered.startswith(b"HTTP/1.1 200 "):
                raise RuntimeError(f"{url}: {(answered + await reader.read()).decode()}")
            async for piece in _pieces(reader, answered):
                now_s = time.perf_counter() - found.started_s
                _take(found, piece, now_s)
                if began is not None and found.n_events >= began_after:
                    began.set()
            found.end_s = time.perf_counter() - found.started_s
    finally:
        writer.close()
    # A refusal is quick: it must not count as an answer.
    if not found.arrivals_s:
        raise RuntimeError(f"{url}: an answer of nothing")
    return found


async def _pieces(reader: asyncio.StreamReader, head: bytes) -> AsyncIterator[bytes]:
    """Yield the chunks of an answer as they come; RFC 9112, 7.1."""
    if b"transfer-encoding: chunked" not in head.lower():
        while data := await reader.read(_READ_BYTES):
            yield data
        return
    while n_bytes := int(await reader.readline(), 16):
        yield await reader.readexactly(n_bytes)
        await reader.readexactly(2)


def _take(found: Stream, data: bytes, now_s: float) -> None:
    # The key: a text may be that word.
    if b'"error":' in data:
        raise RuntimeError(f"an error in the midst of an answer: {data!r}")
    n = _n_events(data)
    if n > 0:
        found.arrivals_s.append(now_s)
        found.arrived.append(data)
        found.n_events += n
    if b'"usage":{' in data:
        usages = [event["usage"] for event in _events(data) if event.get("usage")]
        found.usage = usages[-1] if usages else None


def _n_events(data: bytes) -> int:
    # What says that the stream ends is no text.
    return data.count(_EVENT) - (_END in data)


def _n_characters(data: bytes) -> int:
    return sum(len(one["text"]) for event in _events(data) for one in event.get("choices", ()))


def _events(data: bytes) -> list[dict[str, Any]]:
    lines = [line[len(_EVENT) :] for line in data.splitlines() if line.startswith(_EVENT)]
    return [json.loads(line) for line in lines if line != _END]


async def post(http: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> tuple[float, Any]:
    """Return the seconds that an answer took, and the answer."""
    started_s = time.perf_counter()
    async with http.post(url, json=body) as answer:
        data = await answer.json()
        took_s = time.perf_counter() - started_s
        if answer.status != 200:
            raise RuntimeError(f"{url}: {answer.status} {data}")
    return took_s, data


def speeds(streams: Sequence[Stream]) -> dict[str, float]:
    """Return what is compared of answers that were asked for at once.

    tok_per_s: generated tokens by the time of the whole. decode_per_s: the sum of what the streams
    did each second while all answered, no prompt beside them; left out where that was too short.
    """
    firsts_s = [one.first_s for one in streams]
    last_first_s = max(firsts_s)
    first_end_s = min(one.arrivals_s[-1] for one in streams)
    decoded = [_decoded(one, last_first_s, first_end_s) for one in streams]
    metrics = {
        "tok_per_s": sum(one.n_tokens for one in streams) / max(one.end_s for one in streams),
        "ttft_ms": 1000 * statistics.mean(firsts_s),
        "ttft_max_ms": 1000 * last_first_s,
    }
    if sum(n_tokens for n_tokens, _ in decoded) >= _LEAST_DECODED * len(streams):
        metrics["decode_per_s"] = sum(n_tokens / took_s for n_tokens, took_s in decoded if took_s)
    return metrics


def _decoded(one: Stream, since_s: float, until_s: float) -> tuple[float, float]:
    """Return how many tokens came from a stream's first to its last event between, and that time.

    From event to event: what is under way in a later one belongs to the time after.
    """
    times = [time_s for time_s in one.arrivals_s if since_s <= time_s <= until_s]
    if not times:
        return 0, 0.0
    return one.n_tokens_until(times[-1]) - one.n_tokens_until(times[0]), times[-1] - times[0]


def longest_gap_s(found: Stream, since_s: float) -> float:
    """Return the longest time without an event that ended after `since_s` (of its clock)."""
    times = found.arrivals_s
    gaps = [later - sooner for sooner, later in itertools.pairwise(times) if later > since_s]
    return max(gaps, default=0.0)
