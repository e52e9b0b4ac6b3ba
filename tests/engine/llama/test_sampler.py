"""What each sampling option does to the choice."""

from __future__ import annotations

import ctypes
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shimpy.engine.llama import LlamaBackend
from shimpy.engine.llama.candidates import DTYPE, Candidates
from shimpy.engine.llama.choosers import likeliest
from shimpy.engine.llama.library import LL
from shimpy.engine.llama.penalties import Bias, Penalties
from shimpy.errors import InvalidOptionError, WorkerError
from shimpy.protocol.messages import Sampling
from tests.engine.llama.running import generate_ids, logits, prefill, prompt_ids

HOT = {"temperature": 2.0, "top_k": 0, "top_p": 1.0}


def draw(
    backend: LlamaBackend, n: int, history: tuple[int, ...] = (), **options: object
) -> list[int]:
    """Draw `n` tokens from the same logits, with one sampler."""
    sampler = backend.make_sampler(Sampling(**options), history)  # type: ignore[arg-type]
    try:
        return [sampler.sample(0)[0] for _ in range(n)]
    finally:
        sampler.close()


@pytest.fixture
def prefilled(llama: LlamaBackend) -> LlamaBackend:
    """The random llama with logits in row 0."""
    prefill(llama, prompt_ids(llama, "Hello"))
    return llama


def test_temperature_zero_takes_the_likeliest(prefilled: LlamaBackend) -> None:
    best = int(logits(prefilled).argmax())
    assert draw(prefilled, 5, temperature=0) == [best] * 5


def test_top_k_of_one_takes_the_likeliest(prefilled: LlamaBackend) -> None:
    best = int(logits(prefilled).argmax())
    assert draw(prefilled, 5, temperature=5.0, top_k=1) == [best] * 5


@pytest.mark.parametrize("mirostat", [0, 1, 2])
@pytest.mark.parametrize("seed", [0, 1, -1, 2**32 - 1, 2**40])
def test_a_seed_repeats(prefilled: LlamaBackend, seed: int, mirostat: int) -> None:
    options = {**HOT, "seed": seed, "mirostat": mirostat}
    first = draw(prefilled, 30, **options)
    assert draw(prefilled, 30, **options) == first
    assert len(set(first)) > 5


def test_seeds_differ_and_no_seed_is_a_new_one(prefilled: LlamaBackend) -> None:
    drawn = [draw(prefilled, 30, **HOT, seed=seed) for seed in (1, 2, None, None)]
    assert len({tuple(tokens) for tokens in drawn}) == 4


def test_top_k_bounds_the_choice(prefilled: LlamaBackend) -> None:
    best = set(np.argsort(-logits(prefilled))[:3].tolist())
    assert set(draw(prefilled, 300, temperature=3.0, top_k=3, top_p=1.0, seed=1)) == best


def test_top_p_bounds_the_choice(prefilled: LlamaBackend) -> None:
    values = logits(prefilled).astype(np.float64)
    order = np.argsort(-values)
    p = np.exp(values[order] - values.max())
    p /= p.sum()
    n_kept = int(np.searchsorted(np.cumsum(p), 0.3)) + 1
    drawn = set(draw(prefilled, 500, temperature=1.0, top_k=0, top_p=0.3, seed=1))
    assert drawn <= set(order[:n_kept].tolist())
    assert len(drawn) > n_kept // 2


def test_min_p_bounds_the_choice(prefilled: LlamaBackend) -> None:
    values = logits(prefilled)
    likely = set(np.flatnonzero(values >= values.max() + np.log(0.2)).tolist())
    drawn = set(draw(prefilled, 500, temperature=3.0, top_k=0, top_p=1.0, min_p=0.2, seed=1))
    assert drawn <= likely
    assert len(drawn) > 1


def test_typical_p_bounds_the_choice(prefilled: LlamaBackend) -> None:
    n_free = len(set(draw(prefilled, 500, **HOT, seed=1)))
    n_typical = len(set(draw(prefilled, 500, **HOT, typical_p=0.2, seed=1)))
    assert n_typical < n_free / 2


def test_top_n_sigma_bounds_the_choice(prefilled: LlamaBackend) -> None:
    """By the deviation of all logits, not of those that other samplers left."""
    values = logits(prefilled)
    likely = set(np.flatnonzero(values >= values.max() - 0.8 * values.std()).tolist())
    drawn = set(draw(prefilled, 500, **HOT, top_n_sigma=0.8, seed=1))
    assert drawn <= likely
    assert len(drawn) > 1
    assert not set(draw(prefilled, 500, **HOT, seed=1)) <= likely


