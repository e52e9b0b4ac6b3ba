"""Which slot a sequence gets, and what of the KV cache it finds there."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shimpy.engine.matching import MIN_FOLLOW, MIN_SHARED, common_prefix
from shimpy.engine.sequence import KvCopy, KvRemove, KvShift, Sequence
from shimpy.engine.slots import EVICT_CELLS, Slots

A = list(range(1000, 1300))
B = list(range(2000, 2300))


class Order:
    """Sequences in order of arrival."""

    def __init__(self) -> None:
        self.n = 0

    def __call__(self, tokens: list[int], *, reuse: bool = True) -> Sequence:
        self.n += 1
        sequence = Sequence(request=self.n, tokens=list(tokens), n_predict=10, reuse=reuse)
        sequence.order = self.n
        return sequence


def start(slots: Slots, sequence: Sequence) -> Sequence:
    slots.place(sequence, slots.best_match(sequence))
    return sequence


def compute(slots: Slots, sequence: Sequence, n: int | None = None) -> None:
    """Stand in for a decode."""
    assert sequence.slot is not None
    n = sequence.n_pending if n is None else n
    sequence.n_kv += n
    slots.cells.grow(sequence.slot.id, n)


def leave_idle(slots: Slots, sequence: Sequence) -> Sequence:
    start(slots, sequence)
    compute(slots, sequence)
    slots.release(sequence)
    slots.take_ops()
    return sequence


def slot_of(sequence: Sequence) -> int:
    assert sequence.slot is not None
    return sequence.slot.id


def test_a_conversation_goes_on_in_the_slot_that_holds_it() -> None:
    new, slots = Order(), Slots(3, 4096, can_split=True)
    leave_idle(slots, new(B))
    leave_idle(slots, new(A[:200]))
    sequence = start(slots, new(A))
    assert (slot_of(sequence), sequence.n_kv, sequence.n_cached) == (1, 200, 200)
    assert slots.take_ops() == []


def test_what_the_slot_holds_beyond_the_prefix_is_removed() -> None:
    new, slots = Order(), Slots(1, 4096, can_split=True)
    leave_idle(slots, new(A[:200]))
    sequence = start(slots, new(A[:150] + B[:20]))
    assert sequence.n_kv == 150
    assert slots.take_ops() == [KvRemove(0, 150)]
    assert slots.cells.n_used == 150


def test_the_last_token_of_a_prompt_is_computed_again() -> None:
    """Its logits are wanted, and the cache keeps none."""
    new, slots = Order(), Slots(1, 4096, can_split=True)
    leave_idle(slots, new(A))
    assert start(slots, new(A)).n_kv == len(A) - 1


def test_a_short_prefix_of_a_long_cache_is_shared_and_the_cache_kept() -> None:
    """A new conversation with the same system prompt must not cost the old one its cache."""
    new, slots = Order(), Slots(2, 4096, can_split=True)
    leave_idle(slots, new(A))
    sequence = start(slots, new(A[:40] + B[:20]))
    assert (slot_of(sequence), sequence.n_kv) == (1, 40)
    assert slots.take_ops() == [KvCopy(0, 1, 40)]
    assert slots.cells.n_used == len(A)
    slots.release(sequence)
    assert start(slots, new(A)).n_kv == len(A) - 1


@pytest.mark.parametrize("is_busy", [False, True])
def test_a_few_tokens_are_not_shared(is_busy: bool) -> None:
    """The start token's cell would never be free again, wherever it lies."""
    new, slots = Order(), Slots(2, 4096, can_split=True)
    first = start(slots, new(A))
    compute(slots, first)
    if not is_busy:
        slots.release(first)
    assert slots.best_match(new([*A[: MIN_SHARED - 1], *B])).n_now == 0
    assert slots.best_match(new([*A[:MIN_SHARED], *B])).n_now == MIN_SHARED
    if not is_busy:
        # A short text's own slot goes on with it.
        slots.cut(0, 4)
        assert slots.best_match(new([*A[:4], *B])).n_now == 4


def test_a_busy_slots_prefix_is_shared() -> None:
    new, slots = Order(), Slots(2, 4096, can_split=True)
    first = start(slots, new(A))
    compute(slots, first)
    second = start(slots, new(A[:100] + B[:50]))
    assert (slot_of(second), second.n_kv, second.leader) == (1, 100, None)
    assert slots.take_ops() == [KvCopy(0, 1, 100)]


