"""GGUF headers of files: mapped, parsed, their shards put together and their sizes checked."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from io import SEEK_END
from pathlib import Path
from typing import BinaryIO, Final

from msgspec.structs import replace

from shimpy.errors import GgufError
from shimpy.gguf.header import Header
from shimpy.gguf.parser import parse_header
from shimpy.names import parse_shard
from shimpy.units import format_bytes

__all__ = [
    "check_data",
    "merge_headers",
    "parse_header",
    "read_files",
    "read_header",
    "shard_paths",
]

# What no real model comes near; the names of that many files are made up front.
MAX_SHARDS: Final = 1024


def check_data(header: Header, file_bytes: int) -> Header:
    """Return the header of a single file with its size, all of its tensors' data being there.

    Raises:
        GgufError: the file is shorter than its tensor table demands.
    """
    (shard,) = header.shards
    # A file without tensors may end before the padding behind its header.
    if header.tensors and shard.required_bytes > file_bytes:
        last = max(header.tensors, key=lambda tensor: tensor.offset + tensor.n_bytes)
        raise GgufError(
            f"{shard.name}: the file is incomplete: it has {file_bytes} bytes of the "
            f"{shard.required_bytes} that its tensors need ({last.name} ends there, "
            f"{format_bytes(shard.required_bytes - file_bytes)} are missing); copy or download "
            "it again"
        )
    return replace(header, shards=(replace(shard, file_bytes=file_bytes),))


def shard_paths(path: Path) -> tuple[Path, ...]:
    """Return all files of the model that `path` belongs to, in order, by the names alone.

    Raises:
        GgufError: the name numbers a shard that its own count rules out.
    """
    shard = parse_shard(path.stem)
    if shard is None:
        return (path,)
    base, index, count = shard
    if not 1 <= index <= count <= MAX_SHARDS:
        raise GgufError(f"{path}: the name says shard {index} of {count}, which cannot be")
    return tuple(
        path.with_name(f"{base}-{number:05d}-of-{count:05d}{path.suffix}")
        for number in range(1, count + 1)
    )


def read_header(path: Path) -> Header:
    """Return the header of the model in `path`, of all its shards when it is split.

    Blocking: maps each file for as long as it is parsed. Headers of up to 200,000 tokens take
    some tens of milliseconds.

    Raises:
        GgufError: a file can't be read, is no GGUF model, or lacks data; a shard is missing.
    """
    paths = shard_paths(path)
    missing = [shard.name for shard in paths if not shard.exists()]
    if missing and len(paths) > 1:
        raise GgufError(
            f"{path}: {len(missing)} of the model's {len(paths)} shards are missing, the first is "
            f"{missing[0]}; put all of them into one folder"
        )
    return read_files(paths)


def read_files(paths: Sequence[Path]) -> Header:
    """Return the header of a model in these files, all its shards in order; as `read_header`.

    The files' names mean nothing: some stores name them by their digests.
    """
    return merge_headers([_read_file(path) for path in paths])


def _read_file(path: Path) -> Header:
    try:
        # Opening a pipe would block; a folder or device has no header.
        if path.exists() and not path.is_file():
            raise GgufError(f"{path}: is no file but a folder, pipe or device")
        with path.open("rb") as file:
            size = file.seek(0, SEEK_END)
            if size == 0:
                raise GgufError(f"{path}: the file is empty")
            with _map(file, size) as view:
                return check_data(parse_header(view, name=str(path)), size)
    except OSError as error:
        raise GgufError(f"{path}: can't be read: {error.strerror or error}") from error


def _map(file: BinaryIO, size: int) -> mmap.mmap:
    try:
        return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    except ValueError as error:
        raise GgufError(f"{file.name}: the file shrank while it was opened") from error


def merge_headers(parts: Sequence[Header]) -> Header:
    """Return the header of a model out of those of its shards, in order; of a single file its own.

    Raises:
        GgufError: they are not of one model, or not all of it.
    """
    first = parts[0]
    if len(parts) == 1:
        n_split = first.get_int("split.count", 1)
        if n_split > 1:
            raise GgufError(
                f"{first.name}: this is one of {n_split} shards of a split model, but its name "
                f"does not end in -00001-of-{n_split:05d}.gguf; give the shards their names back"
            )
        return first
    for number, part in enumerate(parts):
        if part.get_int("split.count", len(parts)) != len(parts):
            raise GgufError(
                f"{part.name}: says that the model has {part.get_int('split.count')} shards, its "
                f"name says {len(parts)}"
            )
        if part.get_int("split.no", number) != number:
            raise GgufError(
                f"{part.name}: is shard {part.get_int('split.no') + 1} inside, {number + 1} by name"
            )
    tensors = [replace(t, shard=i) for i, part in enumerate(parts) for t in part.tensors]
    seen: dict[str, int] = {}
    for tensor in tensors:
        other = seen.setdefault(tensor.name, tensor.shard)
        if other != tensor.shard:
            raise GgufError(
                f"{parts[tensor.shard].name}: tensor {tensor.name} is in {parts[other].name} too"
            )
    n_expected = first.get_int("split.tensors.count", len(tensors))
    if n_expected != len(tensors):
        raise GgufError(
            f"{first.name}: the model has {n_expected} tensors, its {len(parts)} shards hold "
            f"{len(tensors)}; they are not of one model"
        )
    return replace(first, tensors=tuple(tensors), shards=tuple(part.shards[0] for part in parts))