def test_xtc_leaves_the_likeliest_out(prefilled: LlamaBackend) -> None:
    """All but the least likely of those over the threshold go."""
    options = {"temperature": 1.0, "top_k": 8, "top_p": 1.0, "seed": 1, "xtc_threshold": 0.01}
    best = int(logits(prefilled).argmax())
    assert best in draw(prefilled, 300, **options)
    assert best not in draw(prefilled, 300, **options, xtc_probability=1.0)
    assert best in draw(prefilled, 300, **options, xtc_probability=0.0)


def test_a_dynamic_temperature_is_within_its_range(prefilled: LlamaBackend) -> None:
    """Where the model is as unsure as this one, it is near the upper end."""

    def n_kinds(**options: float) -> int:
        return len(set(draw(prefilled, 300, top_k=0, top_p=1.0, seed=1, **options)))

    low, middle, high = (n_kinds(temperature=value) for value in (0.2, 0.7, 1.2))
    dynamic = n_kinds(temperature=0.7, dynatemp_range=0.5)
    assert low < middle < dynamic <= high + 5


def test_ends_can_be_ignored(chain: LlamaBackend) -> None:
    """The chain would say nothing but its end after its last token."""
    last = generate_ids(chain, "x", n=200)[-1]
    assert chain.is_eog(last)
    sampler = chain.make_sampler(Sampling(temperature=0, ignore_eos=True), [])
    assert not chain.is_eog(sampler.sample(0)[0])
    sampler.close()


def test_infill_ends_where_ends_are_likely(llama: LlamaBackend) -> None:
    """One end among many tokens of words is less likely, yet taken; llama.cpp has the rule."""
    prefill(llama, prompt_ids(llama, "Hello"))
    ends = {token: 6.0 for token in range(512) if llama.is_eog(token)}
    options = {"temperature": 1.0, "top_k": 40, "top_p": 0.99, "seed": 1}
    plain = draw(llama, 200, **options, logit_bias=ends)
    filled = draw(llama, 200, **options, logit_bias=ends, infill=True)
    assert 0 < sum(map(llama.is_eog, plain)) < 200
    assert all(map(llama.is_eog, filled))


def test_temperature_flattens(prefilled: LlamaBackend) -> None:
    def commonest(temperature: float) -> int:
        drawn = draw(prefilled, 300, temperature=temperature, top_k=0, top_p=1.0, seed=1)
        return Counter(drawn).most_common(1)[0][1]

    assert commonest(0.1) > commonest(1.0) > commonest(5.0)


def test_draws_follow_the_probabilities(prefilled: LlamaBackend) -> None:
    values = logits(prefilled).astype(np.float64)
    best = np.argsort(-values)[:5]
    p = np.exp(values[best])
    p /= p.sum()
    n = 4000
    counts = Counter(draw(prefilled, n, temperature=1.0, top_k=5, top_p=1.0, seed=7))
    for token, share in zip(best.tolist(), p.tolist(), strict=True):
        # Five standard deviations.
        assert abs(counts[token] - n * share) < 5 * np.sqrt(n * share * (1 - share))


@pytest.mark.parametrize("mirostat", [1, 2])
def test_mirostat_keeps_the_surprise_near_tau(prefilled: LlamaBackend, mirostat: int) -> None:
    values = logits(prefilled).astype(np.float64)
    bits = -(values - values.max() - np.log(np.exp(values - values.max()).sum())) / np.log(2)

    def surprise(tau: float) -> float:
        drawn = draw(prefilled, 400, temperature=1.0, mirostat=mirostat, mirostat_tau=tau, seed=1)
        return float(np.mean(bits[drawn[100:]]))

    assert surprise(2.0) < surprise(4.0) < surprise(6.0)


def test_a_banned_token_is_never_chosen(prefilled: LlamaBackend) -> None:
    best = int(logits(prefilled).argmax())
    banned = {best: -np.inf}
    assert best not in draw(prefilled, 50, temperature=0, logit_bias=banned)
    assert best in draw(prefilled, 200, temperature=1.0, seed=1)
    assert best not in draw(prefilled, 200, temperature=1.0, seed=1, logit_bias=banned)


def test_a_favoured_token_is_chosen(prefilled: LlamaBackend) -> None:
    assert draw(prefilled, 3, temperature=0, logit_bias={65: 100.0}) == [65] * 3


def test_the_logits_are_left_as_they_were(prefilled: LlamaBackend) -> None:
    """Two requests may sample from one row."""
    before = logits(prefilled)
    draw(
        prefilled,
        20,
        history=(65, 66, 67),
        repeat_penalty=1.5,
        presence_penalty=1.0,
        frequency_penalty=0.5,
        logit_bias={65: -np.inf, 70: 3.0},
        grammar="root ::= [a-z]*",
        seed=1,
        temperature=1.0,
    )
    np.testing.assert_array_equal(logits(prefilled), before)


