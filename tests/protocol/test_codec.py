"""Frames survive any cutting of the byte stream, and hostile bytes are refused at once."""

from __future__ import annotations

import struct
from contextlib import suppress
from itertools import pairwise
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shimpy.errors import ProtocolError
from shimpy.protocol import codec
from shimpy.protocol.codec import MAX_FRAME_BYTES, daemon_decoder, encode_frame, worker_decoder
from shimpy.protocol.messages import (
    Between,
    BufferUse,
    Cancel,
    Delta,
    Done,
    Embed,
    Embedded,
    Events,
    Failed,
    Fim,
    Hello,
    LimitParked,
    Load,
    LoadFailed,
    Loading,
    Prefilled,
    PrefixNews,
    Ready,
    Sampling,
    SetThreads,
    Shutdown,
    Stats,
    Submit,
    Text,
    ToDaemon,
    Tokenize,
    Tokenized,
    TokenLogprob,
    Tokens,
    ToWorker,
)

requests = st.integers(0, 2**53)
floats = st.floats(allow_nan=False)
texts = st.text(max_size=20)
ids = st.lists(st.integers(0, 2**31 - 1), max_size=8)
parts = st.lists(
    st.builds(Text, texts, st.booleans())
    | st.builds(Tokens, ids)
    | st.builds(Between)
    | st.builds(Fim, st.sampled_from(["prefix", "suffix", "middle", "repo", "separator"])),
    max_size=4,
)
samplings = st.builds(
    Sampling,
    temperature=floats,
    top_k=st.integers(-1, 100),
    seed=st.none() | st.integers(-(2**63), 2**63 - 1),
    logit_bias=st.dictionaries(st.integers(0, 1000), floats, max_size=3),
    grammar=st.none() | texts,
    n_logprobs=st.none() | st.integers(0, 20),
)
logprobs: st.SearchStrategy[TokenLogprob] = st.recursive(
    st.builds(TokenLogprob, requests, texts, floats, st.binary(max_size=4)),
    lambda leaves: st.builds(
        TokenLogprob, requests, texts, floats, st.binary(max_size=4), st.lists(leaves, max_size=2)
    ),
    max_leaves=3,
)
events = st.one_of(
    st.builds(Delta, requests, texts, st.integers(0, 9), st.lists(logprobs, max_size=2)),
    st.builds(Prefilled, requests, requests, requests),
    st.builds(
        Done,
        requests,
        st.sampled_from(["stop", "length", "cancelled"]),
        requests,
        requests,
        requests,
        floats,
        floats,
        floats,
        st.none() | texts,
        ids,
    ),
    st.builds(Failed, requests, texts, texts, requests, requests),
)
FOR_WORKER: dict[type, st.SearchStrategy[ToWorker]] = {
    Load: st.builds(Load, texts, st.integers(1, 2**20), devices=st.lists(texts, max_size=2)),
    Submit: st.builds(
        Submit,
        requests,
        parts,
        samplings,
        st.lists(texts, max_size=3),
        n_predict=st.integers(-1, 9),
        truncate=st.booleans(),
    ),
    Embed: st.builds(
        Embed, requests, st.lists(parts, max_size=3), st.booleans(), st.booleans(), st.booleans()
    ),
    Tokenize: st.builds(
        Tokenize,
        requests,
        texts,
        st.none() | ids,
        st.booleans(),
        st.booleans(),
        st.none() | parts,
        st.booleans(),
    ),
    Cancel: st.builds(Cancel, requests),
    SetThreads: st.builds(SetThreads, st.integers(1, 99)),
    LimitParked: st.builds(LimitParked, requests),
    Shutdown: st.builds(Shutdown),
}
stats = st.builds(Stats, requests, requests, requests, requests)
FOR_DAEMON: dict[type, st.SearchStrategy[ToDaemon]] = {
    Hello: st.builds(Hello, requests),
    Loading: st.builds(Loading, floats),
    Ready: st.builds(
        Ready,
        st.lists(st.builds(BufferUse, texts, requests, requests, requests), max_size=2),
        *[requests] * 5,
        floats,
        bos_text=texts,
    ),
    LoadFailed: st.builds(LoadFailed, texts, st.booleans()),
    Events: st.builds(Events, st.lists(events, max_size=4), st.none() | stats),
    Embedded: st.builds(Embedded, requests, requests, st.binary(max_size=40), requests),
    Tokenized: st.builds(
        Tokenized, requests, ids, texts, st.lists(st.binary(max_size=4), max_size=3)
    ),
    Failed: st.builds(Failed, requests, texts, texts),
    PrefixNews: st.builds(
        PrefixNews,
        st.sampled_from(["saved", "restored", "skipped", "discarded"]),
        requests,
        requests,
        floats,
        texts,
    ),
}
to_worker = st.one_of(FOR_WORKER.values())
to_daemon = st.one_of(FOR_DAEMON.values())


