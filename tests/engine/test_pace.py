"""Prefill chunks beside running streams: as long as the machine is quick enough for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shimpy.engine.pace import LEAST_CHUNK, MIN_CHUNK, STALL_S, Pace


def settle(
    seconds: Callable[[int], float],
    *,
    n_most: int = 2048,
    before: tuple[int, ...] = (),
    uses_gpu: bool = False,
) -> list[int]:
    """The sizes of 40 chunks on a machine that takes seconds(n) for n tokens."""
    pace = Pace(n_most, uses_gpu=uses_gpu)
    for n in before:
        pace.on_batch(n, seconds(n))
    sizes = []
    for _ in range(40):
        sizes.append(pace.chunk)
        pace.on_batch(pace.chunk, seconds(pace.chunk))
    return sizes


@pytest.mark.parametrize("before", [(), (64,), (512,), (64, 512, 2048)])
def test_on_a_slow_machine_chunks_stay_short(before: tuple[int, ...]) -> None:
    """A core and a 200M model: 128 tokens in 0.16 s, 256 in 0.3 s."""
    assert set(settle(lambda n: 0.01 + n * 0.00115, before=before)[2:]) == {MIN_CHUNK}


@pytest.mark.parametrize(("token_s", "expected"), [(0.0016, 96), (0.003, 48), (0.005, LEAST_CHUNK)])
@pytest.mark.parametrize("before", [(), (64,), (512,), (64, 512, 2048)])
def test_where_they_would_be_long_they_shrink(
    before: tuple[int, ...], token_s: float, expected: int
) -> None:
    """Deep in a prompt, or with a larger model; shorter ones still would cost too much."""
    assert settle(lambda n: n * token_s, before=before)[-1] == expected


def test_where_a_batch_costs_much_by_itself_shrinking_saves_too_little() -> None:
    sizes = settle(lambda n: 0.15 + n * 0.002)
    assert LEAST_CHUNK not in sizes[4:]


def test_what_a_batch_took_at_a_prompts_beginning_says_nothing_deep_inside() -> None:
    """Two cores and a 200M model: 256 tokens of short prompts, then a long one."""
    pace = Pace(512)
    for _ in range(4):
        pace.on_batch(256, 0.37)
    depth = 0
    while depth < 1500:
        n = pace.chunk
        assert n <= MIN_CHUNK
        seconds = n * (0.0013 + 0.0000009 * depth)
        assert seconds < 0.3
        pace.on_batch(n, seconds, depth=depth)
        depth += n


def test_what_a_batch_took_beside_many_others_says_nothing_of_a_lone_prompt() -> None:
    """Plain attention goes over their cells too: longer batches without them looked quick."""
    pace = Pace(512)
    for _ in range(3):
        pace.on_batch(96, 0.337, depth=2000)
    for n, seconds, depth in ((256, 0.40, 0), (512, 0.80, 0), (128, 0.17, 49)):
        pace.on_batch(n, seconds, depth=depth)
        assert pace.chunk <= MIN_CHUNK


def test_one_slow_batch_makes_none_longer_than_streams_should_wait() -> None:
    pace = Pace(512)
    for n, seconds in ((256, 0.40), (128, 0.17), (128, 0.17)):
        pace.on_batch(n, seconds, depth=300)
    pace.on_batch(128, 0.40, depth=500)
    assert pace.chunk <= MIN_CHUNK


def test_a_guess_is_at_most_twice_as_long_as_what_was_seen() -> None:
    """A slot's first batch takes longer: from that, longer batches look as if they cost nothing."""
    pace = Pace(512)
    pace.on_batch(39, 0.224)
    pace.on_batch(48, 0.189)
    assert pace.chunk == 96
    pace.on_batch(96, 0.38)
    assert pace.chunk == 48


def test_batches_that_were_far_slower_than_short_ones_say_nothing_of_long_ones() -> None:
    pace = Pace(512)
    for n, seconds in ((117, 0.776), (78, 0.697), (32, 0.088)):
        pace.on_batch(n, seconds)
    assert pace.chunk == 32


@given(st.lists(st.tuples(st.integers(32, 400), st.floats(0.001, 2.0)), min_size=1))
def test_none_is_far_longer_than_any_that_was_seen(batches: list[tuple[int, float]]) -> None:
    pace, longest = Pace(2048), 0
    for n, seconds in batches:
        pace.on_batch(n, seconds)
        longest = max(longest, n)
        assert pace.chunk <= 2 * longest + 64


def test_after_a_long_prompt_they_are_as_before() -> None:
    """Each chunk is slower than the one before it, until the next prompt begins."""
    pace = Pace(512)
    for depth in range(12):
        pace.on_batch(pace.chunk, pace.chunk * (0.0013 + 0.0001 * depth), depth=120 * depth)
    assert pace.chunk < MIN_CHUNK
    for _ in range(2):
        pace.on_batch(pace.chunk, pace.chunk * 0.0012)
    assert pace.chunk == MIN_CHUNK


@pytest.mark.parametrize("uses_gpu", [False, True])
def test_on_a_gpu_they_grow_to_what_the_stall_allows(uses_gpu: bool) -> None:
    sizes = settle(lambda n: 0.008 + n * 0.00008, before=(512,), uses_gpu=uses_gpu)
    assert set(sizes) == {1024}


@pytest.mark.parametrize("before", [(), (40,), (130,)])
def test_after_short_prompts_that_takes_a_gpu_a_few_chunks(before: tuple[int, ...]) -> None:
    sizes = settle(lambda n: 0.008 + n * 0.00008, before=before, uses_gpu=True)
    assert set(sizes[4:]) == {1024}


