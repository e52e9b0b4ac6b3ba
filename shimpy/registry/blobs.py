"""The store's files by digest, and what is on its way to become one.

    blobs/sha256-<hex>      whole files, never written to again
    partial/sha256-<hex>    the beginning of a blob, kept so that a later pull goes on from there
    partial/<key>/          a downloader's own working folder, likewise

All methods block. Nothing here knows which model needs a file: see `store`.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import msgspec

from shimpy.errors import InvalidOptionError, NotFoundError, RegistryError, UserError
from shimpy.names import name_part
from shimpy.registry import disk
from shimpy.registry.manifest import digest_of, parse_digest

_CHUNK: Final = 4 * 1024 * 1024
# What is written at once, from a multiple of it on: a huge page, of which the page cache is then,
# where the file system has them (ext4 since Linux 6.16, XFS). With weights that came in pieces of
# 64 KiB a token takes 4 % longer, until they are read anew.
_PIECE: Final = 2 * 1024 * 1024
# Where a piece took longer to come, what comes next is written at once: of a slow line nothing is
# lost with the process.
_QUICK_S: Final = 1.0
# In a working folder: the beginning of a file whose digest is not known.
_DATA: Final = "data"

# Called with the bytes done so far; what it raises ends the work.
OnBytes = Callable[[int], None]


def no_progress(_n_bytes: int) -> None:
    """Do nothing."""


class DigestMismatchError(UserError):
    """Data is not what its digest says; nothing of it is kept."""

    code = "digest_mismatch"


class StoredFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file or working folder of the store."""

    path: Path
    # "sha256:<hex>"; "": its name is no digest.
    digest: str
    size_bytes: int
    modified_s: float


