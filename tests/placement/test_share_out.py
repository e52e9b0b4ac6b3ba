"""How consecutive layers are shared out among several GPUs."""

from __future__ import annotations

from itertools import combinations_with_replacement, pairwise

from hypothesis import given
from hypothesis import strategies as st

from shimpy.placement.search import share_out

SIZES = st.lists(st.integers(1, 60), min_size=1, max_size=9)
ROOM = st.lists(st.integers(0, 150), min_size=2, max_size=4)


def partitions(n_layers: int, n_gpus: int) -> list[list[int]]:
    """Every way to cut a row of layers into that many parts, empty ones among them."""
    borders = combinations_with_replacement(range(n_layers + 1), n_gpus - 1)
    return [[b - a for a, b in pairwise((0, *cut, n_layers))] for cut in borders]


def fits(counts: list[int], sizes: list[int], room: list[int]) -> bool:
    start = 0
    for count, free in zip(counts, room, strict=True):
        if sum(sizes[start : start + count]) > free:
            return False
        start += count
    return True


@given(SIZES, ROOM)
def test_a_share_is_found_whenever_there_is_one(sizes: list[int], room: list[int]) -> None:
    counts = [int(count) for count in share_out(sizes, room)]
    assert sum(counts) == len(sizes)
    assert min(counts) >= 0
    possible = any(fits(cut, sizes, room) for cut in partitions(len(sizes), len(room)))
    assert fits(counts, sizes, room) == possible


@given(st.integers(1, 40), st.integers(2, 4))
def test_equal_cards_get_equal_shares(n_layers: int, n_gpus: int) -> None:
    counts = share_out([10] * n_layers, [10 * n_layers] * n_gpus)
    assert max(counts) - min(counts) <= 1


def test_what_fits_only_one_way_is_packed_that_way() -> None:
    """In proportion to the room the second card would get a third, where only a half fits."""
    assert share_out([30, 30, 50, 50], [90, 100]) == (2.0, 2.0)
    assert share_out([20, 20, 20, 100], [60, 100]) == (3.0, 1.0)
