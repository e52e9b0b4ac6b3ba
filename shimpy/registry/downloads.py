"""A model's files into the store: room for all of them first, then one by one, each once.

Pulls share it: two that need the same file wait for one download, and the disk's room is promised
to each until its files are there. Safe to use from several threads.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import msgspec

from shimpy.errors import DiskFullError
from shimpy.registry.attempts import Retries, Stop
from shimpy.registry.fetch import Fetcher, working_key
from shimpy.registry.remote import RemoteFile
from shimpy.registry.store import Store
from shimpy.units import MIB, format_bytes

# Left free on the disk: a full one harms more than a pull.
_HEADROOM: Final = 256 * MIB
# How often progress is told, and how often a wait for another pull looks up.
_TELL_EVERY_S: Final = 0.1
_LOOK_EVERY_S: Final = 0.2


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """How far a file is; `completed` never becomes less."""

    file: str
    # "": nobody knows it before the file is whole.
    digest: str
    # None: its server does not say.
    total: int | None
    completed: int


OnProgress = Callable[[Progress], None]


class Downloads:
    """The downloads into one store."""

    def __init__(self, store: Store, retries: Retries) -> None:
        self._store = store
        self._fetcher = Fetcher(blobs=store.blobs, retries=retries)
        self._changed = threading.Condition()
        # Keys of the files that somebody fetches now.
        self._busy: set[str] = set()
        # The files of the pulls that run: the disk has been promised to them.
        self._promised: list[Sequence[RemoteFile]] = []

    @contextmanager
    def fetched(
        self, files: Sequence[RemoteFile], *, what: str, stop: Stop, on_progress: OnProgress
    ) -> Iterator[dict[str, str]]:
        """Yield the digest of each file by its path, all of them being blobs by then; blocking.

        As long as the block runs, the garbage collector leaves them alone.

        Args:
            files: a model's.
            what: the model, for messages.
            stop: ends the work; what has come is kept.
            on_progress: told how far each file is.

        Raises:
            DiskFullError: the disk has not the room for what is still to come.
            ShimpyError: as `Fetcher.fetch`.
            StoppedError: `stop` was set.
        """
        with self._store.pinned(*map(_key, files)):
            with self._room(files, what):
                digests = {file.path: self._fetch(file, stop, on_progress) for file in files}
            with self._store.pinned(*digests.values()):
                yield digests

    def _fetch(self, file: RemoteFile, stop: Stop, on_progress: OnProgress) -> str:
        meter = _Meter(file, on_progress)
        with self._turn(file, meter, stop):
            blobs = self._store.blobs
            if file.digest and file.digest in blobs:
                digest = file.digest
            else:
                digest = self._fetcher.fetch(file, stop=stop, on_progress=meter.tell)
            meter.tell(blobs.size(digest), is_last=True)
            return digest

    @contextmanager
    def _turn(self, file: RemoteFile, meter: _Meter, stop: Stop) -> Iterator[None]:
        """Be the only one that fetches a file; another pull may be at it already."""
        key = _key(file)
        with self._changed:
            while key in self._busy:
                stop.check()
                meter.tell(self._begun_bytes(file))
                self._changed.wait(_LOOK_EVERY_S)
            self._busy.add(key)
        try:
            yield
        finally:
            with self._changed:
                self._busy.discard(key)
                self._changed.notify_all()

    @contextmanager
    def _room(self, files: Sequence[RemoteFile], what: str) -> Iterator[None]:
        """Hold the disk's room for what is still to come of a model, other pulls considered."""
        with self._changed:
            self._check_room(files, what)
            self._promised.append(files)
        try:
            yield
        finally:
            with self._changed:
                self._promised.remove(files)

    def _check_room(self, files: Sequence[RemoteFile], what: str) -> None:
        missing = self._missing_bytes(files)
        others = sum(map(self._missing_bytes, self._promised))
        free = shutil.disk_usage(self._store.root).free
        lacking = missing + others + _HEADROOM - free
        if missing and lacking > 0:
            promised = f", {format_bytes(others)} of it for other pulls" if others else ""
            raise DiskFullError(
                f"{what} is not pulled: {format_bytes(missing)} are still to come, and "
                f"{self._store.root} has {format_bytes(free)} free{promised}; "
                f"{format_bytes(lacking)} are missing. `shimpy rm` and `shimpy gc` make room, "
                "data_dir puts the store elsewhere"
            )

    def _missing_bytes(self, files: Sequence[RemoteFile]) -> int:
        """Return what is still to come of some files."""
        return sum(max(0, (file.size_bytes or 0) - self._begun_bytes(file)) for file in files)

    def _begun_bytes(self, file: RemoteFile) -> int:
        """Return what is there of a file already."""
        blobs = self._store.blobs
        if file.digest and file.digest in blobs:
            return file.size_bytes or 0
        return blobs.begun_bytes(_key(file))


def _key(file: RemoteFile) -> str:
    """Return what a file is known by before it is there."""
    return file.digest or working_key(file)


class _Meter:
    """Tells how far a file is, now and then, and never less than before."""

    def __init__(self, file: RemoteFile, report: OnProgress) -> None:
        self._file = file
        self._report = report
        self._most = 0
        self._told_s = 0.0

    def tell(self, n_bytes: int, *, is_last: bool = False) -> None:
        """Take note that so many bytes are there."""
        self._most = max(self._most, n_bytes)
        now = time.monotonic()
        if not is_last and now - self._told_s < _TELL_EVERY_S:
            return
        self._told_s = now
        self._report(
            Progress(
                file=self._file.name,
                digest=self._file.digest,
                total=self._file.size_bytes,
                completed=self._most,
            )
        )
