"""The header of a model that is still on its server, read in ranges: megabytes of gigabytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from shimpy.errors import GgufError
from shimpy.gguf.header import Header, TruncatedHeaderError
from shimpy.gguf.parser import MAX_HEADER_BYTES, parse_header
from shimpy.gguf.reader import check_data, merge_headers
from shimpy.registry.remote import RemoteFile, TransientError
from shimpy.units import KIB, MIB

_FIRST_BYTES: Final = 512 * KIB
_MOST_BYTES: Final = 4 * MIB

# Runs a function, again if need be, and returns what it does.
Attempt = Callable[[Callable[[], bytes]], bytes]


def fetch_header(files: Sequence[RemoteFile], attempt: Attempt) -> Header:
    """Return the header of a model out of its remote files, all its shards in order; blocking.

    Each file is asked for a little of its beginning, then for as much again, until its header
    is whole: about the header's own size in all, and twice that at most.

    Raises:
        GgufError: a file is no model, or shorter than its tensors need.
        ShimpyError: as `attempt` and the files' servers say.
    """
    return merge_headers([_fetch_one(file, attempt) for file in files])


def _fetch_one(file: RemoteFile, attempt: Attempt) -> Header:
    data = b""
    wanted = _FIRST_BYTES
    while True:
        end = wanted if file.size_bytes is None else min(wanted, file.size_bytes)
        start = len(data)
        data += attempt(partial(_read, file, start, end))
        try:
            header = parse_header(data, name=file.name)
        except TruncatedHeaderError as error:
            is_all = len(data) < end or len(data) == file.size_bytes
            if is_all or error.needed_bytes > MAX_HEADER_BYTES:
                raise
            step = min(max(len(data), _FIRST_BYTES), _MOST_BYTES)
            wanted = max(error.needed_bytes, len(data) + step)
            continue
        return header if file.size_bytes is None else check_data(header, file.size_bytes)


def _read(file: RemoteFile, start: int, end: int) -> bytes:
    """Return the bytes [start, end) of a file, fewer where it ends before."""
    with file.open(start, end) as body:
        if body.total_bytes is not None and file.size_bytes not in {None, body.total_bytes}:
            raise GgufError(
                f"{file.name}: its listing says {file.size_bytes} bytes, its server "
                f"{body.total_bytes}; it has been changed or is not wholly there"
            )
        position = body.start
        parts: list[bytes] = []
        for chunk in body.chunks:
            parts.append(chunk[max(0, start - position) : max(0, end - position)])
            position += len(chunk)
            if position >= end:
                break
    expected = end if body.total_bytes is None else min(end, body.total_bytes)
    if position < expected:
        raise TransientError(f"{file.name}: the server ended at byte {position} of {expected}")
    return b"".join(parts)
