"""A client light enough not to slow what it measures: OpenAI's streams, timed as they come."""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import aiohttp

_PATIENCE = aiohttp.ClientTimeout(total=280)
_EVENT = b"data: "
_ACCEPTED_S = 0.02
# Tokens of each answer that tell how fast decoding is.
_LEAST_DECODED = 8


@dataclass(slots=True)
class Stream:
    """When the events of one streamed answer came, in seconds since `started_s`."""

    started_s: float
    arrivals_s: list[float] = field(default_factory=list)
    # How many events came with each arrival.
    n_arrived: list[int] = field(default_factory=list)
    end_s: float = 0.0
    # Of the servers that tell.
    usage: dict[str, Any] | None = None

    @property
    def first_s(self) -> float:
        return self.arrivals_s[0]

    @property
    def n_events(self) -> int:
        return sum(self.n_arrived)

    @property
    def n_tokens(self) -> int:
        """Tokens of the answer; who tells no count sends an event for each."""
        if self.usage is None:
            return self.n_events
        return int(self.usage["completion_tokens"])

    def n_tokens_until(self, when_s: float) -> float:
        """Return how many tokens had come by then; each event has as many as the others."""
        arrived = zip(self.arrivals_s, self.n_arrived, strict=True)
        n_events = sum(n for at_s, n in arrived if at_s <= when_s)
        return n_events * self.n_tokens / self.n_events


def connect() -> aiohttp.ClientSession:
    """Return a client; each request has a connection of its own, which some servers close."""
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    return aiohttp.ClientSession(timeout=_PATIENCE, connector=connector)


async def stream(
    http: aiohttp.ClientSession,
    url: str,
    body: dict[str, Any],
    *,
    began: asyncio.Event | None = None,
    began_after: int = 1,
) -> Stream:
    """Read one streamed answer to its end; `began` is set after `began_after` events."""
    found = Stream(time.perf_counter())
    async with http.post(url, json=body) as answer:
        if answer.status != 200:
            raise RuntimeError(f"{url}: {answer.status} {await answer.text()}")
        async for data in answer.content.iter_any():
            now_s = time.perf_counter() - found.started_s
            n = data.count(_EVENT)
            # What says that the stream ends is no text.
            n -= b"[DONE]" in data
            if n > 0:
                found.arrivals_s.append(now_s)
                found.n_arrived.append(n)
            if began is not None and not began.is_set() and found.n_events >= began_after:
                began.set()
            if b'"usage":{' in data:
                found.usage = _usage(data)
            if b'"error"' in data:
                raise RuntimeError(f"{url}: {data!r}")
    found.end_s = time.perf_counter() - found.started_s
    # A refusal is quick: it must not count as an answer.
    if not found.arrivals_s:
        raise RuntimeError(f"{url}: an answer of nothing")
    return found


async def time_to_first_s(url: str, body: dict[str, Any], request_id: str) -> float:
    """Return the seconds from a streamed answer's request to its first event; read it whole.

    Over a connection that is there already and without an HTTP client, whose time would count.
    """
    parts = urlsplit(url)
    data = json.dumps(body).encode()
    head = (
        f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nX-Request-Id: {request_id}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        # The kernel has made the connection; the server takes it a moment later.
        await asyncio.sleep(_ACCEPTED_S)
        started_s = time.perf_counter()
        writer.write(head.encode() + data)
        answer = await reader.readuntil(_EVENT)
        first_s = time.perf_counter() - started_s
        if not answer.startswith(b"HTTP/1.1 200 "):
            raise RuntimeError(f"{url}: {answer!r}")
        await reader.readuntil(_EVENT + b"[DONE]")
    finally:
        writer.close()
    return first_s


def _usage(data: bytes) -> dict[str, Any] | None:
    for line in data.splitlines():
        if line.startswith(_EVENT) and b'"usage":{' in line:
            usage: dict[str, Any] = json.loads(line[len(_EVENT) :])["usage"]
            return usage
    return None


async def post(http: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> tuple[float, Any]:
    """Return the seconds that an answer took, and the answer."""
    started_s = time.perf_counter()
    async with http.post(url, json=body) as answer:
        data = await answer.json()
        took_s = time.perf_counter() - started_s
        if answer.status != 200:
            raise RuntimeError(f"{url}: {answer.status} {data}")
    return took_s, data


def speeds(streams: Sequence[Stream], n_prompt: int) -> dict[str, float]:
    """Return what is compared of answers that were asked for at once.

    tok_per_s: generated tokens by the time of the whole. prefill_per_s: what was computed until
    the last first token, prompts and the tokens of those that answered already, by that time.
    decode_per_s: tokens of all while all answered, no prompt beside them, by that time; left out
    where that was too short.
    """
    n = len(streams)
    firsts_s = [one.first_s for one in streams]
    last_first_s = max(firsts_s)
    first_end_s = min(one.arrivals_s[-1] for one in streams)
    n_before = sum(one.n_tokens_until(last_first_s) for one in streams)
    n_between = sum(one.n_tokens_until(first_end_s) for one in streams) - n_before
    metrics = {
        "tok_per_s": sum(one.n_tokens for one in streams) / max(one.end_s for one in streams),
        "prefill_per_s": (n * n_prompt + n_before - n) / last_first_s,
        "ttft_ms": 1000 * statistics.mean(firsts_s),
        "ttft_max_ms": 1000 * last_first_s,
    }
    if n_between >= _LEAST_DECODED * n:
        metrics["decode_per_s"] = n_between / (first_end_s - last_first_s)
    return metrics


def longest_gap_s(found: Stream, since_s: float) -> float:
    """Return the longest time without an event that ended after `since_s` (of its clock)."""
    times = found.arrivals_s
    gaps = [later - sooner for sooner, later in itertools.pairwise(times) if later > since_s]
    return max(gaps, default=0.0)
