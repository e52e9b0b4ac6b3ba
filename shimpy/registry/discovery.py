"""Finds the GGUF files in folders and says which belong together; opens none of them."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, Protocol

import msgspec

from shimpy.names import ModelName, parse_shard
from shimpy.registry.settings import NO_SETTINGS, ModelSettings

SUFFIX: Final = ".gguf"
# What FoundModel.tool is for models of shimpy's own store.
STORE: Final = "store"
# Bounds for a folder that is really a whole disk: levels below it, and entries looked at.
MAX_DEPTH: Final = 12
MAX_ENTRIES: Final = 200_000
# What downloaders leave beside a file that they have not finished.
_PARTIAL_SUFFIXES: Final = (
    ".aria2", ".crdownload", ".download", ".incomplete", ".part", ".partial",
)  # fmt: skip


class FoundFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file as the file system sees it."""

    path: Path
    size_bytes: int
    mtime_ns: int
    modified_s: float
    # Device and inode: the same for all names of one file.
    identity: tuple[int, int]
    # "sha256:<hex>" where the file is kept under its digest; "": not known.
    digest: str = ""

    @property
    def stamp(self) -> str:
        """What changes whenever the file does."""
        return f"{self.size_bytes}:{self.mtime_ns}:{self.identity[1]}"


class FoundModel(msgspec.Struct, frozen=True, kw_only=True):
    """Files that make one model: a single one, or all shards that are there, in order."""

    files: tuple[FoundFile, ...]
    # The folder that was searched, or what else the source is called.
    source: str
    # The tool whose store it is in; "": a plain folder.
    tool: str = ""
    # The name that its source gives it; None: its file's name is all there is.
    name: ModelName | None = None
    aliases: tuple[ModelName, ...] = ()
    # What it came with.
    settings: ModelSettings = NO_SETTINGS
    # The source tells all files of the model, whatever they are called, and its projector.
    is_listed: bool = False
    projector: Path | None = None
    # Why it can't be used, whatever the file says: a downloader's leftover is beside it, ...
    problem: str | None = None

    @property
    def path(self) -> Path:
        """The first file's path."""
        return self.files[0].path

    @property
    def stamp(self) -> str:
        """What changes whenever one of the files does, or a shard comes or goes."""
        return ";".join(f"{file.path.name}:{file.stamp}" for file in self.files)

    def is_same_as(self, other: FoundModel) -> bool:
        """Whether the files are the same, or copies whose digests are known to be."""
        pairs = list(zip(self.files, other.files, strict=False))
        return len(self.files) == len(other.files) and all(
            one.identity == two.identity or (one.digest != "" and one.digest == two.digest)
            for one, two in pairs
        )


class Scan(msgspec.Struct, frozen=True, kw_only=True):
    """All that was found; `problems` are what could not be looked at, in words."""

    models: tuple[FoundModel, ...]
    # Folders as they were asked for, those that could not be read left out.
    readable: tuple[Path, ...]
    problems: tuple[str, ...]


class Source(Protocol):
    """Something that knows of models: folders, the store, another tool's store."""

    def scan(self) -> Scan:
        """Return what is there now; blocking. What can't be read is a problem, not an error."""


class Folders(msgspec.Struct, frozen=True):
    """Folders of GGUF files, named by their files' names."""

    folders: tuple[Path, ...]

    def scan(self) -> Scan:
        """Return what is in the folders and below."""
        return scan_folders(self.folders)


def scan_folders(folders: Sequence[Path], *, is_flat: bool = False) -> Scan:
    """Return the GGUF files in `folders`, and below unless `is_flat`, in a fixed order; blocking.

    Links are followed; each real folder is looked at once, so loops end. What starts with a
    dot is passed over. A "folder" may also be one GGUF file.
    """
    walk = _Walk(is_flat=is_flat)
    models: list[FoundModel] = []
    readable = []
    for folder in folders:
        before = len(walk.problems)
        listings = list(walk.files_below(folder))
        if listings or len(walk.problems) == before:
            readable.append(folder)
        for listing in listings:
            models += _group(listing, str(folder))
    return Scan(models=tuple(models), readable=tuple(readable), problems=tuple(walk.problems))


class _Listing(msgspec.Struct):
    """The GGUF files of one folder, and the names of all that is in it."""

    files: list[FoundFile] = msgspec.field(default_factory=list)
    names: set[str] = msgspec.field(default_factory=set)


