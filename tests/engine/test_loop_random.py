"""Whatever arrives and leaves in whatever order: each request is served as if it were alone."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shimpy.protocol.messages import Cancel, Done, Failed, Sampling, Submit, Text
from tests.engine.harness import Rig, Told, run_alone
from tests.fake_backend import FakeBackend

# Prompts that share prefixes of many lengths.
STEMS = ["", "You are a fox. " * 8, "You are a fox. " * 8 + "Be brief. " * 4, "Once upon a time "]

prompts = st.builds(
    lambda stem, tail, times: stem + tail * times,
    st.sampled_from(STEMS),
    st.text(alphabet="xyz ", max_size=6),
    st.integers(0, 12),
)
options: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {
        "n_predict": st.sampled_from([-1, -1, 0, 1, 2, 7, 30]),
        "stop": st.lists(st.sampled_from([" fox", " a", "日", "nd", "\n"]), max_size=2),
        "shift": st.booleans(),
        "truncate": st.booleans(),
        "no_cache": st.sampled_from([False, False, False, True]),
        "return_tokens": st.booleans(),
        "sampling": st.builds(
            Sampling,
            seed=st.integers(0, 3),
            n_logprobs=st.sampled_from([None, None, 2]),
            grammar=st.sampled_from([None] * 8 + ["bad", "explode"]),
        ),
    }
)
# A step of the engine, a request that arrives, or one that is cancelled.
actions = st.lists(
    st.one_of(
        st.just("step"),
        st.just("step"),
        st.tuples(prompts, options),
        st.tuples(prompts, options),
        st.integers(0, 12),
    ),
    max_size=40,
)
shapes = st.fixed_dictionaries(
    {
        "n_ctx": st.sampled_from([64, 160, 256, 600]),
        "n_slots": st.sampled_from([1, 2, 3, 5]),
        "n_batch": st.sampled_from([5, 16, 64, 512]),
    }
)


def play(rig: Rig, actions: list[Any]) -> tuple[list[Submit], set[int]]:
    submits: list[Submit] = []
    cancelled: set[int] = set()
    for action in actions:
        match action:
            case "step":
                rig.step()
            case int(request):
                cancelled.add(request)
                rig.send(Cancel(request))
            case (prompt, chosen):
                submits.append(Submit(len(submits), [Text(prompt)], **chosen))
                rig.send(submits[-1])
    rig.finish()
    return submits, cancelled


def check(submit: Submit, told: Told, alone: Told, *, was_cancelled: bool) -> None:
    end = told.end
    if isinstance(end, Done) and end.reason == "cancelled":
        assert was_cancelled
        assert alone.text.startswith(told.text)
        return
    if isinstance(end, Failed):
        assert isinstance(alone.end, Failed)
        assert (end.code, end.message) == (alone.end.code, alone.end.message)
        assert told.text == alone.text
        return
    reference = alone.done
    assert told.text == alone.text
    assert told.logprobs == alone.logprobs
    assert (end.reason, end.stop_string) == (reference.reason, reference.stop_string)
    assert (end.n_prompt, end.n_generated) == (reference.n_prompt, reference.n_generated)
    assert end.tokens == reference.tokens
    assert told.prefilled[0].n_prompt == end.n_prompt
    assert end.n_cached < end.n_prompt


@settings(max_examples=150, deadline=None)
@given(actions, shapes)
def test_each_request_is_served_as_if_it_were_alone(
    actions: list[Any], shape: dict[str, int]
) -> None:
    rig = Rig(FakeBackend(**shape))
    submits, cancelled = play(rig, actions)
    for submit in submits:
        alone = run_alone(submit, **shape)
        told = rig.told[submit.request]
        check(submit, told, alone, was_cancelled=submit.request in cancelled)
    assert rig.backend.most_used <= shape["n_ctx"]
    assert rig.backend.n_used == rig.engine._batcher.n_kv_used
    assert rig.backend.n_open_samplers == 0


@settings(max_examples=60, deadline=None)
@given(actions, shapes)
def test_a_recurrent_model_is_served_right_too(actions: list[Any], shape: dict[str, int]) -> None:
    """Its state is used whole or not at all, and it can't shift."""
    rig = Rig(FakeBackend(**shape, can_split=False, can_shift=False))
    submits, cancelled = play(rig, actions)
    for submit in submits:
        alone = run_alone(submit, **shape, can_split=False, can_shift=False)
        told = rig.told[submit.request]
        check(submit, told, alone, was_cancelled=submit.request in cancelled)


@settings(max_examples=80, deadline=None)
@given(actions, shapes, st.sets(st.integers(0, 30), max_size=4), st.sets(st.integers(0, 20)))
def test_failures_of_llama_cpp_hit_only_the_requests_they_touch(
    actions: list[Any], shape: dict[str, int], failing: set[int], refused: set[int]
) -> None:
    """Decodes that raise and removals that are refused: the others' text is still right."""
    backend = FakeBackend(**shape)
    backend.failing_decodes = failing
    backend.refused_removals = refused
    rig = Rig(backend)
    submits, cancelled = play(rig, actions)
    n_failed = 0
    for submit in submits:
        alone = run_alone(submit, **shape)
        told = rig.told[submit.request]
        if isinstance(told.end, Failed) and told.end.code == "worker" and told.end != alone.end:
            n_failed += 1
            assert alone.text.startswith(told.text)
            continue
        check(submit, told, alone, was_cancelled=submit.request in cancelled)
    assert n_failed == 0 or failing
    assert backend.n_open_samplers == 0


@settings(max_examples=80, deadline=None)
@given(actions, shapes, st.integers(1, 40))
def test_a_cache_that_is_full_too_soon_costs_no_more_than_it_must(
    actions: list[Any], shape: dict[str, int], n_hidden: int
) -> None:
    """llama.cpp may say "full" where the books see room; only a lone request may fail by it."""
    n_cells = shape["n_ctx"] - n_hidden
    rig = Rig(FakeBackend(**shape, n_cells=n_cells))
    submits, cancelled = play(rig, actions)
    for submit in submits:
        alone = run_alone(submit, **shape)
        told = rig.told[submit.request]
        if isinstance(told.end, Failed) and "KV cache" in told.end.message:
            assert alone.text.startswith(told.text)
            continue
        check(submit, told, alone, was_cancelled=submit.request in cancelled)


@pytest.mark.parametrize("can_split", [True, False], ids=["attention", "recurrent"])
def test_the_books_match_the_cache_after_each_step(can_split: bool) -> None:
    rig = Rig(FakeBackend(n_ctx=300, n_slots=3, can_split=can_split, can_shift=can_split))
    for request in range(12):
        rig.submit(request, STEMS[request % 4] + "x" * request, sampling=Sampling(seed=request))
        rig.step(3)
        for slot in rig.engine._batcher._slots._slots:
            owner = slot.sequence
            expected = slot.tokens if owner is None else owner.tokens[: owner.n_kv]
            assert rig.backend.content(slot.id) == expected
    rig.finish()
