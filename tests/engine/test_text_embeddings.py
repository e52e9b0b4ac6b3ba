"""Embeddings by a model that was loaded to generate, beside what it generates."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shimpy.errors import WorkerError
from shimpy.protocol.messages import Cancel, Done, Embed, Embedded, Failed, Sampling, Text
from tests.engine.harness import Rig
from tests.engine.test_loop_random import Workload, check_all
from tests.fake_backend import BOS, FakeBackend, vector


def embed(request: int, *texts: str, **options: bool) -> Embed:
    return Embed(request, [[Text(text)] for text in texts], **options)


def ids_of(text: str) -> list[int]:
    return [BOS, *text.encode()]


def vectors(*texts: str, normalize: bool = True) -> bytes:
    return b"".join(vector(ids_of(text), normalize=normalize) for text in texts)


def test_each_text_gives_the_state_after_its_last_token() -> None:
    rig = Rig(FakeBackend(n_slots=2))
    texts = ["one", "three", "", "seventeen"]
    rig.send(embed(1, *texts))
    rig.finish()
    assert rig.told[1].end == Embedded(1, 4, vectors(*texts), 3 + 5 + 9 + 4)
    assert rig.engine._batcher.n_kv_used == 0


def test_no_more_texts_than_slots_run_at_a_time() -> None:
    rig = Rig(FakeBackend(n_slots=2))
    rig.send(embed(1, *"abcdefg"))
    while rig.is_busy:
        rig.step()
        assert rig.engine._batcher.n_running + rig.engine._batcher.n_waiting <= 2
    assert rig.told[1].end == Embedded(1, 4, vectors(*"abcdefg"), 14)


def test_a_stream_goes_on_as_if_nothing_were_embedded_beside_it() -> None:
    texts = []
    for is_crowded in (False, True):
        rig = Rig(FakeBackend(n_slots=3))
        rig.submit(1, "once upon", n_predict=30, sampling=Sampling(seed=3))
        rig.step(4)
        if is_crowded:
            rig.send(embed(2, *(f"text number {i}" for i in range(9))))
        rig.finish()
        texts.append(rig.told[1].text)
    assert texts[0] == texts[1] != ""


def test_requests_may_differ_in_normalizing() -> None:
    rig = Rig()
    rig.send(embed(1, "a"))
    rig.send(embed(2, "a", normalize=False))
    rig.finish()
    assert [rig.told[request].end.data for request in (1, 2)] == [
        vectors("a"),
        vectors("a", normalize=False),
    ]


def test_a_text_over_the_context_is_cut_or_an_error() -> None:
    """It leaves a place in the context, as every prompt does."""
    rig = Rig(FakeBackend(n_ctx=10, n_slots=1))
    rig.send(embed(1, "x" * 30))
    rig.send(embed(2, "x" * 30, truncate=False))
    rig.finish()
    assert rig.told[1].end == Embedded(1, 4, vectors("x" * 8), 9)
    failed = rig.told[2].failed
    assert (failed.code, failed.n_prompt, failed.n_ctx) == ("context_exceeded", 31, 9)


def test_a_cancelled_request_leaves_nothing_behind() -> None:
    rig = Rig(FakeBackend(n_slots=2))
    rig.send(embed(1, *(f"text {i}" for i in range(9))))
    rig.send(embed(2, "other"))
    rig.step(2)
    rig.send(Cancel(1))
    rig.finish()
    assert rig.told[1].done.reason == "cancelled"
    assert rig.told[2].end == Embedded(2, 4, vectors("other"), 6)
    assert rig.engine._batcher.n_running == rig.engine._batcher.n_waiting == 0


def test_a_batch_that_fails_fails_its_requests_once_each() -> None:
    rig = Rig(FakeBackend(n_slots=4))
    rig.backend.failing_decodes = {0}
    rig.send(embed(1, "a", "b"))
    rig.submit(2, "hi", n_predict=1)
    rig.finish()
    assert rig.told[1].failed.message == rig.told[2].failed.message == "llama.cpp refused the batch"
    rig.send(embed(3, "a"))
    rig.finish()
    assert rig.told[3].end == Embedded(3, 4, vectors("a"), 2)


def test_a_state_that_is_refused_fails_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(FakeBackend(n_slots=4))

    def refuse(*chunks: object, **options: object) -> bytes:
        raise WorkerError("llama.cpp refused the state")

    with monkeypatch.context() as patched:
        patched.setattr(rig.backend, "embed_last", refuse)
        rig.send(embed(1, "a", "b"))
        rig.finish()
    assert rig.told[1].failed.message == "llama.cpp refused the state"
    rig.send(embed(2, "a"))
    rig.finish()
    assert rig.told[2].end == Embedded(2, 4, vectors("a"), 2)


def test_a_recurrent_model_says_why_not() -> None:
    rig = Rig(FakeBackend(can_split=False, can_shift=False))
    rig.send(embed(1, "a"))
    assert rig.told[1].failed.code == "unsupported"
    assert "recurrent" in rig.told[1].failed.message


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_whatever_is_embedded_beside_whatever_is_generated(seed: int) -> None:
    work = Workload(seed)
    rig = Rig(FakeBackend(**work.shape))
    random = Random(seed)
    texts = {
        1000 + i: ["x" * random.randrange(60) for _ in range(random.randrange(1, 6))]
        for i in range(6)
    }
    cancelled = set(random.sample(sorted(texts), 2))
    for request, some in texts.items():
        rig.send(embed(request, *some))
        work.play(rig, n_requests=len(work.submits) + 2)
        if request in cancelled:
            rig.send(Cancel(request))
    rig.finish()
    # What was noted at the end is done to the cache with the next batch.
    rig.submit(9999, "last", n_predict=1)
    rig.finish()
    check_all(rig, work)
    for request, some in texts.items():
        end = rig.told[request].end
        if isinstance(end, Done):
            assert request in cancelled
            continue
        assert not isinstance(end, Failed)
        assert end.data == vectors(*(text[: work.shape["n_ctx"] - 2] for text in some))
