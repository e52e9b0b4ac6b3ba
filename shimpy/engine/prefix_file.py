"""One saved prefix on disk: a slot's state as llama.cpp writes it, the tokens, and a seal.

    state (llama.cpp's own) | tokens, int32 | key | state's bytes | tokens' number | SHA-256 | magic

All integers are little-endian. The seal is behind, because llama.cpp writes and reads its part
by itself, from the file's start; and llama.cpp ends the process over a state that is cut short
or altered, so nothing is given to it whose sum was not checked before.
"""

from __future__ import annotations

import hashlib
import os
import struct
import sys
from array import array
from typing import Final

KEY_BYTES: Final = 16
_SEAL = struct.Struct("<16sQI32s8s")
_MAGIC: Final = b"shmpKV1\n"
_TOKEN_BYTES: Final = 4
_PIECE_BYTES: Final = 1 << 20


class PrefixFileError(Exception):
    """A file is no saved prefix, or another's, or damaged; the text says which."""


def file_bytes(n_state: int, n_tokens: int) -> int:
    """Return how long the file of a state will be."""
    return n_state + _TOKEN_BYTES * n_tokens + _SEAL.size


def seal(fd: int, *, key: bytes, tokens: array[int]) -> int:
    """Finish a file that holds a state and nothing else; return its length.

    Raises:
        OSError: no room.
    """
    n_state = os.lseek(fd, 0, os.SEEK_END)
    packed = _pack(tokens)
    digest = _digest(fd, n_state, packed, key)
    _write(fd, packed + _SEAL.pack(key, n_state, len(tokens), digest, _MAGIC))
    return os.lseek(fd, 0, os.SEEK_END)


def read_tokens(fd: int, *, key: bytes) -> array[int]:
    """Return the tokens of a file whose seal looks right, its sum not checked.

    Raises:
        PrefixFileError: it is no prefix under this key, or not whole.
        OSError: it can't be read.
    """
    tokens, _, _ = _read_end(fd, key)
    return tokens


def verify(fd: int, *, key: bytes) -> array[int]:
    """Read the whole file and return its tokens.

    Raises:
        PrefixFileError: it is no prefix under this key, or not as it was written.
        OSError: it can't be read.
    """
    tokens, n_state, digest = _read_end(fd, key)
    if _digest(fd, n_state, _pack(tokens), key) != digest:
        raise PrefixFileError("its sum is wrong")
    return tokens


def _read_end(fd: int, key: bytes) -> tuple[array[int], int, bytes]:
    n_file = os.fstat(fd).st_size
    if n_file < _SEAL.size:
        raise PrefixFileError(f"it has {n_file} bytes")
    end = os.pread(fd, _SEAL.size, n_file - _SEAL.size)
    if len(end) < _SEAL.size:
        raise PrefixFileError("it was cut while it was read")
    found_key, n_state, n_tokens, digest, magic = _SEAL.unpack(end)
    n_packed = _TOKEN_BYTES * n_tokens
    if magic != _MAGIC:
        raise PrefixFileError("it has no seal")
    if found_key != key:
        raise PrefixFileError("it is of another model, or of other settings")
    if n_state + n_packed + _SEAL.size != n_file:
        raise PrefixFileError(f"it has {n_file} bytes, and not those that its seal tells")
    packed = os.pread(fd, n_packed, n_state)
    if len(packed) < n_packed:
        raise PrefixFileError("it was cut while it was read")
    tokens = array("i", packed)
    if sys.byteorder == "big":
        tokens.byteswap()
    return tokens, n_state, digest


def _digest(fd: int, n_state: int, packed: bytes, key: bytes) -> bytes:
    total = hashlib.sha256()
    at = 0
    while at < n_state:
        piece = os.pread(fd, min(_PIECE_BYTES, n_state - at), at)
        if not piece:
            raise PrefixFileError("it was cut while it was read")
        total.update(piece)
        at += len(piece)
    total.update(packed + key + struct.pack("<QI", n_state, len(packed) // _TOKEN_BYTES))
    return total.digest()


def _pack(tokens: array[int]) -> bytes:
    if sys.byteorder == "big":
        tokens = tokens[:]
        tokens.byteswap()
    return tokens.tobytes()


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
