from __future__ import annotations

import itertools

import pytest

from tests.benchmarks.peers.__main__ import _Bounds


def n_rounds(bounds: _Bounds, *, round_s: float, n_done: int = 0) -> int:
    while bounds.has_another(n_done, n_done * round_s):
        n_done += 1
    return n_done


@pytest.mark.parametrize(
    ("round_s", "n_wanted"),
    [
        # As many as wanted, more where they are short, fewer where they are long, one at least.
        (10, 5),
        (2, 16),
        (0.1, 25),
        (50, 3),
        (500, 1),
    ],
)
def test_rounds_fill_some_time_and_keep_to_a_budget(round_s: float, n_wanted: int) -> None:
    assert n_rounds(_Bounds(5, fill_s=30, budget_s=120), round_s=round_s) == n_wanted


@pytest.mark.parametrize("round_s", [0.1, 2, 10, 50, 500])
def test_the_rounds_are_divided_among_the_starts(round_s: float) -> None:
    whole = _Bounds(5, fill_s=30, budget_s=120)
    done = [0]
    for start in (1, 2, 3):
        done.append(n_rounds(whole.part(start / 3), round_s=round_s, n_done=done[-1]))
    assert done[-1] == n_rounds(whole, round_s=round_s)
    shares = [after - before for before, after in itertools.pairwise(done)]
    assert max(shares) - min(shares) <= 1