class Blobs:
    """Blobs and partial blobs under a folder; safe to use from several threads."""

    def __init__(self, root: Path, *, hook: disk.Hook = disk.no_hook) -> None:
        self.folder = root / "blobs"
        self.partials = root / "partial"
        self._hook = hook
        self._lock = threading.Lock()
        # Files that somebody is writing just now.
        self._open: set[Path] = set()

    def path(self, digest: str) -> Path:
        """Return where a blob is, or would be; llama.cpp can be given that path."""
        return self.folder / parse_digest(digest).replace(":", "-")

    def __contains__(self, digest: str) -> bool:
        return self.path(digest).is_file()

    def size(self, digest: str) -> int:
        """Return a blob's bytes.

        Raises:
            NotFoundError: it is not there.
        """
        try:
            return self.path(digest).stat().st_size
        except OSError as error:
            raise NotFoundError(f"there is no blob {digest}") from error

    def begun_bytes(self, key: str) -> int:
        """Return how much an unfinished writer has left, of a digest or a working folder's key."""
        try:
            path = self.partials / self.path(key).name
        except InvalidOptionError:
            path = self.working_path(key) / _DATA
        try:
            return path.stat().st_size
        except OSError:
            return 0

    def begin(self, digest: str, *, resume: bool = True) -> BlobWriter:
        """Return a writer that turns bytes into the blob `digest`.

        With `resume` it goes on after what an earlier writer left (`n_bytes`; what is there is
        read once, for the hash), and leaves in turn what it has when it is closed before its
        commit. Without, nothing is left behind.

        Raises:
            RegistryError: somebody is writing that blob already, or the disk refuses.
        """
        target = self.path(digest)
        if not resume:
            with disk.explained(target):
                disk.make_folder(self.folder)
                self._hook("blob: create")
                path, file = disk.create_temporary(self.folder)
                file.close()
        else:
            path = self.partials / target.name
            with disk.explained(path):
                disk.make_folder(self.partials)
                disk.make_folder(self.folder)
        return self._begin(path, target, keeps=resume)

    def begin_unnamed(self, key: str) -> BlobWriter:
        """Return a writer for a file whose digest nobody knows yet; it resumes like `begin`.

        Its beginning lies in the working folder of `key`, which the caller discards at the end.
        """
        path = self.working_folder(key) / _DATA
        with disk.explained(path):
            disk.make_folder(self.folder)
        return self._begin(path, None, keeps=True)

    def _begin(self, path: Path, target: Path | None, *, keeps: bool) -> BlobWriter:
        with self._lock:
            if path in self._open:
                raise RegistryError(f"{(target or path).name} is being written already")
            self._open.add(path)
        try:
            return BlobWriter(self, path, target, keeps=keeps, hook=self._hook)
        except BaseException:
            self.release(path)
            raise

    def adopt(
        self,
        path: Path,
        digest: str = "",
        *,
        on_bytes: OnBytes = no_progress,
        trusted: bool = False,
    ) -> str:
        """Take a whole file on the same file system as a blob, and return its digest.

        It is read once for its hash, unless the caller vouches for `digest` (`trusted`: it was
        hashed while it came). The file is moved; where the blob is there already, it is removed.

        Raises:
            DigestMismatchError: the file is not what `digest` says; it is left where it is.
            RegistryError: it can't be read or moved.
        """
        if not (trusted and digest):
            actual = hash_file(path, on_bytes=on_bytes)
            if digest and actual != parse_digest(digest):
                raise _mismatch(digest, actual)
            digest = actual
        target = self.path(digest)
        with disk.explained(target):
            disk.make_folder(self.folder)
            self._hook("blob: sync")
            with path.open("rb") as file:
                os.fsync(file.fileno())
            disk.publish(path, target, hook=lambda step: self._hook(f"blob: {step}"))
        return parse_digest(digest)

    def working_folder(self, key: str) -> Path:
        """Return a folder, made if need be, in which a download named `key` keeps its parts.

        It is on the file system of the blobs, so that `adopt` moves and does not copy. It stays
        until `discard_working` or, when it has not changed for long, the garbage collector.
        """
        folder = self.working_path(key)
        with disk.explained(folder):
            disk.make_folder(folder)
        return folder

    def discard_working(self, key: str) -> None:
        """Remove a working folder and all that is in it."""
        folder = self.working_path(key)
        with disk.explained(folder):
            if folder.exists():
                shutil.rmtree(folder)

    def working_path(self, key: str) -> Path:
        """Return where the working folder of `key` is, or would be."""
        # A hash behind the readable part: different keys never share a folder.
        mark = hashlib.sha256(key.encode()).hexdigest()[:12]
        return self.partials / f"{name_part(key)[:80]}-{mark}"

    def remove(self, digest: str) -> int:
        """Remove a blob and return the bytes that this freed; 0: it was not there."""
        path = self.path(digest)
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            return 0
        disk.remove_file(path, hook=lambda step: self._hook(f"blob: {step}"))
        return size

    def remove_stored(self, file: StoredFile) -> None:
        """Remove something that `stored` or `leftovers` named."""
        if file.path.is_dir():
            with disk.explained(file.path):
                shutil.rmtree(file.path)
        else:
            disk.remove_file(file.path, hook=lambda step: self._hook(f"blob: {step}"))

    def stored(self) -> Iterator[StoredFile]:
        """Yield all blobs, and what strangers put beside them; temporary files left out."""
        for path in _entries(self.folder):
            if not disk.is_temporary(path) and path.is_file():
                yield _stored_file(path)

    def leftovers(self) -> Iterator[StoredFile]:
        """Yield what unfinished writes left: temporary files and partials, none in use."""
        for path in _entries(self.folder):
            if disk.is_temporary(path) and not self._is_open(path):
                yield _stored_file(path)
        for path in _entries(self.partials):
            if not self._is_open(path) and not self._is_open(path / _DATA):
                yield _stored_file(path)

    def release(self, path: Path) -> None:
        """Take note that a writer has closed its file."""
        with self._lock:
            self._open.discard(path)

    def _is_open(self, path: Path) -> bool:
        with self._lock:
            return path in self._open