def test_an_idle_slot_is_preferred_to_a_busy_one_that_holds_as_much() -> None:
    new, slots = Order(), Slots(3, 4096, can_split=True)
    first = start(slots, new(A))
    compute(slots, first)
    leave_idle(slots, new(A))
    assert slot_of(start(slots, new([*A[:299], 7]))) == 1
    assert slots.take_ops() == [KvRemove(1, 299)]


def test_a_prefix_that_is_being_computed_is_waited_for() -> None:
    new, slots = Order(), Slots(2, 4096, can_split=True)
    first = start(slots, new(A))
    compute(slots, first, 10)
    second = start(slots, new(A[:200] + B[:50]))
    assert (second.leader, second.n_shared, second.n_kv) == (first, 200, 0)
    assert slots.take_ops() == []


def test_a_few_tokens_are_not_waited_for() -> None:
    new, slots = Order(), Slots(2, 4096, can_split=True)
    first = start(slots, new(A))
    compute(slots, first, 100)
    second = start(slots, new(A[: 100 + MIN_FOLLOW] + B[:50]))
    assert (second.leader, second.n_kv) == (None, 100)


def test_two_sequences_never_wait_for_each_other() -> None:
    """When their leader has gone, the older computes and the younger waits for it."""
    new, slots = Order(), Slots(3, 4096, can_split=True)
    leader, older, younger = (start(slots, new(A)) for _ in range(3))
    assert older.leader is younger.leader is leader
    slots.drop(leader)
    slots.reuse(older, slots.best_match(older))
    slots.reuse(younger, slots.best_match(younger))
    assert (older.leader, younger.leader) == (None, older)


def test_a_request_may_refuse_to_share() -> None:
    new, slots = Order(), Slots(2, 4096, can_split=True)
    leave_idle(slots, new(A))
    assert start(slots, new(A, reuse=False)).n_kv == 0


def test_the_slot_that_was_idle_longest_gives_way_empty_ones_first() -> None:
    new, slots = Order(), Slots(3, 4096, can_split=True)
    first, second = start(slots, new(A)), start(slots, new(B))
    compute(slots, first)
    compute(slots, second)
    slots.release(second)
    slots.release(first)
    other = [start(slots, new([n] * 9)) for n in range(3)]
    assert [slot_of(sequence) for sequence in other] == [2, 1, 0]


@pytest.mark.parametrize(
    ("shape", "reuse", "n_start"),
    [
        ({"kv_unified": False}, True, 1),
        ({"kv_unified": False}, False, 0),
        ({"kv_unified": True}, True, 0),
        ({"kv_unified": False, "can_split": False}, True, 0),
    ],
    ids=["own-cells", "refused", "shared-cells", "one-state"],
)
def test_the_start_token_stays_with_the_slot(
    shape: dict[str, bool], reuse: bool, n_start: int
) -> None:
    new, slots = Order(), Slots(1, 4096, **{"can_split": True, **shape})
    leave_idle(slots, new([1, *A]))
    sequence = start(slots, new([1, *B], reuse=reuse))
    assert (sequence.n_kv, sequence.n_cached) == (n_start, n_start)
    assert slots.take_ops() == [KvRemove(0, n_start)]
    assert slots.cells.n_used == n_start


def test_a_recurrent_state_is_used_whole_or_not_at_all() -> None:
    new, slots = Order(), Slots(2, 4096, can_split=False)
    leave_idle(slots, new(A[:100]))
    assert start(slots, new(A[:99] + B)).n_kv == 0
    assert start(slots, new(A[:200])).n_kv == 100


def test_idle_caches_give_way_from_their_ends_the_oldest_first() -> None:
    new, slots = Order(), Slots(2, 4096, can_split=True)
    leave_idle(slots, new(A))
    leave_idle(slots, new(B))
    assert slots.evict(10)
    assert slots.take_ops() == [KvRemove(0, len(A) - EVICT_CELLS)]
    assert slots.evict(10)
    assert slots.take_ops() == [KvRemove(0, 0)]
    assert slots.evict(280)
    assert slots.take_ops() == [KvRemove(1, 20)]
    assert slots.evict(1)
    assert not slots.evict(1)
    assert slots.cells.n_used == 0


def test_a_recurrent_state_gives_way_whole() -> None:
    new, slots = Order(), Slots(1, 4096, can_split=False)
    leave_idle(slots, new(A))
    assert slots.evict(10)
    assert slots.take_ops() == [KvRemove(0, 0)]