# DeepSeek-MoE-16B with its experts in page-locked RAM, on an H200 (docs/performance.md): an
# affine cost, and one that rises less steeply for long batches.
@pytest.mark.parametrize(
    "seconds", [lambda n: 0.107 + n * 0.0000625, lambda n: 0.03 + 0.0053 * n**0.5]
)
@pytest.mark.parametrize("before", [(512,), (514,), (500, 2048), (64, 256), (90, 200)])
@pytest.mark.parametrize("uses_gpu", [False, True])
def test_where_most_of_the_cost_is_the_batchs_own_they_are_long(
    seconds: Callable[[int], float], before: tuple[int, ...], uses_gpu: bool
) -> None:
    assert settle(seconds, before=before, uses_gpu=uses_gpu)[6:] == [2048] * 34


@pytest.mark.parametrize(
    "seconds", [lambda n: 0.107 + n * 0.0000625, lambda n: 0.03 + 0.0053 * n**0.5]
)
@pytest.mark.parametrize("before", [(), (40,), (130,), (130, 128)])
def test_on_a_gpu_they_are_long_after_short_prompts_of_one_size_too(
    seconds: Callable[[int], float], before: tuple[int, ...]
) -> None:
    assert settle(seconds, before=before, uses_gpu=True)[8:] == [2048] * 32


def prefill(pace: Pace, seconds: Callable[[int], float], n_tokens: int) -> list[int]:
    """The sizes of a long prompt's chunks, each behind those before it."""
    sizes: list[int] = []
    while (depth := sum(sizes)) < n_tokens:
        sizes.append(pace.chunk)
        pace.on_batch(pace.chunk, seconds(pace.chunk) + 1e-6 * depth, depth=depth)
    return sizes


def test_deep_inside_of_a_prompt_a_gpu_goes_on_as_before() -> None:
    """What longer batches took near its beginning tells how much longer they take."""
    pace = Pace(2048, uses_gpu=True)
    pace.on_batch(130, 0.115)
    sizes = prefill(pace, lambda n: 0.107 + n * 0.0000625, 30_000)
    assert min(sizes[8:]) >= 1024
    again = prefill(pace, lambda n: 0.107 + n * 0.0000625, 30_000)
    assert min(again) >= 512
    assert min(again[4:]) >= 1024


def test_nor_does_it_try_there_what_gained_nothing() -> None:
    pace = Pace(2048, uses_gpu=True)
    pace.on_batch(130, 0.13)
    sizes = prefill(pace, lambda n: n * 0.001, 8000)
    assert sum(n > MIN_CHUNK for n in sizes) <= 2


@pytest.mark.parametrize("before", [(), (130,), (130, 128)])
def test_a_gpu_that_gains_nothing_by_long_ones_is_tried_once(before: tuple[int, ...]) -> None:
    """Behind a slow bus, say: a chunk of twice as many, and they are short again."""
    sizes = settle(lambda n: n * 0.001, before=before, uses_gpu=True)
    assert max(sizes) <= 2 * MIN_CHUNK
    assert sum(n > MIN_CHUNK for n in sizes) <= 1


def test_one_slow_batch_is_forgotten_with_the_next() -> None:
    """The first one on a GPU also loads the kernels."""
    pace = Pace(2048)
    for n, seconds in ((512, 0.9), (128, 0.115), (512, 0.139), (128, 0.115)):
        pace.on_batch(n, seconds)
    assert pace.chunk == 1024
    for _ in range(2):
        pace.on_batch(1024, 0.171)
    assert pace.chunk == 2048


def test_they_are_never_longer_than_a_batch() -> None:
    assert max(settle(lambda n: 0.0, n_most=300)) == 300
    assert max(settle(lambda n: 0.0, n_most=100)) == 100


def test_a_short_batch_says_nothing() -> None:
    pace = Pace(2048)
    for n in (1, 20, 31):
        pace.on_batch(n, 0.0)
    assert pace.chunk == MIN_CHUNK


def test_a_machine_that_was_slow_for_a_while_is_tried_again() -> None:
    pace = Pace(2048)
    pace.on_batch(MIN_CHUNK, 0.04)
    pace.on_batch(256, 0.3)
    n_batches = 0
    while pace.chunk == MIN_CHUNK:
        pace.on_batch(MIN_CHUNK, 0.04)
        n_batches += 1
        assert n_batches < 1000
    assert n_batches > 20


@given(st.floats(0, 0.3), st.floats(0.00001, 0.01))
def test_a_stream_seldom_waits_longer_than_it_should(fixed_s: float, token_s: float) -> None:
    """No longer than STALL_S, or than four times what any batch takes."""
    sizes = settle(lambda n: fixed_s + token_s * n)[8:]
    limit_s = max(STALL_S, 4 * fixed_s)
    too_long = [n for n in sizes if n > MIN_CHUNK and fixed_s + token_s * n > limit_s * 1.01]
    assert len(too_long) <= len(sizes) / 8


def test_a_chunk_is_shortened_for_a_prompt_that_comes_alone() -> None:
    pace = Pace(2048)
    for depth in range(0, 1536, 128):
        pace.on_batch(128, 0.17 + 0.12e-3 * depth, depth=depth)
        pace.on_batch(64, 0.1 + 0.06e-3 * depth, depth=depth)
    assert pace.chunk_for(1) == pace.chunk < MIN_CHUNK
    assert pace.chunk_for(2) == MIN_CHUNK
    assert Pace(32).chunk_for(2) == 32