def feed_cut(decoder: Any, data: bytes, cuts: list[int]) -> list[Any]:
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [message for start, end in pairwise(places) for message in decoder.feed(data[start:end])]


@given(st.lists(to_worker, max_size=5), st.lists(st.integers(0, 4000), max_size=10))
def test_messages_to_the_worker_survive_any_cutting(
    messages: list[ToWorker], cuts: list[int]
) -> None:
    data = b"".join(encode_frame(message) for message in messages)
    assert feed_cut(worker_decoder(), data, cuts) == messages


@given(st.lists(to_daemon, max_size=5), st.lists(st.integers(0, 4000), max_size=10))
def test_messages_to_the_daemon_survive_any_cutting(
    messages: list[ToDaemon], cuts: list[int]
) -> None:
    data = b"".join(encode_frame(message) for message in messages)
    assert feed_cut(daemon_decoder(), data, cuts) == messages


@given(to_daemon)
def test_a_byte_at_a_time_is_enough(message: ToDaemon) -> None:
    """Nothing comes before the last byte, and all of it with that."""
    decoder = daemon_decoder()
    frame = encode_frame(message)
    for byte in frame[:-1]:
        assert decoder.feed(bytes([byte])) == []
    assert decoder.feed(frame[-1:]) == [message]


def test_every_message_has_a_strategy_here() -> None:
    """A message that is added must be tried too."""
    assert set(FOR_WORKER) == set(get_args(ToWorker))
    assert set(FOR_DAEMON) == set(get_args(ToDaemon))


@given(st.binary(max_size=200), st.lists(st.integers(0, 200), max_size=5))
def test_any_bytes_give_messages_or_one_clear_error(data: bytes, cuts: list[int]) -> None:
    with suppress(ProtocolError):
        messages = feed_cut(worker_decoder(), data, cuts)
        assert all(isinstance(message, tuple(FOR_WORKER)) for message in messages)


@given(st.integers(MAX_FRAME_BYTES + 1, 2**32 - 1))
def test_a_length_over_the_limit_is_refused_before_its_body_comes(length: int) -> None:
    with pytest.raises(ProtocolError, match=f"claims {length} bytes; the limit is"):
        worker_decoder().feed(struct.pack("<I", length))


def test_a_length_at_the_limit_waits_for_its_body() -> None:
    assert worker_decoder().feed(struct.pack("<I", MAX_FRAME_BYTES)) == []


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\xc1", id="no msgpack"),
        pytest.param(b"<html>", id="a web page"),
        pytest.param(msgspec.msgpack.encode({"type": "Nonsense"}), id="unknown message"),
        pytest.param(msgspec.msgpack.encode({"type": "Cancel"}), id="field missing"),
        pytest.param(
            msgspec.msgpack.encode({"type": "Cancel", "request": "seven"}), id="wrong type"
        ),
        pytest.param(encode_frame(Hello(1))[4:], id="the other direction's message"),
        pytest.param(encode_frame(Cancel(1))[4:] + b"\x00", id="bytes behind the message"),
    ],
)
def test_a_body_that_is_no_message_is_refused(body: bytes) -> None:
    with pytest.raises(ProtocolError, match=f"a frame of {len(body)} bytes is no message"):
        worker_decoder().feed(struct.pack("<I", len(body)) + body)


def test_what_came_before_a_bad_frame_is_not_kept_for_later() -> None:
    """The buffer holds no more than a part of one frame."""
    decoder = worker_decoder()
    frame = encode_frame(Cancel(1))
    for _ in range(1000):
        assert decoder.feed(frame + frame[:3]) == [Cancel(1)]
        assert decoder.feed(frame[3:]) == [Cancel(1)]
    assert len(decoder._buffer) == 0


def test_a_message_over_the_limit_is_refused_by_its_sender(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "MAX_FRAME_BYTES", 1000)
    with pytest.raises(ProtocolError, match=r"a Tokenized message of \d+ bytes is over"):
        encode_frame(Tokenized(1, [], "x" * 1000))
    assert encode_frame(Tokenized(1, [], "x" * 900))
