"""Where answers are cut: by indentation and by time."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shimpy.server.llamacpp.limits import Cutter, Limits

TEXTS = st.text(alphabet="ab \t\n", max_size=40)


@pytest.mark.parametrize(
    ("text", "n_indent", "shown"),
    [
        ("a\nb", 0, "a\nb"),
        ("a\nb", 1, "a\n"),
        ("a\n b\nc", 1, "a\n b\n"),
        ("a\n  b\n c", 2, "a\n  b\n "),
        ("a\n\t\tb", 2, "a\n\t\tb"),
        # llama.cpp's server does so too: a blank line is not indented.
        ("a\n\n  b", 2, "a\n"),
        ("a\n  ", 4, "a\n  "),
        ("b", 4, "b"),
    ],
)
def test_a_line_that_is_less_indented_ends_it(text: str, n_indent: int, shown: str) -> None:
    cutter = Cutter(Limits(n_indent=n_indent), begun_s=0)
    assert cutter.push(text, 0) == shown
    assert cutter.is_cut is (shown != text)


@given(text=TEXTS, n_indent=st.integers(0, 4), cuts=st.lists(st.integers(0, 40)))
def test_pieces_are_cut_where_the_whole_is(text: str, n_indent: int, cuts: list[int]) -> None:
    whole = Cutter(Limits(n_indent=n_indent), begun_s=0)
    wanted = whole.push(text, 0)
    cutter = Cutter(Limits(n_indent=n_indent), begun_s=0)
    shown = ""
    bounds = sorted({0, *cuts, len(text)})
    for start, end in itertools.pairwise(bounds):
        if not cutter.is_cut:
            shown += cutter.push(text[start:end], 0)
    assert (shown, cutter.is_cut) == (wanted, whole.is_cut)


def test_time_counts_once_there_is_a_new_line() -> None:
    cutter = Cutter(Limits(max_predict_s=1), begun_s=10)
    assert cutter.push("a", 20) == "a"
    assert not cutter.is_cut
    assert cutter.push("b\n", 20) == "b\n"
    assert cutter.is_cut


def test_without_limits_nothing_is_cut() -> None:
    cutter = Cutter(Limits(), begun_s=0)
    assert cutter.push("a\nb\nc", 1e9) == "a\nb\nc"
    assert not cutter.is_cut
    assert cutter.has_new_line
