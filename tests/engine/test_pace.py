"""Prefill chunks beside running streams: as long as the machine is quick enough for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shimpy.engine.pace import MAX_SLOWDOWN, MIN_CHUNK, STALL_S, Pace


def settle(seconds: Callable[[int], float], *, n_most: int = 2048, alone: int = 0) -> list[int]:
    """The sizes of 40 chunks on a machine that takes seconds(n) for n tokens."""
    pace = Pace(n_most)
    if alone:
        pace.on_batch(alone, seconds(alone))
    sizes = []
    for _ in range(40):
        sizes.append(pace.chunk)
        pace.on_batch(pace.chunk, seconds(pace.chunk))
    return sizes


@pytest.mark.parametrize("alone", [0, 512, 2048])
def test_on_a_slow_machine_chunks_stay_short(alone: int) -> None:
    """Two cores and a 200M model: 650 tokens a second."""
    assert set(settle(lambda n: n / 650, alone=alone)) == {MIN_CHUNK}


def test_on_a_gpu_they_grow_to_what_the_stall_allows() -> None:
    """Doubled once too often now and then, when the bad mark has faded."""
    sizes = settle(lambda n: 0.008 + n * 0.00008)
    assert sizes[:4] == [128, 512, 1024, 1024]
    assert set(sizes[3:]) == {1024}


def test_where_the_cost_is_the_same_for_any_length_they_are_long() -> None:
    """Experts in RAM are copied to the GPU for each batch, however short."""
    for alone in (512, 2048):
        assert settle(lambda n: 0.17 + n * 0.000032, alone=alone)[2:] == [2048] * 38


def test_they_are_never_longer_than_a_batch() -> None:
    assert max(settle(lambda n: 0.0, n_most=300)) == 300
    assert max(settle(lambda n: 0.0, n_most=100)) == 100


def test_a_part_of_a_chunk_says_nothing() -> None:
    pace = Pace(2048)
    for n in (1, 60, 100, 140, 200):
        pace.on_batch(n, 0.0)
    assert pace.chunk == MIN_CHUNK


def test_a_machine_that_was_slow_for_a_while_is_tried_again() -> None:
    pace = Pace(2048)
    pace.on_batch(256, 0.13)
    n_batches = 0
    while pace.chunk == MIN_CHUNK:
        pace.on_batch(MIN_CHUNK, 0.02)
        n_batches += 1
        assert n_batches < 100
    assert n_batches > 20


@given(st.floats(0, 0.3), st.floats(0.00001, 0.01))
def test_a_stream_seldom_waits_longer_than_it_should(fixed_s: float, token_s: float) -> None:
    """All but what is tried once in a while stays within the limit."""
    sizes = settle(lambda n: fixed_s + token_s * n)[8:]
    limit_s = max(STALL_S, MAX_SLOWDOWN * (fixed_s + token_s * MIN_CHUNK))
    too_long = [n for n in sizes if n > MIN_CHUNK and fixed_s + token_s * n > limit_s * 1.01]
    assert len(too_long) <= len(sizes) / 8
