"""How many tokens of a streamed answer had come at a time, whoever the server is."""

from __future__ import annotations

import json

import pytest

from tests.benchmarks.peers.client import Stream, speeds


def event(text: str) -> bytes:
    return b"data: " + json.dumps({"choices": [{"text": text}]}).encode() + b"\n\n"


def stream(*arrived: bytes, n_tokens: int | None = None) -> Stream:
    """Return an answer of which something came each second, from the first on."""
    found = Stream(0.0, [1.0 + index for index in range(len(arrived))], list(arrived))
    found.n_events = sum(data.count(b"data: ") for data in arrived)
    found.usage = None if n_tokens is None else {"completion_tokens": n_tokens}
    found.end_s = found.arrivals_s[-1]
    return found


def test_who_tells_no_count_sends_a_token_in_each_event() -> None:
    found = stream(event("a"), event("b") + event("c"), event("d"))
    assert found.n_tokens == 4
    assert [found.n_tokens_until(at_s) for at_s in (0.5, 1, 2, 2.5, 9)] == [0, 1, 3, 3, 4]


def test_events_of_several_tokens_have_them_by_their_text() -> None:
    found = stream(event("one"), event("abcd"), event("ab") + event("cd"), event("ab"), n_tokens=11)
    assert [found.n_tokens_until(at_s) for at_s in (0.5, 1, 2, 3, 4)] == [0, 1, 5, 9, 11]


def test_the_bare_loop_tells_of_each_token() -> None:
    found = Stream(0.0, [0.5, 1.0, 1.5], end_s=1.5)
    assert found.n_tokens == 3
    assert found.n_tokens_until(1.2) == 2


@pytest.mark.parametrize("n_together", [1, 3, 10])
def test_decoding_is_as_fast_however_many_tokens_share_an_event(n_together: int) -> None:
    times = [0.1 + 0.01 * n for n in range(0, 61, n_together)]
    arrived = [event("x")] + [event("x" * n_together)] * (len(times) - 1)
    found = Stream(0.0, times, arrived, end_s=times[-1], usage={"completion_tokens": 61})
    assert speeds([found])["decode_per_s"] == pytest.approx(100)


def test_what_is_under_way_as_the_first_stream_ends_is_not_missed() -> None:
    """Streams of a step end together, and are read one after the other."""
    streams = []
    for index in range(8):
        times = [0.1, *(0.1 + 0.05 * n + 0.001 * index for n in range(1, 13))]
        arrived = [event("x"), *([event("xxxxx")] * 12)]
        usage = {"completion_tokens": 61}
        streams.append(Stream(0.0, times, arrived, end_s=times[-1], usage=usage))
    # Of the first one 600 ms, of the others 550 and a few.
    assert speeds(streams)["decode_per_s"] == pytest.approx(800, rel=0.01)