def test_repetition_is_penalised(llama: LlamaBackend) -> None:
    free = generate_ids(llama, "Hello", Sampling(temperature=0), n=100)
    strict = Sampling(temperature=0, presence_penalty=100.0, repeat_last_n=-1)
    ids = generate_ids(llama, "Hello", strict, n=100)
    assert len(set(ids)) == 100 > len(set(free))
    # The prompt counts as well.
    assert not set(ids) & set(prompt_ids(llama, "Hello"))


def test_only_the_last_n_are_penalised(prefilled: LlamaBackend) -> None:
    best, second = np.argsort(-logits(prefilled))[:2].tolist()
    options = {"temperature": 0, "presence_penalty": 100.0}
    assert draw(prefilled, 1, history=(best, 65), repeat_last_n=2, **options) == [second]
    assert draw(prefilled, 1, history=(best, 65), repeat_last_n=1, **options) == [best]
    assert draw(prefilled, 1, history=(best, 65), repeat_last_n=0, **options) == [best]
    assert draw(prefilled, 1, history=(best, *[65] * 400), repeat_last_n=-1, **options) == [second]


tokens = st.integers(0, 31)


@given(
    values=st.lists(st.floats(-20, 20, width=32), min_size=32, max_size=32),
    history=st.lists(tokens, max_size=60),
    n_last=st.integers(0, 40),
    repeat=st.floats(0.5, 3),
    presence=st.floats(-2, 2),
    frequency=st.floats(-2, 2),
)
def test_penalties_are_llama_cpps(
    *,
    values: list[float],
    history: list[int],
    n_last: int,
    repeat: float,
    presence: float,
    frequency: float,
) -> None:
    """Against its own sampler, token by token."""
    row = np.array(values, np.float32)
    sampling = Sampling(
        repeat_last_n=n_last,
        repeat_penalty=repeat,
        presence_penalty=presence,
        frequency_penalty=frequency,
    )
    half = len(history) // 2
    ours = Penalties(sampling, history[:half], n_ctx=512, n_vocab=32)
    for token in history[half:]:
        ours.accept(token)
    theirs = LL.llama_sampler_init_penalties(32, n_last, repeat, frequency, presence)
    for token in history:
        LL.llama_sampler_accept(theirs, token)
    candidates = Candidates()
    candidates.fill(np.arange(32), row)
    candidates.apply(theirs)
    LL.llama_sampler_free(theirs)
    penalised = row.copy()
    undo = ours.apply(penalised)
    np.testing.assert_allclose(penalised, candidates.logits, rtol=1e-5, atol=1e-5)
    if undo is not None:
        ids, old = undo
        penalised[ids] = old
    np.testing.assert_array_equal(penalised, row)


@given(st.dictionaries(tokens, st.floats(-5, 5)))
def test_biases_are_added(biases: dict[int, float]) -> None:
    row = np.linspace(-1, 1, 32, dtype=np.float32)
    biased = row.copy()
    Bias(biases, n_vocab=32).apply(biased)
    expected = [row[i] + biases.get(i, 0.0) for i in range(32)]
    np.testing.assert_allclose(biased, expected, rtol=1e-5, atol=1e-6)


def test_logprobs_are_those_of_the_plain_logits(prefilled: LlamaBackend) -> None:
    """Of the model, whatever temperature, penalty or ban the choice was made with."""
    values = logits(prefilled).astype(np.float64)
    expected = values - values.max() - np.log(np.exp(values - values.max()).sum())
    order = np.argsort(-values)
    best = int(order[0])
    sampling = Sampling(temperature=0, logit_bias={best: -np.inf}, n_logprobs=4)
    sampler = prefilled.make_sampler(sampling, [best])
    token, found = sampler.sample(0)
    sampler.close()
    assert found is not None
    assert token == found.id == order[1]
    assert found.logprob == pytest.approx(expected[token], abs=1e-4)
    assert [one.id for one in found.top] == order[:4].tolist()
    assert [one.logprob for one in found.top] == pytest.approx(expected[order[:4]], abs=1e-4)
    assert found.data == prefilled.piece(token, special=True)
    assert found.text == found.data.decode(errors="replace")


