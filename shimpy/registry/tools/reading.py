"""Small files of other tools' stores, read with a bound."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from shimpy.registry.discovery import FoundFile, found_file

# A manifest, a template or a licence; the longest known licence has 40 kB.
MAX_BYTES: Final = 4 * 1024 * 1024

T = TypeVar("T")


class UnreadableError(Exception):
    """A file of a tool's store can't be made sense of; says why."""


def read_small(path: Path) -> bytes:
    """Return a small file's bytes.

    Raises:
        UnreadableError: it can't be read, or is no small file.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UnreadableError(f"{path}: can't be read: {error.strerror or error}") from error
    if len(data) > MAX_BYTES:
        raise UnreadableError(f"{path}: has more than {MAX_BYTES} bytes")
    return data


def read_json(path: Path, wanted: type[T]) -> T:
    """Return a JSON file as a `wanted`.

    Raises:
        UnreadableError: it can't be read, or is something else.
    """
    try:
        return msgspec.json.decode(read_small(path), type=wanted)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UnreadableError(f"{path}: {error}") from error


def folders_in(folder: Path) -> list[Path]:
    """Return the folders in a folder, sorted, links to folders too; none if it is not there.

    Raises:
        UnreadableError: it may not be read.
    """
    return [path for path in _entries(folder) if path.is_dir()]


def files_in(folder: Path) -> list[Path]:
    """Return the files in a folder, as `folders_in`."""
    return [path for path in _entries(folder) if path.is_file()]


def look_at(path: Path, *, digest: str = "") -> FoundFile | None:
    """Return a file as it is now; None: it is not there, or no file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return found_file(path, status, digest=digest) if stat.S_ISREG(status.st_mode) else None


def modified_s(path: Path) -> float:
    """Return when a file or folder was changed last, in seconds since the epoch; 0: it is gone."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UnreadableError(f"{folder}: can't be read: {error.strerror or error}") from error
