"""What of which prompt a batch computes, where each slot has cells of its own."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shimpy.engine.sequence import Sequence
from shimpy.engine.shares import SHORT, share_alone


def prompts(*lengths: int) -> list[Sequence]:
    return [Sequence(request=i, tokens=[1] * n, n_predict=1) for i, n in enumerate(lengths)]


def shared(lengths: list[int], n_tokens: int, *, is_oldests_turn: bool) -> list[tuple[int, int]]:
    shares = share_alone(prompts(*lengths), n_tokens, is_oldests_turn=is_oldests_turn)
    return [(sequence.request, n) for sequence, n in shares]


def test_the_oldest_and_the_shortest_take_turns() -> None:
    assert shared([900, 300, 500], 512, is_oldests_turn=True) == [(0, 256)]
    assert shared([900, 300, 500], 512, is_oldests_turn=False) == [(1, 256)]
    assert shared([900, 300, 500], 48, is_oldests_turn=False) == [(1, 48)]


def test_short_ones_go_together_the_shortest_first() -> None:
    """As many tokens of each, for one pass over the weights."""
    assert shared([900, 60, 20, 30], 512, is_oldests_turn=False) == [(2, 20), (3, 20), (1, 20)]
    assert shared([40, 20, 900], 50, is_oldests_turn=True) == [(0, 20), (1, 20)]
    assert shared([40, 20, 900], 30, is_oldests_turn=True) == [(0, 20)]
    assert shared([40, 40, 900], 30, is_oldests_turn=True) == [(0, 30)]


def test_a_batch_ends_where_the_cells_do_that_it_attends_to() -> None:
    assert shared([257], 512, is_oldests_turn=True) == [(0, 256)]
    assert shared([200], 512, is_oldests_turn=True) == [(0, 200)]
    [sequence] = prompts(900)
    sequence.n_kv = 96
    assert share_alone([sequence], 512, is_oldests_turn=True) == [(sequence, 160)]
    assert share_alone([sequence], 48, is_oldests_turn=True) == [(sequence, 48)]


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
