"""Which prefixes are saved, which one comes back, which files go."""

from __future__ import annotations

from array import array
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shimpy.engine import prefixes
from shimpy.engine.prefixes import (
    MAX_EXCESS,
    MIN_GAIN,
    MIN_PARKED,
    MIN_PARKED_GAIN,
    MIN_SAVED,
    Save,
    SavedPrefix,
    SavedPrefixes,
    StoredFile,
    plan_room,
)
from shimpy.engine.sequence import IdleCache

A = list(range(1000, 5000))
B = list(range(6000, 9000))


def saved(name: str, tokens: list[int]) -> SavedPrefix:
    return SavedPrefix(name, array("i", tokens), 10 * len(tokens))


def best(known: SavedPrefixes, tokens: list[int], n_resident: int = 0) -> tuple[str, int] | None:
    found = known.best(tokens, n_resident)
    return None if found is None else (found[0].name, found[1])


def cache(slot: int, tokens: list[int], n_prompt: int | None = None) -> IdleCache:
    return IdleCache(slot, tokens, len(tokens) if n_prompt is None else n_prompt)


# --- what comes back ---


def test_the_longest_common_prefix_comes_back() -> None:
    known = SavedPrefixes(
        [saved("a", A[:500]), saved("b", A[:900] + B), saved("c", B)], whole=False
    )
    assert best(known, A) == ("b", 900)
    assert best(known, A[:500] + B) == ("a", 500)


def test_of_as_much_the_shortest_file_is_read() -> None:
    known = SavedPrefixes([saved("long", A[:900]), saved("short", A[:700])], whole=False)
    assert best(known, A[:600]) == ("short", 599)


def test_the_prompts_last_token_never_counts() -> None:
    known = SavedPrefixes([saved("a", A[:500])], whole=False)
    assert best(known, A[:500]) == ("a", 499)


def test_what_is_resident_is_not_read_again() -> None:
    known = SavedPrefixes([saved("a", A[:500])], whole=False)
    assert best(known, A, 500 - MIN_GAIN) == ("a", 500)
    assert best(known, A, 500 - MIN_GAIN + 1) is None


def test_a_long_file_is_not_read_for_a_little() -> None:
    known = SavedPrefixes([saved("a", A)], whole=False)
    n = len(A) // MAX_EXCESS
    assert best(known, A[:n] + B) == ("a", n)
    assert best(known, A[: n - 1] + B) is None


def test_a_state_that_cant_be_cut_is_used_whole_or_not_at_all() -> None:
    known = SavedPrefixes([saved("a", A[:500])], whole=True)
    assert best(known, A[:501]) == ("a", 500)
    assert best(known, A[:500]) is None
    assert best(known, A[:499] + B) is None


def test_what_was_discarded_does_not_come_back() -> None:
    known = SavedPrefixes([saved("a", A[:500])], whole=False)
    known.discard("a")
    known.discard("never there")
    assert (len(known), best(known, A)) == (0, None)


# --- what is saved ---


def test_caches_are_saved_in_their_order_but_for_short_ones() -> None:
    caches = [cache(2, A[:MIN_SAVED]), cache(0, B[: MIN_SAVED - 1]), cache(1, B)]
    saves = SavedPrefixes(whole=False).choose_saves(caches)
    assert saves == [Save(2, A[:MIN_SAVED]), Save(1, B)]


def test_the_beginning_of_another_is_not_saved() -> None:
    caches = [cache(0, A[:500]), cache(1, A), cache(2, A)]
    assert [save.slot for save in SavedPrefixes(whole=False).choose_saves(caches)] == [1]
    assert [save.slot for save in SavedPrefixes(whole=True).choose_saves(caches)] == [0, 1]


def test_what_is_on_disk_is_not_written_again() -> None:
    known = SavedPrefixes([saved("a", A)], whole=False)
    assert known.choose_saves([cache(0, A), cache(1, A[:500])]) == []


def test_what_is_on_disk_but_for_its_end_is_not_written_again() -> None:
    """Gigabytes would be, for a prompt that is answered otherwise now and then."""
    known = SavedPrefixes([saved("a", A[:500])], whole=False)
    assert known.choose_saves([cache(0, A[: 499 + MIN_GAIN])]) == []
    assert known.choose_saves([cache(0, A[: 500 + MIN_GAIN])]) != []
    assert known.choose_saves([cache(0, A[:450] + B)])[0].covers == ("a",)
    assert known.choose_saves([cache(0, A[: 500 - MIN_GAIN] + B)])[0].covers == ()


def test_what_no_file_brings_back_is_parked() -> None:
    """A file serves prompts that share MIN_GAIN tokens with it; a parked one need not be long."""
    known = SavedPrefixes([saved("a", A[:500])], whole=False)
    assert known.worth_parking(cache(0, B[:MIN_PARKED])) == B[:MIN_PARKED]
    assert known.worth_parking(cache(0, A[: MIN_GAIN - 1])) == A[: MIN_GAIN - 1]
    assert known.worth_parking(cache(0, A[:3] + B[:MIN_GAIN])) != []
    assert known.worth_parking(cache(0, A[:400])) == []
    assert known.worth_parking(cache(0, A[:500] + B[: MIN_PARKED_GAIN - 1])) == []
    assert known.worth_parking(cache(0, A[:500] + B[:MIN_PARKED_GAIN])) != []


