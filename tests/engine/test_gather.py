"""Slots with cells of their own change places: who runs is computed together."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from shimpy.engine.gather import MAX_MOVED, exchanges
from tests.engine.harness import Rig
from tests.fake_backend import FakeBackend


@given(
    st.lists(st.integers(0, 900), min_size=1, max_size=8),
    st.sets(st.integers(0, 7), max_size=8),
)
def test_who_runs_is_side_by_side_for_the_fewest_tokens(n_tokens: list[int], ids: set[int]) -> None:
    running = {slot for slot in ids if slot < len(n_tokens)}
    n = len(running)
    windows = [set(range(start, start + n)) for start in range(len(n_tokens) - n + 1)]
    # Whoever is in a window or runs, but not both, changes places.
    least = min(sum(n_tokens[slot] for slot in running ^ window) for window in windows)
    pairs = exchanges(n_tokens, running)
    moved = [slot for pair in pairs for slot in pair]
    assert len(moved) == len(set(moved))
    after = running ^ set(moved)
    assert after in windows or n < 2 or least > MAX_MOVED
    assert sum(n_tokens[slot] for slot in moved) == (least if least <= MAX_MOVED and n > 1 else 0)


def test_neighbours_stay_where_they_are() -> None:
    assert exchanges([5, 5, 5, 5], {1, 2}) == []
    assert exchanges([5, 5, 5, 5], {3}) == []
    assert exchanges([5, 5, 5, 5], set()) == []


def test_a_gap_is_closed_with_what_is_quickest_to_move() -> None:
    # Slot 3 comes to 1, where little idles; not slot 0 to 2, which holds much.
    assert exchanges([900, 10, 700, 40], {0, 3}) == [(3, 1)]
    assert exchanges([40, 700, 10, 900], {0, 3}) == [(0, 2)]


def test_what_takes_long_to_move_stays_apart() -> None:
    assert exchanges([9000, MAX_MOVED - 99, 0, 100], {0, 3}) == []
    assert exchanges([9000, MAX_MOVED - 100, 0, 100], {0, 3}) == [(3, 1)]


def test_streams_that_are_left_share_each_pass() -> None:
    """Four run, those in the middle end: the two others are one pass a step again."""
    backend = FakeBackend(n_ctx=256, n_slots=4, kv_unified=False, script=[65] * 200)
    rig = Rig(backend)
    for request, n_predict in enumerate([40, 4, 4, 40]):
        rig.submit(request, f"{request}" * 9, n_predict=n_predict)
    rig.finish()
    assert backend.n_exchanges == 1
    decodes = [batch for batch in backend.batches if len(batch) == 2]
    assert len(decodes) > 30
    assert all(second[0] == first[0] + 1 for batch in decodes for first, second in pairwise(batch))
    assert backend.n_passes == len(backend.batches)
    texts = {rig.told[request].text for request in (0, 3)}
    assert texts == {"A" * 40}


def test_short_prompts_of_about_a_length_are_one_pass() -> None:
    backend = FakeBackend(n_ctx=256, n_slots=4, n_batch=256, kv_unified=False, script=[65] * 9)
    rig = Rig(backend)
    for request, n in enumerate([33, 30, 31, 34]):
        rig.submit(request, f"{request}" * n, n_predict=2)
    rig.finish()
    assert backend.n_passes == len(backend.batches) == 2
    assert backend.n_used == sum([34, 31, 32, 35]) + 4
    assert {told.text for told in rig.told.values()} == {"AA"}


def test_a_chat_that_goes_on_far_away_comes_beside_the_others() -> None:
    """Its cache is moved, not computed again; what idled in its place is not lost either."""
    backend = FakeBackend(n_ctx=256, n_slots=4, kv_unified=False, script=[65] * 200)
    rig = Rig(backend)
    for request in range(4):
        rig.submit(request, f"{request}" * 30, n_predict=2)
    rig.finish()
    rig.submit(10, "0" * 30 + "A", n_predict=30)
    rig.step(2)
    rig.submit(13, "3" * 30 + "A", n_predict=30)
    rig.finish()
    assert rig.told[10].done.n_cached == rig.told[13].done.n_cached == 31
    assert backend.n_exchanges == 1
    held = sorted(bytes(backend.content(slot)[1:3]) for slot in range(4))
    assert held == [b"00", b"11", b"22", b"33"]


def test_a_shared_prefix_is_copied_to_a_slot_with_cells_of_its_own() -> None:
    backend = FakeBackend(n_ctx=256, n_slots=4, kv_unified=False, script=[65] * 200)
    rig = Rig(backend)
    for request in range(4):
        rig.submit(request, "s" * 100 + f"{request}", n_predict=8)
    rig.finish()
    n_prefilled = sum(len(tokens) for batch in backend.batches for _, _, tokens in batch)
    # All of one prompt, the ends of three, and what was generated.
    assert n_prefilled == 102 + 3 + 4 * 7
    assert backend.n_used == 4 * (102 + 7)


def test_little_of_a_long_text_is_computed_rather_than_copied() -> None:
    """A copy takes all that the other slot holds."""
    backend = FakeBackend(n_ctx=1024, n_slots=2, n_batch=512, kv_unified=False, script=[65] * 9)
    rig = Rig(backend)
    rig.submit(0, "s" * 20 + "t" * 600, n_predict=2)
    rig.finish()
    rig.submit(1, "s" * 20 + "u", n_predict=2)
    rig.submit(2, "s" * 50 + "t", n_predict=2)
    rig.finish()
    assert rig.told[1].done.n_cached == 0
