"""The folder of saved prefixes: read as a model is loaded, filled as it is unloaded.

    <folder>/<model>/<key>-<tokens>.kv     0600, below folders of 0700: it holds prompts
    <folder>/<model>/<...>.kv.part         being written; renamed when it is whole
    <folder>/lock                          held while anything is written or makes room

Many workers share the folder and its bound. Whatever is wrong here costs a prefix and never a
request.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import sys
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, Literal

from shimpy.engine.backend import Backend
from shimpy.engine.parked import ParkedPrefixes
from shimpy.engine.prefix_file import (
    KEY_BYTES,
    PrefixFileError,
    file_bytes,
    read_tokens,
    seal,
    verify,
)
from shimpy.engine.prefixes import Save, SavedPrefix, SavedPrefixes, StoredFile, plan_room
from shimpy.protocol.messages import Load, PrefixNews
from shimpy.protocol.prefixes import folder_name
from shimpy.units import GIB

SUFFIX: Final = ".kv"
_PART: Final = ".part"
_LOCK: Final = "lock"
# Left free on the disk for everybody else.
MIN_FREE_BYTES: Final = 2 * GIB
# Saving begins no prefix that would not be done in time, as far as can be known, and ends the
# process when it is not over by then. The daemon's patience is longer.
OVERTIME_S: Final = 2.0
# What is written and summed in a second, before anything was measured.
_BYTES_PER_S: Final = 500e6
# What takes less is too quick to tell how fast it was.
_TELLING_S: Final = 0.1
# llama.cpp counts a state's bytes by going over its pieces. Where sequences generated side by
# side, and values lie transposed, these are two bytes each and tens of millions; writing one
# takes about so many times as long as counting it.
_WRITE_PER_COUNT: Final = 20
# Files of one model that are looked at.
_MAX_FILES: Final = 256
_FOLDER_MODE: Final = 0o700
_FILE_MODE: Final = 0o600

_Send = Callable[[PrefixNews], None]


class PrefixStore:
    """The saved prefixes of one loaded model; used by the loop's thread alone."""

    def __init__(self, load: Load, backend: Backend, *, send: _Send) -> None:
        """Read what there is; it takes a file's end each, not the states."""
        self._backend = backend
        self._send = send
        self._limit = load.prefix_cache_bytes
        self._root = Path(load.prefix_dir)
        self._folder = self._root / folder_name(load.digest)
        self._key = prefix_key(load, backend.state_key)
        # What is being written.
        self._part: Path | None = None
        self.saved = SavedPrefixes(whole=backend.state_is_whole, can_cut=backend.can_split)
        for path in self._own_files():
            self._look_at(path)

    def restore(self, prefix: SavedPrefix, slot: int) -> bool:
        """Read a prefix into an empty slot; False: it can't be had, and is forgotten."""
        path = self._folder / prefix.name
        started_s = time.monotonic()
        try:
            self._load(path, prefix, slot)
        except FileNotFoundError:
            # Removed to make room for another.
            self.saved.discard(prefix.name)
            return False
        except (PrefixFileError, OSError) as error:
            self._discard(path, error)
            return False
        self._tell("restored", prefix, time.monotonic() - started_s)
        return True

    def save(self, saves: list[Save], limit_s: float, parked: ParkedPrefixes | None = None) -> None:
        """Write slots' states and parked ones, the first ones first, as time and room allow.

        The process ends where this takes too long: it is about to end anyway.
        """
        if not saves:
            return
        alarm = threading.Timer(limit_s + OVERTIME_S, self._give_up)
        alarm.daemon = True
        alarm.start()
        try:
            with _locked(self._root):
                self._save_all(saves, limit_s, parked)
        except OSError as error:
            self._send(PrefixNews("skipped", len(saves[0].tokens), 0, reason=str(error)))
        finally:
            alarm.cancel()

    def _load(self, path: Path, prefix: SavedPrefix, slot: int) -> None:
        with _opened(path) as fd:
            if verify(fd, key=self._key) != prefix.tokens:
                raise PrefixFileError("it holds other tokens than it did")
            if not self._backend.load_state(slot, _checked(fd, path), len(prefix.tokens)):
                raise PrefixFileError("llama.cpp does not take it")
            with contextlib.suppress(OSError):
                os.utime(fd)

    # --- saving ---

    def _save_all(self, saves: list[Save], limit_s: float, parked: ParkedPrefixes | None) -> None:
        until_s = time.monotonic() + limit_s
        bytes_per_s = _BYTES_PER_S
        for rank, save in enumerate(saves):
            started_s = time.monotonic()
            n_state = self._state_bytes(save)
            n_bytes = file_bytes(n_state, len(save.tokens))
            counted_s = time.monotonic() - started_s
            needed_s = n_bytes / bytes_per_s + _WRITE_PER_COUNT * counted_s
            if started_s + needed_s > until_s:
                reason = f"it would take about {needed_s:.1f} s"
                self._send(PrefixNews("skipped", len(save.tokens), n_bytes, reason=reason))
                continue
            try:
                prefix = self._save(save, n_bytes, rank, parked)
            except (PrefixFileError, OSError) as error:
                self._send(PrefixNews("skipped", len(save.tokens), n_bytes, reason=str(error)))
                continue
            took_s = time.monotonic() - started_s
            self._tell("saved", prefix, took_s)
            if took_s > _TELLING_S:
                bytes_per_s = prefix.n_bytes / took_s

    def _state_bytes(self, save: Save) -> int:
        if save.parked is not None:
            return save.parked.n_bytes
        assert save.slot is not None
        return self._backend.state_bytes(save.slot)

    def _save(
        self, save: Save, n_bytes: int, rank: int, parked: ParkedPrefixes | None
    ) -> SavedPrefix:
        tokens = array("i", save.tokens)
        self._folder.mkdir(exist_ok=True, mode=_FOLDER_MODE)
        if not self._make_room(n_bytes):
            raise PrefixFileError("there is no room for it")
        name = f"{self._key.hex()}-{hashlib.sha256(tokens).hexdigest()[:32]}{SUFFIX}"
        self._part = part = self._folder / (name + _PART)
        fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _FILE_MODE)
        try:
            self._write(save, part, fd, parked)
            n_file = seal(fd, key=self._key, tokens=tokens)
            # Those that were used longer ago are the first to go again.
            used_s = time.time() - rank
            os.utime(fd, (used_s, used_s))
            part.rename(self._folder / name)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        finally:
            os.close(fd)
        for covered in save.covers:
            if covered != name:
                self._remove(self._folder / covered)
        prefix = SavedPrefix(name, tokens, n_file)
        self.saved.add(prefix)
        return prefix

    def _write(self, save: Save, part: Path, fd: int, parked: ParkedPrefixes | None) -> None:
        if save.parked is not None:
            assert parked is not None, "who has it writes it"
            parked.write(save.parked, fd)
            return
        assert save.slot is not None
        n_written = self._backend.save_state(save.slot, str(part))
        # It does not look whether its last bytes reached the disk.
        if not n_written or os.fstat(fd).st_size != n_written:
            raise PrefixFileError("llama.cpp did not write it: the disk may be full")

    def _give_up(self) -> None:
        """End the process in the middle of writing; from the alarm's thread."""
        if self._part is not None:
            with contextlib.suppress(OSError):
                self._part.unlink(missing_ok=True)
        os._exit(0)

    def _make_room(self, n_new: int) -> bool:
        files = self._all_files()
        for file in files:
            # Nobody else writes while we have the lock: whoever did has died.
            if file.path.endswith(_PART):
                self._remove(Path(file.path))
        disk = os.statvfs(self._folder)
        removed = plan_room(
            [file for file in files if not file.path.endswith(_PART)],
            n_new=n_new,
            limit=self._limit,
            n_free=disk.f_bavail * disk.f_frsize,
            reserve=MIN_FREE_BYTES,
        )
        for file in removed or ():
            self._remove(Path(file.path))
        return removed is not None

    # --- the folder ---

    def _own_files(self) -> list[Path]:
        """Return this model's files under this key, the last used first."""
        found = [
            file
            for file in _files_in(self._folder)
            if Path(file.path).name.startswith(f"{self._key.hex()}-") and file.path.endswith(SUFFIX)
        ]
        found.sort(key=lambda file: file.used_s, reverse=True)
        return [Path(file.path) for file in found[:_MAX_FILES]]

    def _all_files(self) -> list[StoredFile]:
        with contextlib.suppress(OSError):
            return [
                file
                for folder in os.scandir(self._root)
                if folder.is_dir(follow_symlinks=False)
                for file in _files_in(Path(folder.path))
            ]
        return []

    def _look_at(self, path: Path) -> None:
        try:
            with _opened(path) as fd:
                tokens = read_tokens(fd, key=self._key)
                n_bytes = os.fstat(fd).st_size
        except FileNotFoundError:
            return
        except (PrefixFileError, OSError) as error:
            self._discard(path, error)
        else:
            self.saved.add(SavedPrefix(path.name, tokens, n_bytes))

    def _discard(self, path: Path, error: Exception) -> None:
        """Remove a file that is no good, and say so."""
        self._remove(path)
        self._send(PrefixNews("discarded", 0, 0, reason=f"{path}: {error}"))

    def _remove(self, path: Path) -> None:
        if path.parent == self._folder:
            self.saved.discard(path.name)
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)

    def _tell(self, kind: Literal["saved", "restored"], prefix: SavedPrefix, took_s: float) -> None:
        self._send(PrefixNews(kind, len(prefix.tokens), prefix.n_bytes, took_s=took_s))


def prefix_key(load: Load, state_key: str) -> bytes:
    """Return what a state is valid under: the model's files as they are, and `state_key`.

    The digest is of the header and the sizes alone, so the files' times are in it, too.
    """
    total = hashlib.sha256(f"{load.digest}\n{state_key}\n".encode())
    for path in load.shards or [load.path]:
        stat = Path(path).stat()
        total.update(f"{stat.st_size} {stat.st_mtime_ns}\n".encode())
    return total.digest()[:KEY_BYTES]


def _files_in(folder: Path) -> list[StoredFile]:
    found: list[StoredFile] = []
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            with contextlib.suppress(OSError):
                stat = entry.stat(follow_symlinks=False)
                if entry.is_file(follow_symlinks=False):
                    found.append(StoredFile(entry.path, stat.st_size, stat.st_mtime))
    return found


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    root.mkdir(parents=True, exist_ok=True, mode=_FOLDER_MODE)
    root.chmod(_FOLDER_MODE)
    fd = os.open(root / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _FILE_MODE)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _checked(fd: int, path: Path) -> str:
    """Return a name of the open file: what has its path now may be another."""
    return f"/proc/self/fd/{fd}" if sys.platform == "linux" else str(path)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        yield fd
    finally:
        os.close(fd)
