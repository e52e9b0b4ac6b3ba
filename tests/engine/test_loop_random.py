"""Whatever arrives and leaves in whatever order: each request is served as it has to be."""

from __future__ import annotations

import os
import tempfile
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shimpy.engine import halving, prefixes
from shimpy.engine.backend import Chunk
from shimpy.engine.batcher import Batcher
from shimpy.engine.outbox import INTERVAL_S
from shimpy.protocol.messages import Cancel, Done, Failed, Sampling, Submit, Text
from tests.engine.harness import Rig, Told
from tests.engine.reference import Expected, expect
from tests.fake_backend import FakeBackend

STEMS = ["", "You are a fox. " * 6, "You are a fox. " * 6 + "Be brief. " * 7, "Once upon a time "]
STOPS = [" fox", " a", "日", "nd", "\n", " the end", "<ctl>"]
seeds = st.integers(0, 2**32)


@dataclass
class Workload:
    """Requests and cancellations between steps, drawn densely from one seed."""

    seed: int
    shape: dict[str, int] = field(init=False)
    submits: list[Submit] = field(default_factory=list)
    cancelled: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._random = Random(self.seed)
        self.shape = {
            "n_ctx": self._random.choice([80, 160, 240, 400]),
            "n_slots": self._random.choice([1, 2, 3, 4, 6]),
            "n_batch": self._random.choice([7, 16, 64, 512]),
        }

    def play(self, rig: Rig, n_requests: int = 16, *, may_go_on: bool = True) -> None:
        """`may_go_on`: some steps that are alike follow each other at once."""
        random = self._random
        is_crowded = random.random() < 0.5
        # Text is sent after each step, or waits for others.
        step_s = random.choice([0.0, 2 * INTERVAL_S])
        while len(self.submits) < n_requests:
            rig.send(self._submit(rig.backend.n_ctx))
            while random.random() < (0.3 if is_crowded else 0.9):
                rig.now += step_s
                rig.goes_on = random.random() < 0.7 and may_go_on
                rig.step()
            if random.random() < 0.3:
                rig.rest()
            if random.random() < 0.15:
                request = random.randrange(len(self.submits))
                self.cancelled.add(request)
                rig.send(Cancel(request))
        rig.finish()

    def _submit(self, n_ctx: int) -> Submit:
        random = self._random
        stem = random.choice(STEMS)
        # Of a usual prompt's length, or about as long as the context.
        n_tail = random.choice(
            [0, 1, 5, random.randrange(60), n_ctx - len(stem) - random.randrange(6)]
        )
        is_repeat = self.submits and random.random() < 0.2
        text = stem + "".join(random.choices("xyz ", k=max(0, n_tail)))
        submit = Submit(
            len(self.submits),
            random.choice(self.submits).prompt if is_repeat else [Text(text)],
            n_predict=random.choice([-1, -1, -1, 0, 1, 2, 9, 40]),
            stop=random.sample(STOPS, random.choice([0, 0, 0, 1, 2])),
            n_keep=random.choice([4, 0, 40]),
            shift=random.random() < 0.4,
            truncate=random.random() < 0.5,
            no_cache=random.random() < 0.1,
            show_special=random.random() < 0.2,
            return_tokens=random.random() < 0.5,
            sampling=Sampling(
                seed=random.randrange(4),
                n_logprobs=random.choice([None, None, 2]),
                grammar=random.choice([None] * 18 + ["bad", "explode"]),
            ),
        )
        self.submits.append(submit)
        return submit


def check(submit: Submit, told: Told, expected: Expected, *, was_cancelled: bool) -> None:
    end = told.end
    if isinstance(end, Done) and end.reason == "cancelled":
        assert was_cancelled
        assert expected.text.startswith(told.text)
        return
    if isinstance(end, Failed):
        assert end.code == expected.code
        assert expected.text.startswith(told.text)
        return
    assert expected.code is None
    assert told.text == expected.text
    assert (end.reason, end.stop_string) == (expected.reason, expected.stop_string)
    assert (end.n_prompt, end.n_generated) == (expected.n_prompt, expected.n_generated)
    assert told.prefilled[0].n_prompt == end.n_prompt
    assert end.n_cached == told.prefilled[0].n_cached < end.n_prompt
    if submit.return_tokens and end.stop_string is None:
        assert end.tokens == expected.tokens
    has_all = submit.sampling.n_logprobs is not None and end.stop_string is None
    if has_all and not submit.show_special:
        data = b"".join(token.data for token in told.logprobs)
        assert data.decode(errors="replace").startswith(told.text)
        assert len(told.logprobs) in (end.n_generated, end.n_generated - 1)