class BlobWriter:
    """Writes one blob, hashing as it goes; a context manager that closes it.

    Not committed, it leaves a partial blob, or nothing if it was begun without `resume`. If the
    process dies, that is all but the last piece at most.
    """

    def __init__(
        self, blobs: Blobs, path: Path, target: Path | None, *, keeps: bool, hook: disk.Hook
    ) -> None:
        self._blobs = blobs
        self._path = path
        self._target = target
        self._keeps = keeps
        self._hook = hook
        self._hash = hashlib.sha256()
        # Bytes taken so far, those of earlier writers counted; the last ones may wait for the rest
        # of their piece.
        self.n_bytes = 0
        self._waiting = bytearray()
        # Whether the last whole piece came quickly, and when it had come.
        self._is_quick = False
        self._came_s = -math.inf
        with disk.explained(path):
            self._file = path.open("ab")
            for chunk in _chunks(path):
                self._hash.update(chunk)
                self.n_bytes += len(chunk)
        self._n_written = self.n_bytes

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def write(self, data: bytes) -> None:
        """Append bytes.

        Raises:
            DiskFullError: there is no room; what came before stays for a later writer.
        """
        n_over = (self.n_bytes + len(data)) % _PIECE
        if n_over < len(data):
            now = time.monotonic()
            self._is_quick = now - self._came_s < _QUICK_S
            self._came_s = now
        with disk.explained(self._path):
            self._hook("blob: write")
            n_before = len(self._waiting)
            self._waiting += data
            try:
                self._flush(len(self._waiting) - (n_over if self._is_quick else 0))
            except OSError:
                del self._waiting[n_before:]
                with contextlib.suppress(OSError):
                    self._flush(n_before)
                raise
        self._hash.update(data)
        self.n_bytes += len(data)

    def _flush(self, n: int) -> None:
        """Write the first `n` bytes that wait: all, or none."""
        if n <= 0:
            return
        try:
            self._file.write(self._waiting[:n])
            self._file.flush()
        except OSError:
            # Part of it may be there: the hash is of what was whole.
            os.truncate(self._path, self._n_written)
            raise
        self._n_written += n
        del self._waiting[:n]

    def restart(self) -> None:
        """Forget all that was written: the source has changed."""
        with disk.explained(self._path):
            self._file.truncate(0)
        self._waiting.clear()
        self._hash = hashlib.sha256()
        self.n_bytes = self._n_written = 0

    def git_oid(self) -> str:
        """Return the name that git would have for what was written; reads it once more."""
        with disk.explained(self._path):
            self._flush(len(self._waiting))
            digest = hashlib.sha1(f"blob {self.n_bytes}\0".encode(), usedforsecurity=False)
            for chunk in _chunks(self._path):
                digest.update(chunk)
        return digest.hexdigest()

    def commit(self) -> Path:
        """Make what was written the blob, and return its path.

        Raises:
            DigestMismatchError: it is not what the digest says; it is thrown away.
        """
        actual = f"sha256:{self._hash.hexdigest()}"
        target = self._target or self._blobs.path(actual)
        if target.name != actual.replace(":", "-"):
            self.discard()
            raise _mismatch(target.name.replace("-", ":"), actual)
        with disk.explained(target):
            self._flush(len(self._waiting))
            self._hook("blob: sync")
            disk.sync_file(self._file)
            self._file.close()
            disk.publish(self._path, target, hook=lambda step: self._hook(f"blob: {step}"))
        self._blobs.release(self._path)
        return target

    def discard(self) -> None:
        """Close, and keep nothing."""
        self._keeps = False
        self.close()

    def close(self) -> None:
        """Close; after `commit` there is nothing left to do."""
        try:
            if self._keeps and not self._file.closed:
                # What can't be written was not asked to last.
                with contextlib.suppress(OSError):
                    self._flush(len(self._waiting))
            self._file.close()
        finally:
            if not self._keeps:
                self._path.unlink(missing_ok=True)
            self._blobs.release(self._path)


def hash_file(path: Path, *, on_bytes: OnBytes = no_progress) -> str:
    """Return a file's digest, "sha256:<hex>"; blocking, a second or so for each gigabyte.

    Raises:
        RegistryError: it can't be read.
    """
    digest = hashlib.sha256()
    n_bytes = 0
    try:
        for chunk in _chunks(path):
            digest.update(chunk)
            n_bytes += len(chunk)
            on_bytes(n_bytes)
    except OSError as error:
        raise RegistryError(f"{path}: can't be read: {error.strerror or error}") from error
    return f"sha256:{digest.hexdigest()}"


def _chunks(path: Path) -> Iterator[memoryview]:
    buffer = bytearray(_CHUNK)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while n_read := file.readinto(buffer):
            yield view[:n_read]


def _mismatch(wanted: str, actual: str) -> DigestMismatchError:
    return DigestMismatchError(
        f'digest mismatch, expected "{parse_digest(wanted)}", got "{actual}"'
    )


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        return []


def _stored_file(path: Path) -> StoredFile:
    stats = []
    for file in (path, *path.rglob("*")):
        # What is gone meanwhile takes no room.
        with contextlib.suppress(FileNotFoundError):
            stats.append(file.stat())
    return StoredFile(
        path=path,
        digest=digest_of(path) or "",
        size_bytes=sum(status.st_size for status in stats if stat.S_ISREG(status.st_mode)),
        modified_s=max((status.st_mtime for status in stats), default=0.0),
    )
