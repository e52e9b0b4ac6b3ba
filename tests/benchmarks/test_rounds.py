from __future__ import annotations

import itertools

import pytest

from tests.benchmarks.peers.__main__ import _Bounds
from tests.benchmarks.peers.report import US


def n_rounds(bounds: _Bounds, *, round_s: float, n_done: int = 0) -> int:
    """`round_s`: of shimpy, who is alone."""
    while bounds.has_another(n_done, {US: n_done * round_s}):
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


def test_who_is_slow_sits_out_the_last_rounds() -> None:
    bounds = _Bounds(5, fill_s=30, budget_s=25)
    seconds = {US: 6.0, "bare": 5.0, "slow": 20.0, "never": 100.0}
    took_s = dict.fromkeys(seconds, 0.0)
    rounds: list[set[str]] = []
    while bounds.has_another(len(rounds), took_s):
        rounds.append({name for name in seconds if bounds.has_time(name, took_s)})
        for name in rounds[-1]:
            took_s[name] += seconds[name]
    assert {name: sum(name in one for one in rounds) for name in seconds} == {
        US: 5,
        "bare": 5,
        "slow": 2,
        "never": 1,
    }
