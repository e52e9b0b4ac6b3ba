"""A saved prefix is read as it was written, or not at all."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from shimpy.engine.prefix_file import KEY_BYTES, PrefixFileError, read_tokens, seal, verify

KEY = bytes(range(KEY_BYTES))
TOKENS = array("i", [1, 70_000, 5])
STATE = b"the state of a slot"


@contextmanager
def opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDWR)
    try:
        yield fd
    finally:
        os.close(fd)


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    path = tmp_path / "prefix"
    path.write_bytes(STATE)
    with opened(path) as fd:
        assert seal(fd, key=KEY, tokens=TOKENS) == path.stat().st_size
    return path


def test_what_was_sealed_is_read_and_the_state_comes_first(sealed: Path) -> None:
    assert sealed.read_bytes().startswith(STATE)
    with opened(sealed) as fd:
        assert read_tokens(fd, key=KEY) == TOKENS
        assert verify(fd, key=KEY) == TOKENS


def test_a_state_of_many_pieces_is_summed(tmp_path: Path) -> None:
    path = tmp_path / "prefix"
    state = os.urandom((1 << 20) + 5)
    path.write_bytes(state)
    with opened(path) as fd:
        seal(fd, key=KEY, tokens=TOKENS)
        assert verify(fd, key=KEY) == TOKENS
    path.write_bytes(path.read_bytes().replace(state[-3:], b"abc"))
    with opened(path) as fd, pytest.raises(PrefixFileError, match="sum"):
        verify(fd, key=KEY)


def test_a_file_cut_anywhere_is_refused(sealed: Path) -> None:
    data = sealed.read_bytes()
    for n in range(len(data)):
        sealed.write_bytes(data[:n])
        with opened(sealed) as fd, pytest.raises(PrefixFileError):
            verify(fd, key=KEY)


def test_a_file_with_more_behind_it_or_before_it_is_refused(sealed: Path) -> None:
    data = sealed.read_bytes()
    for other in (data + b"\0", data + data, b"\0" + data, b"", b"\0" * len(data)):
        sealed.write_bytes(other)
        with opened(sealed) as fd, pytest.raises(PrefixFileError):
            verify(fd, key=KEY)


def test_every_flipped_bit_is_found(sealed: Path) -> None:
    data = sealed.read_bytes()
    with opened(sealed) as fd:
        for bit in range(8 * len(data)):
            at = bit // 8
            os.pwrite(fd, bytes([data[at] ^ 1 << bit % 8]), at)
            with pytest.raises(PrefixFileError):
                verify(fd, key=KEY)
            os.pwrite(fd, data[at : at + 1], at)
        assert verify(fd, key=KEY) == TOKENS


def test_another_key_s_file_is_refused(sealed: Path) -> None:
    with opened(sealed) as fd, pytest.raises(PrefixFileError, match="another model"):
        read_tokens(fd, key=bytes(KEY_BYTES))
