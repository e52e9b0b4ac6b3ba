"""What of which prompt a batch computes, where each slot has cells of its own."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shimpy.engine.sequence import Sequence
from shimpy.engine.shares import ALONE, SHORT, share_alone


def prompts(*lengths: int) -> list[Sequence]:
    return [Sequence(request=i, tokens=[1] * n, n_predict=1) for i, n in enumerate(lengths)]


def shared(lengths: list[int], n_tokens: int, *, is_oldests_turn: bool) -> list[tuple[int, int]]:
    shares = share_alone(prompts(*lengths), n_tokens, is_oldests_turn=is_oldests_turn)
    return [(sequence.request, n) for sequence, n in shares]


def test_the_oldest_and_the_shortest_take_turns() -> None:
    assert shared([900, 300, 500], 512, is_oldests_turn=True) == [(0, ALONE)]
    assert shared([900, 300, 500], 512, is_oldests_turn=False) == [(1, 300)]
    assert shared([900, 300, 500], 48, is_oldests_turn=False) == [(1, 48)]


def test_short_ones_go_together_the_shortest_first() -> None:
    assert shared([900, 60, 20, 30], 512, is_oldests_turn=False) == [(2, 20), (3, 30), (1, 60)]
    assert shared([40, 20, 900], 50, is_oldests_turn=True) == [(0, 40), (1, 10)]


def test_no_batch_has_a_few_tokens_that_are_over() -> None:
    assert shared([257], 512, is_oldests_turn=True) == [(0, 257)]
    assert shared([384], 512, is_oldests_turn=True) == [(0, 384)]
    assert shared([385], 512, is_oldests_turn=True) == [(0, ALONE)]


@given(
    st.lists(st.integers(1, 2000), max_size=8),
    st.integers(0, 512),
    st.booleans(),
)
def test_a_batch_is_no_larger_than_it_may_be_and_never_empty(
    lengths: list[int], n_tokens: int, is_oldests_turn: bool
) -> None:
    shares = shared(lengths, n_tokens, is_oldests_turn=is_oldests_turn)
    assert bool(shares) == bool(lengths and n_tokens)
    assert sum(n for _, n in shares) <= n_tokens
    assert all(0 < n <= lengths[index] for index, n in shares)
    assert len({index for index, _ in shares}) == len(shares)
    assert len(shares) == 1 or all(lengths[index] <= SHORT for index, _ in shares)
    if is_oldests_turn and shares:
        assert shares[0][0] == 0
