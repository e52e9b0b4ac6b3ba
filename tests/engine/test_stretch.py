"""Steps that follow each other at once give what they would give one by one, and end in time."""

from __future__ import annotations

from collections.abc import Sequence
from unittest import mock

import pytest
from hypothesis import given, settings

from shimpy.engine import halving
from shimpy.engine.backend import Chunk
from shimpy.engine.outbox import INTERVAL_S
from shimpy.errors import WorkerError
from shimpy.protocol.messages import Done, Failed, Sampling, ToDaemon
from tests.engine.harness import Rig
from tests.engine.test_loop import AN, EOS, FOX, THE, scripted
from tests.engine.test_loop_random import Workload, seeds
from tests.fake_backend import FakeBackend


def going_on(*tokens: int, n_predict: int = 50, n_requests: int = 1) -> Rig:
    """A rig whose requests have their first token."""
    rig = scripted(*tokens)
    rig.goes_on = True
    rig.now = 1.0
    for request in range(n_requests):
        rig.submit(request, "hi", n_predict=n_predict)
    while not all(rig.told[request].n_tokens for request in range(n_requests)):
        rig.step()
    return rig


@pytest.mark.parametrize("kv_unified", [True, False])
@settings(max_examples=60, deadline=None)
@given(seeds)
def test_what_all_requests_are_told_is_the_same(kv_unified: bool, seed: int) -> None:
    rigs = []
    for goes_on in (False, True):
        work = Workload(seed)
        rig = Rig(FakeBackend(**work.shape, kv_unified=kv_unified))
        rig.goes_on = goes_on
        for _ in range(8):
            rig.send(work._submit(rig.backend.n_ctx))
        with mock.patch.multiple(halving, LEAST=2, _FIRST_WAIT=3, _LONGEST_WAIT=3):
            rig.finish()
        rigs.append(rig)
    single, going = rigs
    assert going.told == single.told
    assert going.backend.batches == single.backend.batches
    assert single.backend.n_repeats == 0


def test_nobody_looks_at_what_may_come_between_until_a_limit() -> None:
    rig = going_on(*[THE] * 99, n_requests=3)
    rig.step()
    # A step of them together, and all but the last one.
    assert rig.backend.n_repeats >= 50 - 4
    rig.finish()
    assert [rig.told[request].done.n_generated for request in range(3)] == [50] * 3


def test_who_arrives_waits_for_one_step() -> None:
    rig = going_on(*[THE] * 99)
    decode = rig.backend.decode_next
    n_before = len(rig.backend.batches)

    def arrive(tokens: Sequence[int]) -> int:
        if rig.backend.n_repeats == 3:
            rig.submit(1, "other", n_predict=9)
        return decode(tokens)

    rig.backend.decode_next = arrive  # type: ignore[method-assign]
    rig.step(2)
    assert rig.backend.n_repeats == 4
    newcomers = [
        {slot for slot, _, _ in batch} for batch in rig.backend.batches[n_before : n_before + 6]
    ]
    assert newcomers == [{0}] * 5 + [{0, 1}]


def test_text_is_as_soon_as_where_each_step_is_looked_at() -> None:
    single, going = (times_of_frames(goes_on=goes_on) for goes_on in (False, True))
    assert going == single
    assert len(single) == 17


def times_of_frames(*, goes_on: bool) -> list[float]:
    """Return when text was sent, of steps that take 0.3 of what it may wait."""
    rig = going_on(*[THE] * 99)
    rig.goes_on = goes_on
    times: list[float] = []
    decode, hear = rig.backend.decode, rig.hear

    def timed(chunks: Sequence[Chunk]) -> int:
        rig.now += 0.3 * INTERVAL_S
        return decode(chunks)

    def listen(message: ToDaemon) -> None:
        times.append(round(rig.now, 6))
        hear(message)

    rig.backend.decode = timed  # type: ignore[method-assign]
    rig.hear = listen  # type: ignore[method-assign]
    rig.finish()
    return times


@pytest.mark.parametrize("how", ["raises", "aborts"])
def test_where_llama_cpp_fails_all_of_the_step_fail_and_keep_their_text(how: str) -> None:
    rig = going_on(*[THE] * 99, n_requests=2)
    n = len(rig.backend.batches)
    failing = rig.backend.failing_decodes if how == "raises" else rig.backend.aborting_decodes
    failing.add(n + 5)
    rig.finish()
    for request in range(2):
        told = rig.told[request]
        assert isinstance(told.end, Failed)
        assert told.text == " the" * told.n_tokens
    assert rig.told[0].n_tokens >= 6
    assert rig.engine._batcher.n_kv_used == 0


def test_who_can_t_be_drawn_from_ends_alone() -> None:
    rig = going_on(*[THE] * 20, n_requests=2, n_predict=20)
    generation = rig.engine._generations[0]
    sample = generation.sampler.sample

    def fail(row: int) -> tuple[int, None]:
        if rig.backend.n_repeats > 5:
            raise WorkerError("the model computes NaN")
        return sample(row)  # type: ignore[return-value]

    generation.sampler.sample = fail  # type: ignore[method-assign]
    rig.finish()
    assert isinstance(rig.told[0].end, Failed)
    assert rig.told[0].text == " the" * rig.told[0].n_tokens
    assert rig.told[1].done.n_generated == 20


@pytest.mark.parametrize(
    ("stop", "reason"), [([" fox"], " fox"), ([], None)], ids=["stop string", "end token"]
)
def test_an_end_is_told_with_the_step_that_brings_it(stop: list[str], reason: str | None) -> None:
    rig = scripted(THE, AN, THE, AN, FOX, EOS)
    rig.goes_on = True
    rig.now = 1.0
    rig.submit(0, "hi", n_predict=50, stop=stop, sampling=Sampling(n_logprobs=0))
    rig.finish()
    done = rig.told[0].end
    assert isinstance(done, Done)
    assert (done.reason, done.stop_string) == ("stop", reason)
    assert rig.told[0].text == " the an the an" + ("" if stop else " fox")
    assert done.n_generated == 5 + (not stop)
