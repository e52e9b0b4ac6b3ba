"""Streamed text: whole characters, and no part of a stop string, whatever the tokens were."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shimpy.engine.text import Attached, TextStream
from tests.engine.reference import first_stop

# Few letters, so that stop strings overlap, repeat and span tokens all the time.
letters = st.text(alphabet="ab日🙂", max_size=24)
stop_lists = st.lists(st.text(alphabet="ab日", min_size=1, max_size=5), max_size=5)


def cut_up(data: bytes, cuts: list[int]) -> list[bytes]:
    places = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[a:b] for a, b in pairwise(places)]


def run(pieces: list[bytes], stops: list[str]) -> tuple[list[str], str | None]:
    stream = TextStream(stops)
    shown = []
    for piece in pieces:
        shown.append(stream.push(piece))
        if stream.stop is not None:
            return shown, stream.stop
    shown.append(stream.finish())
    return shown, stream.stop


@given(letters, stop_lists, st.lists(st.integers(0, 200), max_size=12))
def test_the_text_is_the_oracles_however_it_is_cut(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    shown, stop = run(cut_up(text.encode(), cuts), stops)
    assert ("".join(shown), stop) == first_stop(text, stops)


@given(letters, stop_lists, st.lists(st.integers(0, 200), max_size=12))
def test_no_part_of_a_stop_string_is_ever_shown(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    """What was shown at any moment is a beginning of the final text: nothing is taken back."""
    final, _ = first_stop(text, stops)
    so_far = ""
    stream = TextStream(stops)
    for piece in cut_up(text.encode(), cuts):
        so_far += stream.push(piece)
        assert final.startswith(so_far)
        if stream.stop is not None:
            break


@given(st.binary(max_size=40), st.lists(st.integers(0, 200), max_size=12))
def test_bytes_that_are_no_text_become_what_python_makes_of_them(
    data: bytes, cuts: list[int]
) -> None:
    shown, _ = run(cut_up(data + b".", cuts), [])
    assert "".join(shown) == (data + b".").decode("utf-8", "replace")


@given(letters, stop_lists, st.lists(st.integers(0, 200), max_size=12))
def test_text_is_held_back_only_where_a_stop_string_may_begin(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    stream = TextStream(stops)
    shown = decoded = ""
    for piece in cut_up(text.encode(), cuts):
        shown += stream.push(piece)
        if stream.stop is not None:
            return
        decoded = text[: len(shown) + stream.n_held]
        held = decoded[len(shown) :]
        longest = next(
            (
                decoded[start:]
                for start in range(len(decoded))
                if any(
                    len(s) > len(decoded) - start and s.startswith(decoded[start:]) for s in stops
                )
            ),
            "",
        )
        assert held == longest


def test_a_character_is_never_split() -> None:
    stream = TextStream()
    assert [stream.push(bytes([byte])) for byte in "🙂é".encode()] == ["", "", "", "🙂", "", "é"]


def test_half_a_character_at_the_end_is_left_out() -> None:
    """It is what a limit of tokens leaves of one, and no one's text."""
    stream = TextStream()
    assert stream.push("a日".encode()[:3]) == "a"
    assert stream.finish() == ""


def test_the_longest_of_the_stop_strings_that_end_together_counts() -> None:
    stream = TextStream(["b", "ab", "aab"])
    assert stream.push(b"xa") == "x"
    assert stream.push(b"ab") == ""
    assert (stream.stop, stream.cut) == ("aab", "aab")


def test_what_follows_a_stop_string_in_its_token_is_cut_too() -> None:
    stream = TextStream(["END"])
    assert stream.push(b"one END two") == "one "
    assert (stream.stop, stream.cut) == ("END", "END two")


def test_a_thousand_stop_strings_are_no_trouble() -> None:
    stream = TextStream([f"<{number}>" for number in range(1000)])
    assert stream.push(b"a <1") == "a "
    assert stream.push(b"000> b <99") == "<1000> b "
    assert stream.push(b"9>") == ""
    assert stream.stop == "<999>"


@pytest.mark.parametrize(
    ("pieces", "stops", "expected"),
    [
        pytest.param(["a", "b"], [], [["a"], ["b"]], id="at once"),
        pytest.param(["a", "E", "N", "x"], ["END"], [["a"], [], [], ["E", "N", "x"]], id="held"),
        pytest.param(["a", "E", "ND"], ["END"], [["a"], [], []], id="cut"),
        pytest.param(["aE", "ND"], ["END"], [["aE"], []], id="begun before the cut"),
    ],
)
def test_values_come_with_their_tokens_text(
    pieces: list[str], stops: list[str], expected: list[list[str]]
) -> None:
    """Logprobs of a stop string would give away what the text hides."""
    stream = TextStream(stops)
    values: Attached[str] = Attached(stream)
    taken = []
    for piece in pieces:
        values.push(piece)
        stream.push(piece.encode())
        taken.append(values.take())
    assert taken == expected


@given(letters, stop_lists, st.lists(st.integers(0, 200), max_size=12))
def test_every_value_of_shown_text_is_given_out_once(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    stream = TextStream(stops)
    values: Attached[int] = Attached(stream)
    taken = []
    starts = []
    decoded = 0
    for index, piece in enumerate(cut_up(text.encode(), cuts)):
        starts.append(decoded)
        values.push(index)
        stream.push(piece)
        taken += values.take()
        if stream.stop is not None:
            break
        decoded = stream.n_shown + stream.n_held
    if stream.stop is None:
        stream.finish()
        taken += values.take()
        assert taken == list(range(len(starts)))
    else:
        shown = [index for index, start in enumerate(starts) if start < stream.n_shown]
        assert taken == sorted(set(taken))
        assert set(shown) <= set(taken)
        assert all(starts[index] <= stream.n_shown for index in taken)
