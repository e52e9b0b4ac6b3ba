"""One request and what it is told; what a step sends; how the engine ends."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NoReturn
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shimpy.engine import loop
from shimpy.engine.backend import Chunk
from shimpy.engine.halving import Halving
from shimpy.engine.outbox import INTERVAL_S
from shimpy.errors import ProtocolError
from shimpy.protocol.messages import (
    Between,
    Cancel,
    Delta,
    Done,
    Embed,
    Embedded,
    Events,
    Fim,
    LimitParked,
    Load,
    Prefilled,
    Sampling,
    SetThreads,
    Shutdown,
    Stats,
    Text,
    ToDaemon,
    Tokenize,
    Tokenized,
    Tokens,
)
from tests.engine.harness import Rig
from tests.fake_backend import CONTROL, EOS, FIRST_WORD, WORDS, FakeBackend, vector


def word(text: str) -> int:
    return FIRST_WORD + WORDS.index(text.encode())


THE, FOX, A, AN, AND, END = (word(f" {text}") for text in ("the", "fox", "a", "an", "and", "end"))
NEWLINE = word("\n")


def scripted(*tokens: int, **shape: Any) -> Rig:
    """A rig whose model says these tokens to everyone."""
    return Rig(FakeBackend(script=tokens, **shape))


# --- the course of a request ---


def test_a_request_is_prefilled_then_speaks_then_is_done() -> None:
    rig = scripted(THE, FOX, EOS)
    heard: list[ToDaemon] = []
    rig.hear = heard.append  # type: ignore[method-assign]
    rig.submit(1, "hi")
    rig.finish()
    events = [event for message in heard if isinstance(message, Events) for event in message.events]
    assert events == [
        Prefilled(1, 3, 0),
        Delta(1, " the", 1),
        Delta(1, " fox", 1),
        Done(1, "stop", 3, 0, 3, 0.0, 0.0),
    ]


def test_one_frame_a_step_holds_the_news_of_all() -> None:
    rig = scripted(*[THE] * 9)
    for request in range(4):
        rig.submit(request, "hi", n_predict=9)
    rig.step(2)
    n_frames = rig.n_frames
    for _ in range(5):
        rig.now += 2 * INTERVAL_S
        rig.step()
    assert rig.n_frames == n_frames + 5
    assert [rig.told[request].n_tokens for request in range(4)] == [7] * 4


def test_two_halves_of_a_step_share_a_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    """The daemon need not wake up for each."""
    monkeypatch.setattr(Halving, "divides", lambda _, n_streams: n_streams > 1)
    rig = scripted(*[THE] * 99)
    for request in range(4):
        rig.submit(request, "hi", n_predict=99)
    rig.step(3)
    n_told, n_frames = [], rig.n_frames
    for _ in range(5):
        for _ in range(2):
            rig.now += 2 * INTERVAL_S
            rig.step()
        n_told.append([rig.told[request].n_tokens for request in range(4)])
    assert rig.n_frames == n_frames + 5
    assert all(after[i] == before[i] + 1 for before, after in pairwise(n_told) for i in range(4))


def test_text_of_quick_steps_shares_a_frame_but_a_first_token_and_an_end_do_not_wait() -> None:
    rig = scripted(*[THE] * 9)
    rig.now = 1.0
    rig.submit(1, "hi", n_predict=9)
    n_told = []
    for _ in range(9):
        rig.step()
        n_told.append(rig.told[1].n_tokens)
        rig.now += 0.3 * INTERVAL_S
    # The first; every third; the end.
    assert n_told == [1, 1, 1, 4, 4, 4, 7, 7, 9]


@pytest.mark.parametrize("n_ms", [9, 14, 30])
def test_each_step_of_a_common_model_has_a_frame(n_ms: int) -> None:
    rig = scripted(*[THE] * 9)
    rig.now = 1.0
    rig.submit(1, "hi", n_predict=9)
    for n_told in range(1, 9):
        rig.step()
        assert rig.told[1].n_tokens == n_told
        rig.now += n_ms / 1000


@given(st.lists(st.floats(0.0001, 0.0083), min_size=20, max_size=60))
def test_no_text_is_later_than_a_screen_shows_it(steps_s: list[float]) -> None:
    """But where a step takes longer than the one before."""
    rig = scripted(*[THE] * 99)
    rig.now = 1.0
    rig.submit(1, "hi", n_predict=99)
    rig.step(2)
    sent_s, n_told = rig.now, rig.told[1].n_tokens
    for before_s, step_s in pairwise([0.0, *steps_s]):
        rig.now += step_s
        rig.step()
        if rig.told[1].n_tokens > n_told:
            sent_s, n_told = rig.now, rig.told[1].n_tokens
        assert rig.now - sent_s <= INTERVAL_S + max(0.0, step_s - before_s)


def test_what_waited_for_a_frame_is_one_delta_before_the_end() -> None:
    rig = scripted(THE, FOX, THE, FOX, EOS)
    heard: list[ToDaemon] = []
    rig.hear = heard.append  # type: ignore[method-assign]
    rig.now = 1.0
    rig.submit(1, "hi")
    rig.finish()
    frames = [message.events for message in heard if isinstance(message, Events)]
    assert [[type(event) for event in frame] for frame in frames] == [
        [Prefilled, Delta],
        [Delta, Done],
    ]
    assert frames[-1][0] == Delta(1, " fox the fox", 3)


def test_no_text_waits_for_a_step_that_may_be_long() -> None:
    rig = scripted(*[THE] * 99)
    rig.submit(1, "hi", n_predict=9)
    rig.step(4)
    assert rig.told[1].n_tokens == 1
    rig.submit(2, "other", n_predict=9)
    told: list[int] = []
    decode = rig.backend.decode

    def look(chunks: Sequence[Chunk]) -> int:
        told.append(rig.told[1].n_tokens)
        return decode(chunks)

    rig.backend.decode = look  # type: ignore[method-assign]
    rig.step()
    assert told == [4]


def test_a_first_token_is_told_before_others_are_drawn() -> None:
    rig = scripted(*[THE] * 99)
    rig.submit(1, "hi", n_predict=9)
    rig.step(3)
    rig.submit(2, "other", n_predict=9)
    heard: list[list[int]] = []
    hear = rig.hear

    def listen(message: ToDaemon) -> None:
        if isinstance(message, Events):
            heard.append([event.request for event in message.events])
        hear(message)

    rig.hear = listen  # type: ignore[method-assign]
    rig.now += 2 * INTERVAL_S
    rig.step()
    # What was held back of the first one's; the newcomer's; then the first one's next.
    assert heard == [[1], [2, 2], [1]]


def test_tokens_without_text_are_counted_with_the_next_text() -> None:
    first = FIRST_WORD + WORDS.index("日".encode()[:1])
    rig = scripted(first, first + 1, EOS)
    rig.submit(1, "hi")
    rig.finish()
    assert (rig.told[1].text, rig.told[1].n_tokens) == ("日", 2)


def test_no_new_tokens_means_prefill_only() -> None:
    """It fills the cache for the next request."""
    rig = Rig()
    rig.submit(1, "hello there", n_predict=0)
    rig.finish()
    done = rig.told[1].done
    assert (done.reason, done.n_prompt, done.n_generated) == ("length", 12, 0)
    rig.submit(2, "hello there", n_predict=0)
    rig.finish()
    assert rig.told[2].done.n_cached == 11


def test_the_limit_of_new_tokens_ends_it() -> None:
    rig = scripted(*[THE] * 9)
    rig.submit(1, "hi", n_predict=3)
    rig.finish()
    done = rig.told[1].done
    assert (rig.told[1].text, done.reason, done.n_generated) == (" the the the", "length", 3)


def test_the_full_context_ends_it() -> None:
    rig = scripted(*[THE] * 999, n_ctx=64)
    rig.submit(1, "hi")
    rig.finish()
    assert (rig.told[1].done.reason, rig.told[1].done.n_generated) == ("length", 61)


def test_without_a_limit_a_shifting_context_ends_after_ten_times_its_length() -> None:
    rig = scripted(*[THE] * 999, n_ctx=64)
    rig.submit(1, "hi", shift=True)
    rig.finish()
    assert (rig.told[1].done.reason, rig.told[1].done.n_generated) == ("length", 640)


def test_a_stop_string_ends_it_and_stays_out_of_text_and_tokens() -> None:
    rig = scripted(THE, FOX, A, AN, AND)
    rig.submit(1, "hi", stop=["x a an"], return_tokens=True)
    rig.finish()
    told = rig.told[1]
    assert (told.text, told.done.reason, told.done.stop_string) == (" the fo", "stop", "x a an")
    assert told.done.tokens == [256, *b"hi", THE, FOX]
    assert told.done.n_generated == 4


def test_text_held_back_for_a_stop_string_comes_at_the_end() -> None:
    rig = scripted(THE, END, EOS)
    rig.submit(1, "hi", stop=[" end of it"])
    rig.finish()
    assert (rig.told[1].text, rig.told[1].done.stop_string) == (" the end", None)


def test_a_control_token_among_the_stop_strings_ends_it() -> None:
    """Its text is not shown, so it would never be found there."""
    rig = scripted(THE, CONTROL, FOX)
    rig.submit(1, "hi", stop=["<ctl>", " the fox"])
    rig.finish()
    assert (rig.told[1].text, rig.told[1].done.stop_string) == (" the", "<ctl>")


def test_control_tokens_show_when_that_is_asked_for() -> None:
    rig = scripted(THE, CONTROL, FOX, EOS)
    rig.submit(1, "hi")
    rig.submit(2, "hi", show_special=True)
    rig.finish()
    assert (rig.told[1].text, rig.told[2].text) == (" the fox", " the<ctl> fox")


def test_logprobs_come_with_their_text() -> None:
    rig = scripted(THE, FOX, A, EOS)
    rig.submit(1, "hi", stop=["x a"], sampling=Sampling(n_logprobs=0))
    rig.finish()
    assert [token.id for token in rig.told[1].logprobs] == [THE, FOX]


def test_times_are_those_of_waiting_prefill_and_decode() -> None:
    rig = scripted(*[THE] * 9, n_slots=1, n_batch=64)
    rig.submit(1, "x" * 99, n_predict=3)
    rig.submit(2, "hi", n_predict=1)
    for now in (1.0, 2.0, 4.0, 8.0, 16.0):
        rig.now = now
        rig.step()
    first, second = rig.told[1].done, rig.told[2].done
    assert (first.queue_s, first.prefill_s, first.decode_s) == (1.0, 1.0, 6.0)
    assert (second.queue_s, second.prefill_s, second.decode_s) == (16.0, 0.0, 0.0)


def test_a_prefix_that_was_found_is_reported() -> None:
    rig = Rig()
    rig.submit(1, "You are a fox. Hello", n_predict=1)
    rig.finish()
    rig.submit(2, "You are a fox. Bye", n_predict=1)
    rig.finish()
    assert rig.told[2].done.n_cached == len("<") + len("You are a fox. ")
    assert rig.told[2].prefilled[0].n_cached == rig.told[2].done.n_cached


def test_a_shared_prefix_is_prefilled_once() -> None:
    rig = scripted(*[THE] * 9, n_ctx=4096, n_slots=8, n_batch=512)
    for request in range(8):
        rig.submit(request, "x" * 2000 + str(request), n_predict=1)
    rig.finish()
    assert sum(len(ids) for batch in rig.backend.batches for _, _, ids in batch) == 2001 + 8
    assert [rig.told[request].done.n_cached for request in range(8)] == [0] + [2001] * 7


# --- leaving ---


def test_a_cancel_takes_effect_at_the_next_step() -> None:
    rig = scripted(*[THE] * 99, n_slots=1)
    rig.submit(1, "hi")
    rig.submit(2, "ho")
    rig.step(3)
    rig.send(Cancel(1))
    rig.step()
    assert rig.told[1].done.reason == "cancelled"
    assert rig.told[1].done.n_generated == 3
    assert rig.told[2].prefilled


def test_who_waits_may_leave_too() -> None:
    rig = scripted(*[THE] * 99, n_slots=1)
    rig.submit(1, "hi", n_predict=9)
    rig.submit(2, "ho")
    rig.step()
    rig.now = 5.0
    rig.send(Cancel(2))
    rig.finish()
    done = rig.told[2].done
    assert (done.reason, done.n_generated, done.queue_s) == ("cancelled", 0, 5.0)
    assert rig.told[1].done.reason == "length"


def test_cancelling_what_has_ended_says_nothing() -> None:
    rig = scripted(THE, EOS)
    rig.submit(1, "hi")
    rig.finish()
    rig.send(Cancel(1))
    rig.send(Cancel(77))
    rig.step()
    assert len(rig.told[1].ends) == 1
    assert 77 not in rig.told


# --- failing ---


def test_a_prompt_over_the_context_is_refused_with_both_numbers() -> None:
    rig = Rig()
    rig.submit(1, "x" * 400)
    failed = rig.told[1].failed
    assert (failed.code, failed.n_prompt, failed.n_ctx) == ("context_exceeded", 401, 256)
    assert "401" in failed.message
    assert "256" in failed.message


def test_a_prompt_may_be_cut_instead() -> None:
    rig = Rig()
    rig.submit(1, "x" * 400, truncate=True, n_predict=1)
    rig.finish()
    assert rig.told[1].done.n_prompt < 256


@pytest.mark.parametrize(
    ("part", "code"),
    [(Tokens([99999]), "bad_request"), (Fim("repo"), "unsupported")],
    ids=["token id", "fill-in"],
)
def test_a_bad_part_is_refused(part: Tokens | Fim, code: str) -> None:
    rig = Rig()
    rig.submit(1, [part])
    assert rig.told[1].failed.code == code


def test_a_bad_grammar_is_refused_at_once() -> None:
    rig = Rig(FakeBackend(n_slots=1))
    rig.submit(1, "hi")
    rig.submit(2, "hi", sampling=Sampling(grammar="bad"))
    rig.step()
    assert rig.told[2].failed.code == "invalid_option"
    assert not rig.told[1].ends


def test_a_sampler_that_fails_hits_its_own_request_alone() -> None:
    rig = scripted(*[THE] * 9)
    rig.submit(1, "hi", n_predict=5)
    rig.submit(2, "hi", sampling=Sampling(grammar="explode"))
    rig.submit(3, "hi", n_predict=5)
    rig.finish()
    assert rig.told[2].failed.code == "worker"
    assert rig.told[2].text == " the the"
    assert rig.told[1].text == rig.told[3].text == " the" * 5


def test_a_fault_of_our_own_hits_its_own_request_alone_and_is_logged(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rig = scripted(*[THE] * 9)
    rig.submit(1, "hi", n_predict=5)
    rig.submit(2, "hi")
    rig.step()
    monkeypatch.setattr(rig.engine._generations[2].sampler, "sample", lambda row: 1 / 0)
    rig.finish()
    assert rig.told[2].failed.message == (
        "the worker failed on this request: ZeroDivisionError: division by zero"
    )
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert rig.told[1].done.reason == "length"


def test_a_decode_that_fails_costs_its_requests_and_their_cache() -> None:
    rig = Rig(FakeBackend(n_slots=2))
    rig.submit(1, "hello there", n_predict=9)
    rig.submit(2, "hello world", n_predict=9)
    rig.backend.failing_decodes = {2}
    rig.finish()
    assert {rig.told[request].failed.code for request in (1, 2)} == {"worker"}
    rig.submit(3, "hello there", n_predict=2)
    rig.finish()
    assert rig.told[3].done.n_cached == 0


def test_a_decode_that_is_aborted_fails_its_requests() -> None:
    rig = Rig()
    rig.backend.aborting_decodes = {0}
    rig.submit(1, "hi")
    rig.finish()
    assert rig.told[1].failed.code == "worker"


def test_a_cache_too_small_for_one_request_fails_it_with_the_numbers() -> None:
    rig = scripted(*[THE] * 999, n_cells=100)
    rig.submit(1, "x" * 90)
    rig.finish()
    assert "256 tokens is full at 101 tokens" in rig.told[1].failed.message


def test_the_queue_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "MAX_WAITING", 2)
    rig = scripted(*[THE] * 9, n_slots=1)
    rig.submit(0, "hi", n_predict=5)
    rig.step()
    for request in (1, 2, 3):
        rig.submit(request, "hi", n_predict=5)
    rig.finish()
    assert rig.told[3].failed.code == "queue_full"
    assert rig.told[2].done.reason == "length"


def test_a_request_number_that_runs_already_is_the_daemons_fault() -> None:
    rig = Rig()
    rig.submit(1, "hi")
    rig.submit(1, "hi")
    with pytest.raises(ProtocolError, match="request 1 is running"):
        rig.step()


def test_a_second_load_is_the_daemons_fault() -> None:
    with pytest.raises(ProtocolError, match="a second Load"):
        Rig().send(Load("x", 1))


# --- beside generating ---


def test_threads_are_set_between_steps() -> None:
    rig = Rig()
    rig.send(SetThreads(3))
    rig.step()
    assert rig.backend.threads == [3]


def test_what_was_given_up_is_told_at_once() -> None:
    """Some load waits for it. What was given up is computed again where a prompt has it."""
    rig = Rig(FakeBackend(n_ctx=512, n_slots=2), parked_bytes=1 << 20)
    rig.submit(1, "once " * 20, n_predict=1)
    rig.finish()
    rig.rest()
    rig.now = 10.0
    rig.step()
    assert rig.stats[-1].parked_bytes > 0
    rig.send(LimitParked(0))
    rig.step()
    assert rig.stats[-1].parked_bytes == 0
    rig.submit(2, "once " * 20, n_predict=1)
    rig.finish()
    assert rig.told[2].done.reason == "length"
    n_told = len(rig.stats)
    rig.send(LimitParked(1 << 20))
    rig.step(2)
    assert len(rig.stats) <= n_told + 1


def test_copies_follow_each_other_once_it_was_quiet_for_long_enough() -> None:
    rig = Rig(FakeBackend(n_ctx=512, n_slots=3, kv_unified=False), parked_bytes=1 << 20)
    for request in range(3):
        rig.submit(request, f"{request} " * 30, n_predict=2)
    rig.now = 5.0
    rig.finish()
    waits: list[float | None] = []

    def get(timeout: float | None) -> NoReturn:
        waits.append(timeout)
        raise queue.Empty

    with mock.patch.object(rig.intake.inbox, "get", get):
        for rig.now in (5.001, 5.03, 5.04):
            rig.engine._wait()
    first_s, *later_s = waits
    assert first_s is not None
    assert 0 < first_s < 0.05
    assert later_s == [0, 0]
    assert len(list(rig.parked.saved)) == 3
    assert rig.engine._batcher.quiet_s is None


def test_who_comes_in_a_quiet_moment_waits_for_no_copy() -> None:
    rig = Rig(FakeBackend(n_ctx=512, n_slots=3, kv_unified=False), parked_bytes=1 << 20)
    rig.submit(1, "once " * 30, n_predict=2)
    rig.finish()
    # Long enough for a copy; but it is there already.
    rig.now = 100.0
    rig.submit(2, "then " * 30, n_predict=2)
    rig.engine._wait()
    assert not list(rig.parked.saved)
    rig.finish()
    assert rig.told[2].done.reason == "length"


def test_a_limit_is_nothing_to_who_parks_nothing() -> None:
    rig = Rig()
    rig.send(LimitParked(0))
    rig.step()
    assert not rig.stats


def test_stats_are_sent_when_they_change_but_once_a_second() -> None:
    rig = scripted(*[THE] * 99, n_slots=1)
    rig.submit(1, "hi", n_predict=50)
    rig.submit(2, "hi", n_predict=50)
    for now in (10.0, 10.5, 10.9, 11.1, 11.2):
        rig.now = now
        rig.step()
    assert rig.stats == [Stats(1, 1, 3), Stats(1, 1, 6)]
    rig.finish()
    rig.now = 20.0
    rig.step()
    rig.now = 30.0
    rig.step()
    assert rig.stats[2:] == [Stats(0, 0, rig.backend.n_used)]


def test_stats_go_with_text_but_not_later_than_it() -> None:
    """A frame of their own would wake the daemon between two steps."""
    rig = scripted(*[THE] * 99)
    rig.now = 10.0
    rig.submit(1, "hi", n_predict=50)
    rig.step(3)
    assert (rig.n_frames, rig.stats) == (1, [])
    rig.now += INTERVAL_S
    rig.step()
    assert (rig.n_frames, len(rig.stats)) == (2, 1)


def test_tokenize_answers_at_once_both_ways() -> None:
    rig = Rig()
    rig.send(Tokenize(1, "a<ctl>"))
    rig.send(Tokenize(2, "a<ctl>", add_special=True, parse_special=False))
    rig.send(Tokenize(3, ids=[THE, CONTROL, *"é".encode()]))
    assert rig.told[1].end == Tokenized(1, [97, CONTROL], "a<ctl>")
    assert rig.told[2].end == Tokenized(2, [256, *b"a<ctl>"], "a<ctl>")
    assert rig.told[3].end == Tokenized(3, [THE, CONTROL, *"é".encode()], " the<ctl>é")


def test_tokenize_gives_a_prompts_tokens_and_their_bytes() -> None:
    """The same that a Submit with this prompt would have."""
    rig = Rig()
    parts = [Text("<ctl>", parse_special=True), Text("a"), Tokens([THE])]
    rig.send(Tokenize(1, prompt=parts, add_special=True, wants_pieces=True))
    rig.send(Tokenize(2, prompt=parts))
    ids = [256, CONTROL, 97, THE]
    assert rig.told[1].end == Tokenized(1, ids, "", [b"<s>", b"<ctl>", b"a", b" the"])
    assert rig.told[2].end == Tokenized(2, ids[1:], "")


def test_tokenize_refuses_ids_that_do_not_exist() -> None:
    rig = Rig()
    rig.send(Tokenize(1, ids=[5, -1]))
    assert rig.told[1].failed.code == "bad_request"


# --- embeddings ---


def embed(request: int, *texts: str, **options: Any) -> Embed:
    return Embed(request, [[Text(text)] for text in texts], **options)


def ids_of(text: str) -> list[int]:
    return [256, *text.encode(), EOS]


def embedding_rig(**shape: Any) -> Rig:
    return Rig(FakeBackend(has_encoder=True, **shape), embeds=True)


def test_inputs_are_embedded_in_order_each_with_its_start_and_end() -> None:
    rig = embedding_rig()
    rig.send(embed(1, "one", "three", "seventeen"))
    rig.finish()
    expected = [ids_of(text) for text in ("one", "three", "seventeen")]
    data = b"".join(vector(ids, normalize=True) for ids in expected)
    assert rig.told[1].end == Embedded(1, 4, data, 3 + 5 + 9 + 6)


def test_pairs_are_embedded_with_what_belongs_between_them() -> None:
    rig = embedding_rig()
    rig.send(Embed(1, [[Text("a"), Between(), Text("b")]]))
    rig.send(Embed(2, [[Text("a"), Between(), Text("b")]], add_special=False))
    rig.finish()
    assert rig.backend.embedded == [[[256, *b"a", EOS, *b"b", EOS], [*b"a", EOS, *b"b"]]]


def test_inputs_share_batches_across_requests_up_to_their_size() -> None:
    rig = embedding_rig(n_batch=20)
    rig.send(embed(1, "aaaa", "bbbb"))
    rig.send(embed(2, "cccc", "dddddddddddddddddddddddddddddd"))
    rig.send(embed(3, "e"))
    rig.finish()
    assert [[len(ids) for ids in batch] for batch in rig.backend.embedded] == [[6, 6, 6], [32], [3]]
    assert all(isinstance(rig.told[request].end, Embedded) for request in (1, 2, 3))


def test_requests_that_differ_in_normalizing_share_no_batch() -> None:
    rig = embedding_rig()
    rig.send(embed(1, "a"))
    rig.send(embed(2, "a", normalize=False))
    rig.finish()
    assert [rig.told[request].end.data for request in (1, 2)] == [
        vector(ids_of("a"), normalize=True),
        vector(ids_of("a"), normalize=False),
    ]


def test_an_input_that_is_too_long_is_cut_before_its_end_token() -> None:
    rig = embedding_rig(n_ctx=10)
    rig.send(embed(1, "x" * 30))
    rig.finish()
    assert rig.backend.embedded == [[[256, *b"x" * 8, EOS]]]


def test_an_input_that_is_too_long_is_an_error_where_it_may_not_be_cut() -> None:
    rig = embedding_rig(n_ctx=10)
    rig.send(embed(1, "x", "x" * 30, truncate=False))
    failed = rig.told[1].failed
    assert (failed.code, failed.n_prompt, failed.n_ctx) == ("context_exceeded", 31, 9)
    assert "input 1 has 31 tokens" in failed.message


def test_no_inputs_give_no_vectors() -> None:
    rig = embedding_rig()
    rig.send(embed(1))
    assert rig.told[1].end == Embedded(1, 4, b"", 0)


def test_an_embed_may_be_cancelled_between_its_batches() -> None:
    rig = embedding_rig(n_batch=8)
    rig.send(embed(1, "aaaaaa", "bbbbbb", "cccccc"))
    rig.step()
    rig.send(Cancel(1))
    rig.finish()
    assert rig.told[1].done.reason == "cancelled"
    assert len(rig.backend.embedded) == 1


def test_a_batch_that_fails_fails_its_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = embedding_rig()

    def refuse(*inputs: object, **options: object) -> bytes:
        raise loop.WorkerError("llama.cpp refused")

    monkeypatch.setattr(rig.backend, "embed", refuse)
    rig.send(embed(1, "a"))
    rig.send(embed(2, "b"))
    rig.finish()
    assert rig.told[1].failed.message == rig.told[2].failed.message == "llama.cpp refused"


def test_a_model_that_was_loaded_for_embeddings_generates_nothing() -> None:
    rig = embedding_rig()
    rig.submit(1, "hi")
    assert rig.told[1].failed.code == "unsupported"


# --- the run ---


def test_shutdown_ends_running_requests_as_cancelled_and_the_loop() -> None:
    rig = scripted(*[THE] * 99)
    rig.submit(1, "hi")
    rig.step(3)
    rig.send(Shutdown())
    rig.engine.run()
    assert rig.told[1].done.reason == "cancelled"
    assert rig.backend.n_open_samplers == 0


def test_an_idle_loop_waits_for_work_in_another_thread() -> None:
    rig = scripted(THE, EOS)
    ended = threading.Event()
    hear = rig.hear

    def hear_and_tell(message: ToDaemon) -> None:
        hear(message)
        if rig.told[1].ends:
            ended.set()

    rig.hear = hear_and_tell  # type: ignore[method-assign]
    thread = threading.Thread(target=rig.engine.run)
    thread.start()
    rig.submit(1, "hi")
    assert ended.wait(10)
    rig.send(Shutdown())
    thread.join(10)
    assert not thread.is_alive()
    assert rig.told[1].text == " the"