def check_all(rig: Rig, work: Workload, *but: str, **shape: bool) -> None:
    """Compare every request that did not fail with one of these messages."""
    for submit in work.submits:
        told = rig.told[submit.request]
        if isinstance(told.end, Failed) and told.end.message.startswith(but or ("\0",)):
            continue
        expected = expect(submit, **work.shape, **shape)
        check(submit, told, expected, was_cancelled=submit.request in work.cancelled)
    assert rig.backend.n_used == rig.engine._batcher.n_kv_used or but
    assert rig.backend.n_open_samplers == 0


@settings(max_examples=150, deadline=None)
@given(seeds)
def test_each_request_is_served_as_it_has_to_be(seed: int) -> None:
    work = Workload(seed)
    rig = Rig(FakeBackend(**work.shape))
    work.play(rig)
    check_all(rig, work)
    assert rig.backend.most_used <= work.shape["n_ctx"]


@settings(max_examples=40, deadline=None)
@given(seeds)
def test_a_recurrent_model_is_served_right_too(seed: int) -> None:
    """Its state is used whole or not at all, and it can't shift."""
    work = Workload(seed)
    rig = Rig(FakeBackend(**work.shape, can_split=False, can_shift=False))
    work.play(rig)
    check_all(rig, work, can_split=False, can_shift=False)


@settings(max_examples=80, deadline=None)
@given(seeds)
def test_slots_with_cells_of_their_own_serve_right_too(seed: int) -> None:
    """Whatever they exchange, nothing of it shows in a text; all that run are neighbours."""
    work = Workload(seed)
    rig = Rig(FakeBackend(**work.shape, kv_unified=False))
    work.play(rig)
    check_all(rig, work)


@pytest.mark.parametrize("kv_unified", [True, False])
@settings(max_examples=60, deadline=None)
@given(seeds)
def test_steps_in_halves_serve_right_too(kv_unified: bool, seed: int) -> None:
    """Every other few steps, whatever comes or goes between the halves of one."""
    work = Workload(seed)
    rig = Rig(FakeBackend(**work.shape, kv_unified=kv_unified))
    with mock.patch.multiple(halving, LEAST=2, _FIRST_WAIT=1, _LONGEST_WAIT=2):
        work.play(rig)
    check_all(rig, work)


@pytest.mark.parametrize("kv_unified", [True, False])
@pytest.mark.parametrize("least", [halving.LEAST, 2])
@settings(max_examples=60, deadline=None)
@given(seeds)
def test_steps_in_which_nothing_changes_are_what_they_would_be_looked_at_anew(
    least: int, kv_unified: bool, seed: int
) -> None:
    """Where steps are tried in halves now and then, too."""
    with mock.patch.multiple(halving, LEAST=least, _FIRST_WAIT=3, _LONGEST_WAIT=3):
        batches = decoded(seed, kv_unified=kv_unified)
        with mock.patch.object(Batcher, "_comes_again", return_value=False):
            assert decoded(seed, kv_unified=kv_unified) == batches


def decoded(seed: int, *, kv_unified: bool) -> list[list[Chunk]]:
    """Return the batches of a workload."""
    work = Workload(seed)
    rig = Rig(FakeBackend(**work.shape, kv_unified=kv_unified))
    batches: list[list[Chunk]] = []
    decode = rig.backend.decode

    def listen(chunks: Sequence[Chunk]) -> int:
        batches.append(list(chunks))
        return decode(chunks)

    rig.backend.decode = listen  # type: ignore[method-assign]
    # Where steps go on, they are more or fewer before the next request comes.
    work.play(rig, may_go_on=False)
    return batches


@pytest.mark.parametrize("kv_unified", [True, False])
@settings(max_examples=60, deadline=None)
@given(seeds, st.sets(st.integers(0, 80), max_size=6), st.sets(st.integers(0, 20), max_size=4))
def test_failures_of_llama_cpp_hit_only_the_requests_they_touch(
    kv_unified: bool, seed: int, failing: set[int], refused: set[int]
) -> None:
    """Decodes that raise and removals that are refused: the others' text is still right."""
    work = Workload(seed)
    play_failing(work, FakeBackend(**work.shape, kv_unified=kv_unified), failing, refused)


def play_failing(
    work: Workload,
    backend: FakeBackend,
    failing: set[int],
    refused: set[int],
    parked_bytes: int = 0,
) -> Rig:
    """Play with these decodes and removals failing, and compare what did not fail by that."""
    backend.failing_decodes = failing
    backend.refused_removals = refused
    rig = Rig(backend, parked_bytes=parked_bytes)
    work.play(rig)
    check_all(rig, work, *(["llama.cpp refused the batch"] if failing else []))
    return rig


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(1, 40))
def test_a_cache_that_is_full_too_soon_costs_no_more_than_it_must(seed: int, n_hidden: int) -> None:
    """llama.cpp may say "full" where the books see room; only a lone request may fail by it."""
    work = Workload(seed)
    rig = Rig(FakeBackend(**work.shape, n_cells=work.shape["n_ctx"] - n_hidden))
    work.play(rig)
    check_all(rig, work, "the KV cache of")