class _Walk(msgspec.Struct):
    """A walk over several trees that remembers where it has been."""

    # Sub-folders are not looked at.
    is_flat: bool = False
    seen: set[tuple[int, int]] = msgspec.field(default_factory=set)
    problems: list[str] = msgspec.field(default_factory=list)
    n_entries: int = 0

    def files_below(self, top: Path) -> Iterator[_Listing]:
        """Yield a listing for each folder in the tree that could be read."""
        try:
            status = top.stat()
        except OSError as error:
            self.problems.append(f"{top}: can't be searched: {error.strerror or error}")
            return
        if stat.S_ISREG(status.st_mode):
            yield _Listing([found_file(top, status)], {top.name})
            return
        pending = [(top, 0)]
        while pending:
            folder, depth = pending.pop()
            listing, below = self._list(folder)
            if listing is not None:
                yield listing
            if self.is_flat:
                continue
            if below and depth == MAX_DEPTH:
                self.problems.append(f"{folder}: folders more than {MAX_DEPTH} deep are left out")
            else:
                # A stack: reversed, so that folders come in the order of their names.
                pending += [(path, depth + 1) for path in reversed(below)]

    def _list(self, folder: Path) -> tuple[_Listing | None, list[Path]]:
        """Return a folder's files and sub-folders; None: it can't be read, or was before."""
        try:
            status = folder.stat()
            identity = (status.st_dev, status.st_ino)
            if identity in self.seen:
                return None, []
            self.seen.add(identity)
            with os.scandir(folder) as entries:
                # One more than is allowed, to know that there are more.
                room = max(0, MAX_ENTRIES - self.n_entries) + 1
                listed = sorted(
                    (entry for entry, _ in zip(entries, range(room), strict=False)),
                    key=lambda entry: entry.name,
                )
        except OSError as error:
            self.problems.append(f"{folder}: can't be read: {error.strerror or error}")
            return None, []
        self.n_entries += len(listed)
        if self.n_entries > MAX_ENTRIES:
            self.problems.append(
                f"{folder}: more than {MAX_ENTRIES} files and folders; name one that holds models"
            )
            return None, []
        listing = _Listing(names={entry.name for entry in listed})
        below: list[Path] = []
        for entry in listed:
            self._visit(entry, folder / entry.name, listing, below)
        return listing, below

    def _visit(
        self, entry: os.DirEntry[str], path: Path, listing: _Listing, below: list[Path]
    ) -> None:
        if entry.name.startswith("."):
            return
        try:
            if entry.is_dir():
                below.append(path)
                return
            if path.suffix.lower() != SUFFIX:
                return
            # Names that are no UTF-8 can't be listed in JSON, nor kept in the index.
            str(path).encode()
            status = entry.stat()
        except UnicodeEncodeError:
            name = os.fsencode(path).decode("utf-8", "backslashreplace")
            self.problems.append(f"{name}: the file's name is no UTF-8; rename it")
            return
        except OSError as error:
            self.problems.append(f"{path}: can't be read: {error.strerror or error}")
            return
        if stat.S_ISREG(status.st_mode):
            listing.files.append(found_file(path, status))


def found_file(path: Path, status: os.stat_result, *, digest: str = "") -> FoundFile:
    """Return a file as `stat` (links followed) saw it."""
    return FoundFile(
        path=path,
        size_bytes=status.st_size,
        mtime_ns=status.st_mtime_ns,
        modified_s=status.st_mtime,
        identity=(status.st_dev, status.st_ino),
        digest=digest,
    )


def _group(listing: _Listing, source: str) -> list[FoundModel]:
    """Return the models of one folder, the shards of each together."""
    groups: dict[tuple[str, int], list[FoundFile]] = {}
    for file in listing.files:
        shard = parse_shard(file.path.stem)
        key = (file.path.name, 0) if shard is None else (shard[0], shard[2])
        groups.setdefault(key, []).append(file)
    return [
        FoundModel(files=tuple(files), source=source, problem=_leftover(files, listing.names))
        for files in groups.values()
    ]


def _leftover(files: list[FoundFile], names: set[str]) -> str | None:
    for file in files:
        for suffix in _PARTIAL_SUFFIXES:
            leftover = file.path.name + suffix
            if leftover in names:
                return f"{file.path}: is still being downloaded: {leftover} is beside it"
    return None