def test_a_context_shift_drops_the_older_half() -> None:
    new, slots = Order(), Slots(1, 4096, can_split=True)
    sequence = start(slots, new(A[:101]))
    compute(slots, sequence, 100)
    slots.shift(sequence, 11)
    assert sequence.tokens == A[:11] + A[56:101]
    assert sequence.n_kv == 55
    assert slots.take_ops() == [KvRemove(0, 11, 56), KvShift(0, 56, 100, -45)]
    assert slots.cells.n_used == 55


def test_cells_that_another_slot_holds_are_computed_again_instead_of_moved() -> None:
    new, slots = Order(), Slots(2, 4096, can_split=True)
    first = start(slots, new(A[:101]))
    compute(slots, first, 100)
    start(slots, new(A[:60]))
    slots.take_ops()
    slots.shift(first, 11)
    assert first.n_kv == 11
    assert slots.take_ops() == [KvRemove(0, 11)]


def test_shifted_positions_are_no_prefix_for_others() -> None:
    """They were computed behind tokens that are gone; only what n_keep spared is exact."""
    new, slots = Order(), Slots(2, 4096, can_split=True)
    sequence = start(slots, new(A[:101]))
    compute(slots, sequence, 100)
    slots.shift(sequence, 31)
    slots.take_ops()
    same = new(sequence.tokens)
    assert slots.best_match(same).n_now == 31
    slots.release(sequence)
    assert slots.best_match(same).n_now == 31
    start(slots, same)
    compute(slots, same)
    assert slots.best_match(new(same.tokens)).n_now == len(same.tokens) - 1


def test_what_is_left_of_a_shifted_cache_is_no_more_exact() -> None:
    new, slots = Order(), Slots(1, 4096, can_split=True)
    sequence = start(slots, new([*A, *B]))
    compute(slots, sequence)
    slots.shift(sequence, 31)
    tokens = list(sequence.tokens)
    slots.release(sequence)
    assert slots.evict(1)
    assert slots.best_match(new(tokens)).n_now == 31


@given(
    st.lists(st.integers(0, 2), max_size=40),
    st.lists(st.integers(0, 2), max_size=9),
    st.lists(st.integers(0, 2), max_size=9),
)
def test_the_common_prefix_is_found_by_halving(stem: list[int], a: list[int], b: list[int]) -> None:
    a, b = stem + a, stem + b
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    assert common_prefix(a, b) == n


def test_idle_caches_are_thinned_to_the_newest_where_they_cost() -> None:
    """The one that the next prompt likely goes on from stays whole, the others give way."""
    new, slots = Order(), Slots(4, 4096, can_split=True)
    leave_idle(slots, new(B[:280]))
    leave_idle(slots, new(A))
    leave_idle(slots, new(range_of(3000, 40)))
    leave_idle(slots, new(range_of(4000, 290)))
    start(slots, new([1, 2, 3], reuse=False))
    slots.thin_idle()
    assert slots.cells.n_used == 290
    assert [op for op in slots.take_ops() if isinstance(op, KvRemove)]
    assert slots.best_match(new(range_of(4000, 300))).n_now == 290


def test_idle_caches_may_be_as_long_as_what_runs() -> None:
    """Beside a long prompt a few short ones make no difference."""
    new, slots = Order(), Slots(4, 4096, can_split=True)
    leave_idle(slots, new(range_of(3000, 200)))
    leave_idle(slots, new(range_of(4000, 250)))
    start(slots, new(range_of(5000, 2000)))
    slots.thin_idle()
    assert slots.cells.n_used == 450


@pytest.mark.parametrize(("n_prompt", "n_left"), [(20, 150), (100, 100), (180, 150)])
def test_idle_caches_may_fill_what_is_attended_to_anyway(n_prompt: int, n_left: int) -> None:
    """256 cells: of a prompt, of 64 tokens that it may be answered with, and of idle ones."""
    new, slots = Order(), Slots(4, 4096, can_split=True)
    for first in (3000, 4000, 5000):
        leave_idle(slots, new(range_of(first, 50)))
    start(slots, new(range_of(6000, n_prompt)))
    slots.thin_idle()
    assert slots.cells.n_used == n_left


def range_of(start: int, n: int) -> list[int]:
    return list(range(start, start + n))