KINDS: dict[str, dict[str, bool]] = {
    "attention": {},
    "window": {"has_window": True},
    "recurrent": {"can_split": False, "can_shift": False},
    "own cells": {"kv_unified": False},
}
# Of these, what a request's answer depends on.
SHAPES = KINDS | {"window": {}, "own cells": {}}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12, deadline=None)
@given(seeds)
def test_prefixes_come_back_in_later_lives(kind: str, seed: int) -> None:
    """Whatever was saved when and where: text is the same as if nothing were ever kept."""
    few = mock.patch.multiple(prefixes, MIN_SAVED=8, MIN_GAIN=4)
    with few, tempfile.TemporaryDirectory() as folder:
        for life in range(3):
            work = Workload(seed + life)
            rig = Rig(FakeBackend(**work.shape, **KINDS[kind]), prefixes=Path(folder))
            work.play(rig, n_requests=8)
            check_all(rig, work, **SHAPES[kind])
            rig.end()
            assert {news.kind for news in rig.news} <= {"saved", "restored"}
            assert rig.backend.most_used <= rig.backend.n_all


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(seeds, st.sampled_from([400, 2000, 1 << 20]), st.floats(0, 0.2))
def test_what_is_parked_and_comes_back_changes_no_text(
    kind: str, seed: int, limit: int, copy_s: float
) -> None:
    """However much has room, however long copies take, whatever state is whole; in two lives."""
    few = mock.patch.multiple(prefixes, MIN_SAVED=8, MIN_GAIN=4, MIN_PARKED=6, MIN_PARKED_GAIN=2)
    with few, tempfile.TemporaryDirectory() as folder:
        for life in range(2):
            work = Workload(seed + life)
            backend = FakeBackend(**work.shape, **KINDS[kind])
            rig = Rig(backend, prefixes=Path(folder), parked_bytes=limit)
            slow_down(rig, copy_s)
            work.play(rig, n_requests=12)
            check_all(rig, work, **SHAPES[kind])
            assert rig.parked.n_bytes <= limit
            assert backend.most_used <= backend.n_all
            check_parked(rig)
            rig.end()


def slow_down(rig: Rig, copy_s: float) -> None:
    """Let copies and batches take their time."""
    park, decode = rig.parked.park, rig.backend.decode

    def slow_park(slot: int, tokens: list[int]) -> bool:
        rig.now += copy_s
        assert rig.backend.content(slot) == tokens
        return park(slot, tokens)

    def slow_decode(chunks: Any) -> int:
        rig.now += 0.1
        return decode(chunks)

    rig.parked.park, rig.backend.decode = slow_park, slow_decode  # type: ignore[method-assign]


def check_parked(rig: Rig) -> None:
    """Each copy holds the tokens that it is listed under."""
    for prefix in rig.parked.saved:
        if prefix.is_parked:
            state = array("i", os.pread(rig.parked._files[prefix.name], prefix.n_bytes, 0))
            assert state == prefix.tokens


@settings(max_examples=40, deadline=None)
@given(seeds, st.sets(st.integers(0, 60), max_size=4), st.sets(st.integers(0, 20), max_size=4))
def test_failures_beside_copies_hit_only_the_requests_they_touch(
    seed: int, failing: set[int], refused: set[int]
) -> None:
    """Also copies that can't be made, and such as are not taken again."""
    work = Workload(seed)
    backend = FakeBackend(**work.shape)
    backend.fails_to_save = seed % 3 == 1
    backend.fails_to_load = seed % 3 == 2
    with mock.patch.multiple(prefixes, MIN_PARKED=6, MIN_PARKED_GAIN=2):
        play_failing(work, backend, failing, refused, parked_bytes=1 << 20).parked.close()


@pytest.mark.parametrize("parked_bytes", [0, 1 << 20], ids=["kept", "parked"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_books_match_the_cache_after_each_step(kind: str, parked_bytes: int) -> None:
    backend = FakeBackend(n_ctx=300, n_slots=3, **KINDS[kind])
    rig = Rig(backend, parked_bytes=parked_bytes)
    for request in range(12):
        rig.submit(request, STEMS[request % 4] + "x" * request, sampling=Sampling(seed=request))
        rig.step(3)
        for slot in rig.engine._batcher._slots._slots:
            owner = slot.sequence
            expected = slot.tokens if owner is None else owner.tokens[: owner.n_kv]
            assert rig.backend.content(slot.id) == expected
    rig.finish()
    rig.parked.close()