def test_what_is_parked_is_not_parked_again() -> None:
    known = SavedPrefixes([SavedPrefix("a", array("i", A[:60]), 0, is_parked=True)], whole=False)
    assert known.worth_parking(cache(0, A[:50])) == []
    assert known.worth_parking(cache(0, A[:60] + B[: MIN_PARKED_GAIN - 1])) == []
    longer = known.worth_parking(cache(0, A[:60] + B[:MIN_PARKED_GAIN]))
    assert [one.name for one in known.covered(longer)] == ["a"]
    known.discard("a")
    known.discard("a")
    assert known.worth_parking(cache(0, A[:50])) == A[:50]
    assert known.covered(longer) == []


def test_a_longer_one_covers_the_file_of_its_beginning() -> None:
    known = SavedPrefixes([saved("a", A[:500]), saved("b", B)], whole=False)
    assert known.choose_saves([cache(0, A)]) == [Save(0, A, covers=("a",))]


def test_a_state_that_cant_be_cut_is_saved_at_the_prompts_end() -> None:
    """The answer may be told otherwise in the next prompt; the prompt itself is not."""
    known = SavedPrefixes([saved("a", A[:500])], whole=True)
    assert known.choose_saves([cache(0, A, 900)]) == [Save(0, A[:899])]
    assert known.choose_saves([cache(0, A[:900], 501)]) == []


def test_a_recurrent_state_is_saved_where_it_is() -> None:
    known = SavedPrefixes(whole=True, can_cut=False)
    assert known.choose_saves([cache(0, A, 900)]) == [Save(0, A)]


tokens = st.lists(st.integers(0, 1), min_size=1, max_size=9)


@pytest.mark.parametrize("whole", [False, True])
@given(st.lists(tokens, max_size=5), st.lists(tokens, max_size=4), tokens, st.integers(0, 4))
def test_what_comes_back_is_worth_it_and_nothing_better_is_there(
    whole: bool, on_disk: list[list[int]], idle: list[list[int]], prompt: list[int], resident: int
) -> None:
    with mock.patch.multiple(prefixes, MIN_SAVED=2, MIN_GAIN=1, MIN_PARKED_GAIN=1):
        known = SavedPrefixes([saved(str(i), t) for i, t in enumerate(on_disk)], whole=whole)
        for save in known.choose_saves([cache(i, t) for i, t in enumerate(idle)]):
            assert save.tokens == idle[save.slot][: len(save.tokens)]
            for name in save.covers:
                known.discard(name)
            known.add(saved(f"new {save.slot}", save.tokens))
        gains = {}
        for prefix in known:
            n = 0
            while n < min(len(prefix.tokens), len(prompt) - 1) and prefix.tokens[n] == prompt[n]:
                n += 1
            is_usable = n == len(prefix.tokens) or not whole
            is_cheap = len(prefix.tokens) <= MAX_EXCESS * (n - resident)
            if is_usable and is_cheap and n - resident >= 1:
                gains[prefix.name] = n
        found = known.best(prompt, resident)
        if found is None:
            assert not gains
        else:
            assert gains[found[0].name] == found[1] == max(gains.values())
        if not whole:
            # Nothing that was worth keeping is lost by what was not saved or was covered.
            for kept in [*on_disk, *(one for one in idle if len(one) >= 2)]:
                assert any(p.tokens[: len(kept)].tolist() == kept for p in known)


# --- which files go ---


def test_the_least_recently_used_go_first() -> None:
    files = [StoredFile("new", 40, 3.0), StoredFile("old", 30, 1.0), StoredFile("mid", 20, 2.0)]
    removed = plan_room(files, n_new=20, limit=100, n_free=1000, reserve=0)
    assert removed == [files[1]]
    assert plan_room(files, n_new=10, limit=100, n_free=1000, reserve=0) == []
    assert plan_room(files, n_new=101, limit=100, n_free=1000, reserve=0) is None


def test_the_disk_keeps_its_reserve() -> None:
    files = [StoredFile("a", 40, 1.0), StoredFile("b", 30, 2.0)]
    assert plan_room(files, n_new=20, limit=1000, n_free=60, reserve=50) == [files[0]]
    assert plan_room(files, n_new=20, limit=1000, n_free=0, reserve=51) is None


@given(
    st.lists(st.tuples(st.integers(0, 50), st.floats(0, 9)), max_size=8),
    st.integers(0, 120),
    st.integers(0, 120),
    st.integers(0, 200),
    st.integers(0, 80),
)
def test_room_is_made_within_both_bounds_or_nothing_is_touched(
    drawn: list[tuple[int, float]], n_new: int, limit: int, n_free: int, reserve: int
) -> None:
    files = [StoredFile(str(i), n, used_s) for i, (n, used_s) in enumerate(drawn)]
    removed = plan_room(files, n_new=n_new, limit=limit, n_free=n_free, reserve=reserve)
    total = sum(file.n_bytes for file in files)
    if removed is None:
        assert n_new > limit or n_free + total - n_new < reserve
        return
    freed = sum(file.n_bytes for file in removed)
    assert total - freed + n_new <= limit
    assert n_free + freed - n_new >= reserve
    kept = [file for file in files if file not in removed]
    assert all(gone.used_s <= stays.used_s for gone in removed for stays in kept)
