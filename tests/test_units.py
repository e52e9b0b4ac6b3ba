"""Sizes and durations, as typed and as printed."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shimpy.units import GIB, KIB, MIB, format_bytes, format_duration, parse_bytes, parse_duration

# The machine may be busy with other things.
busy = settings(deadline=None)


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("0", 0),
        ("1000", 1000),
        ("12b", 12),
        ("4k", 4 * KIB),
        ("512MiB", 512 * MIB),
        ("512 mb", 512 * MIB),
        ("8GB", 8 * GIB),
        ("8GiB", 8 * GIB),
        (" 1.5G ", 3 * GIB // 2),
        ("2T", 2048 * GIB),
    ],
)
def test_size_as_typed(text: str, n_bytes: int) -> None:
    assert parse_bytes(text) == n_bytes


@pytest.mark.parametrize(
    "text", ["", "G", "-1G", "1,5G", "8XB", "8 G B", "1e9", "nan", "٣G", "9" * 400]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="8GiB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 B"),
        (931, "931 B"),
        (1023, "1023 B"),
        (KIB, "1.0 KiB"),
        (10.1 * GIB, "10.1 GiB"),
        (1024 * GIB, "1.0 TiB"),
        (5_000_000 * GIB, "4882.8 TiB"),
        (-MIB, "-1.0 MiB"),
    ],
)
def test_size_as_printed(n_bytes: float, text: str) -> None:
    assert format_bytes(n_bytes) == text


@busy
@given(st.integers(0, 1 << 50))
def test_printed_size_is_read_back_nearly(n_bytes: int) -> None:
    """What a listing prints can be typed into an option."""
    assert parse_bytes(format_bytes(n_bytes)) == pytest.approx(n_bytes, rel=0.06)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0),
        ("300ms", 0.3),
        ("1.5h", 5400),
        ("2h45m", 9900),
        ("1h0m0.5s", 3600.5),
        ("-1s", -1),
        ("+5m", 300),
        (".5s", 0.5),
        ("1.s", 1),
        ("7us", 7e-6),
        ("7µs", 7e-6),
        ("7ns", 7e-9),
    ],
)
def test_duration_as_typed(text: str, seconds: float) -> None:
    """Go's notation, which Ollama's clients send as keep_alive."""
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text", ["", "5", "m", "5 m", "1h-5m", "--5m", "5d", "1h5", "s5", "-", "٣s"]
)
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="units"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (math.inf, "forever"),
        (0, "0ms"),
        (0.85, "850ms"),
        (1, "1s"),
        (59.4, "59s"),
        (59.6, "1m0s"),
        (299, "4m59s"),
        (7500, "2h5m"),
    ],
)
def test_duration_as_printed(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