@pytest.mark.parametrize(("n", "n_top"), [(0, 0), (1, 1), (10_000, 512)])
def test_as_many_logprobs_as_asked_for(prefilled: LlamaBackend, n: int, n_top: int) -> None:
    sampler = prefilled.make_sampler(Sampling(n_logprobs=n), [])
    _, found = sampler.sample(0)
    sampler.close()
    assert found is not None
    assert len(found.top) == n_top


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": float("inf")}, "top_p"),
        ({"repeat_penalty": 0.0}, "repeat_penalty"),
        ({"repeat_penalty": -1.0}, "repeat_penalty"),
        ({"mirostat": 3}, "mirostat"),
        ({"n_logprobs": -1}, "n_logprobs"),
        ({"top_n_sigma": float("nan")}, "top_n_sigma"),
        ({"xtc_threshold": float("inf")}, "xtc_threshold"),
        ({"dynatemp_range": float("nan")}, "dynatemp_range"),
        ({"logit_bias": {512: 1.0}}, "logit_bias"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias"),
        ({"logit_bias": {1: float("nan")}}, "logit_bias"),
    ],
)
def test_options_that_can_not_be_are_named(
    llama: LlamaBackend, options: dict[str, object], option: str
) -> None:
    with pytest.raises(InvalidOptionError, match=option) as caught:
        llama.make_sampler(Sampling(**options), [])  # type: ignore[arg-type]
    assert caught.value.option == option


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 100_000},
        {"top_k": -5},
        {"top_p": 0.0},
        {"top_p": -1.0},
        {"top_p": 7.0},
        {"min_p": 1.0},
        {"min_p": 9.0},
        {"typical_p": 0.0},
        {"temperature": 1e-9},
        {"temperature": 1e30},
        {"temperature": -1.0},
        {"mirostat": 1, "mirostat_tau": 0.0},
        {"mirostat": 2, "mirostat_tau": -9.0, "mirostat_eta": 1e9},
        {"repeat_last_n": -1, "repeat_penalty": 1e30},
        {"logit_bias": dict.fromkeys(range(512), -np.inf)},
        {"logit_bias": dict.fromkeys(range(512), -np.inf), "temperature": 0},
        {"logit_bias": {65: np.inf}},
        {"top_n_sigma": 1e-9},
        {"top_n_sigma": -1.0},
        {"top_n_sigma": 1.0, "logit_bias": dict.fromkeys(range(512), -np.inf)},
        {"xtc_probability": 1.0, "xtc_threshold": 0.0},
        {"xtc_probability": 7.0, "xtc_threshold": 0.6},
        {"dynatemp_range": 1e9},
        {"dynatemp_range": 5.0, "temperature": 0.0},
        {"dynatemp_range": 1.0, "dynatemp_exponent": 0.0},
        {"infill": True},
        {"infill": True, "temperature": 0.0},
        {"infill": True, "top_k": 1},
        {"infill": True, "ignore_eos": True},
        {"infill": True, "logit_bias": dict.fromkeys(range(512), -np.inf)},
        {"infill": True, "mirostat": 2},
    ],
    ids=repr,
)
def test_odd_options_give_a_token_all_the_same(
    prefilled: LlamaBackend, options: dict[str, object]
) -> None:
    """As they do with Ollama; nothing ends the process."""
    assert all(0 <= token < 512 for token in draw(prefilled, 20, seed=1, **options))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_nan_logits_are_an_error(prefilled: LlamaBackend, temperature: float) -> None:
    row = prefilled._context.row(0)
    saved = row.copy()
    row[:] = np.nan
    sampler = prefilled.make_sampler(Sampling(temperature=temperature), [])
    with pytest.raises(WorkerError, match="NaN"):
        sampler.sample(0)
    row[:] = saved
    sampler.close()


def test_close_may_be_called_again(llama: LlamaBackend) -> None:
    sampler = llama.make_sampler(Sampling(grammar='root ::= "a"'), [])
    sampler.close()
    sampler.close()


def test_bindings_and_struct_agree() -> None:
    """The candidates' rows are llama_token_data's."""
    assert DTYPE.itemsize == ctypes.sizeof(LL.llama_token_data)


@given(
    n=st.integers(1, 9000),
    n_best=st.integers(1, 3000),
    n_kinds=st.sampled_from([1, 3, 10**6]),
    seed=st.integers(0, 99),
)
def test_the_likeliest_are_found(n: int, n_best: int, n_kinds: int, seed: int) -> None:
    """Whatever their number and their ties, and few others where they differ."""
    n_best = min(n_best, n)
    logits = np.random.default_rng(seed).integers(0, n_kinds, n).astype(np.float32)
    found = likeliest(logits, n_best)
    best = np.sort(logits)[-n_best:]
    np.testing.assert_array_equal(np.sort(logits[found])[-n_best:], best)
    assert len(set(found.tolist())) == len(found)


def test_few_others_are_found() -> None:
    logits = np.random.default_rng(0).standard_normal(32000).astype(np.float32)
    assert len(likeliest(logits, 40)) < 60
    assert len(likeliest(logits, 1024)) < 2048


@pytest.mark.parametrize("n", [10, 32000])
def test_nan_is_never_the_likeliest(n: int) -> None:
    assert len(likeliest(np.full(n, np.nan, np.float32), 1)) == 0
