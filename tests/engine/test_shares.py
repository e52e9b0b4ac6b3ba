"""What of which prompt a batch computes, where each slot has cells of its own."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shimpy.engine.sequence import Sequence, Slot
from shimpy.engine.shares import PASS, SHORT, share_alone


def prompts(*lengths: int, slots: list[int] | None = None) -> list[Sequence]:
    numbers = slots or list(range(len(lengths)))
    return [
        Sequence(request=i, tokens=[1] * n, n_predict=1, slot=Slot(number))
        for (i, n), number in zip(enumerate(lengths), numbers, strict=True)
    ]


def shared(
    lengths: list[int],
    n_tokens: int,
    *,
    is_oldests_turn: bool,
    slots: list[int] | None = None,
    n_cells: int = 4096,
    can_pad: bool = True,
) -> list[tuple[int, int]]:
    shares = share_alone(
        prompts(*lengths, slots=slots),
        n_tokens,
        is_oldests_turn=is_oldests_turn,
        n_cells=n_cells,
        can_pad=can_pad,
    )
    return [(sequence.request, n) for sequence, n in shares]


def test_the_oldest_and_the_shortest_take_turns() -> None:
    assert shared([900, 300, 500], 512, is_oldests_turn=True) == [(0, 256)]
    assert shared([900, 300, 500], 512, is_oldests_turn=False) == [(1, 256)]
    assert shared([900, 300, 500], 48, is_oldests_turn=False) == [(1, 48)]


def test_short_ones_go_together_padded_to_one_length() -> None:
    """One pass over the weights for all of them, and nothing is over."""
    assert shared([33, 31, 32, 34], 512, is_oldests_turn=True) == [(i, 34) for i in range(4)]
    # Of alike ones the oldest is next, as far as the batch goes.
    assert shared([33, 31, 32, 34], 70, is_oldests_turn=False) == [(0, 33), (1, 33)]
    assert shared([33, 31], 48, is_oldests_turn=True) == [(0, 33)]
    assert shared([33, 31], 30, is_oldests_turn=True) == [(0, 30)]


def test_padding_costs_less_than_a_pass() -> None:
    assert shared([20, 20 + PASS], 512, is_oldests_turn=True) == [(0, 28), (1, 28)]
    assert shared([20, 21 + PASS], 512, is_oldests_turn=True) == [(0, 20)]
    # Two would be padded.
    assert shared([20, 20, 21 + PASS // 2], 512, is_oldests_turn=True) == [(0, 20), (1, 20)]
    # The end of one does not make all others go by as little.
    assert shared([2, 32, 31, 33], 512, is_oldests_turn=False) == [(0, 2)]
    assert shared([33, 31, 33], 512, is_oldests_turn=True, can_pad=False) == [(0, 33)]
    assert shared([33, 33, 31], 512, is_oldests_turn=True, can_pad=False) == [(0, 33), (1, 33)]


def test_padding_fits_into_the_slot() -> None:
    assert shared([30, 28], 512, is_oldests_turn=True, n_cells=30) == [(0, 30), (1, 30)]
    first, second = prompts(30, 40)
    second.n_kv = 12
    shares = share_alone([first, second], 512, is_oldests_turn=True, n_cells=41)
    assert [sequence for sequence, _ in shares] == [first]


def test_only_neighbours_go_together_in_their_order() -> None:
    """llama.cpp computes only those at once whose numbers follow each other."""
    lengths, slots = [30, 30, 30, 30, 30], [4, 3, 6, 5, 1]
    assert shared(lengths, 512, is_oldests_turn=True, slots=slots) == [
        (1, 30),
        (0, 30),
        (3, 30),
        (2, 30),
    ]
    assert shared([30, 900, 30], 512, is_oldests_turn=True) == [(0, 30)]


def test_a_batch_ends_where_the_cells_do_that_it_attends_to() -> None:
    assert shared([257], 512, is_oldests_turn=True) == [(0, 256)]
    assert shared([200], 512, is_oldests_turn=True) == [(0, 200)]
    [sequence] = prompts(900)
    sequence.n_kv = 96
    for n_tokens, n in ((512, 160), (48, 48)):
        shares = share_alone([sequence], n_tokens, is_oldests_turn=True, n_cells=4096)
        assert shares == [(sequence, n)]


@given(
    st.lists(st.integers(1, 2000) | st.integers(1, 80), max_size=8).flatmap(
        lambda lengths: st.tuples(st.just(lengths), st.permutations(range(len(lengths))))
    ),
    st.integers(0, 512),
    st.booleans(),
    st.booleans(),
)
def test_a_batch_is_no_larger_than_it_may_be_and_never_empty(
    prompts_in_slots: tuple[list[int], list[int]],
    n_tokens: int,
    is_oldests_turn: bool,
    can_pad: bool,
) -> None:
    lengths, slots = prompts_in_slots
    shares = shared(
        lengths, n_tokens, is_oldests_turn=is_oldests_turn, slots=slots, can_pad=can_pad
    )
    assert bool(shares) == bool(lengths and n_tokens)
    assert sum(n for _, n in shares) <= n_tokens
    assert all(n > 0 for _, n in shares)
    assert can_pad or all(n <= lengths[index] for index, n in shares)
    assert len({index for index, _ in shares}) == len(shares)
    taken = [slots[index] for index, _ in shares]
    assert taken == list(range(taken[0], taken[0] + len(taken))) if taken else True
    # One length, and less padding than so many passes would take.
    assert len({n for _, n in shares}) <= 1
    assert sum(max(0, n - lengths[index]) for index, n in shares) <= PASS * max(0, len(shares) - 1)
    assert len(shares) == 1 or all(lengths[index] <= SHORT for index, _ in shares)
    if is_oldests_turn and shares:
        assert 0 in {index for index, _ in shares}
