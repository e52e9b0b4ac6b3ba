"""What is parked in RAM: states of idle slots, each in a file of its own that has no name.

llama.cpp writes and reads them as it does files on disk; theirs is the same form. Measured on
two cores (200M): 2.4 ms for 160 tokens, 6 ms for 512, and as much to read them. For slots that
generated side by side, whose values are two bytes here and there, 22 ms for 160 tokens; into a
plain buffer it takes longer then, and three times the memory.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import sys
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Final

from shimpy.engine.backend import Backend
from shimpy.engine.prefixes import SavedPrefix, SavedPrefixes, StoredFile, plan_room
from shimpy.units import GIB, KIB

# Left available for everybody else.
MIN_FREE_BYTES: Final = 1 * GIB
# Each is an open file.
_MAX_PARKED: Final = 128


class ParkedPrefixes:
    """The states of one loaded model that are in RAM; used by the loop's thread alone."""

    def __init__(
        self,
        backend: Backend,
        saved: SavedPrefixes,
        *,
        limit: int,
        available: Callable[[], int] | None = None,
    ) -> None:
        """Start with none; `saved` has them too, among those on disk.

        `limit`: bytes that they may take. `available`: tells the RAM's, the kernel's by default.
        """
        self._backend = backend
        self.saved = saved
        self._limit = limit
        self._available = available or available_bytes
        # By the name of their prefix.
        self._files: dict[str, int] = {}
        self._numbers = itertools.count(1)

    @property
    def n_bytes(self) -> int:
        """What they take."""
        return sum(one.n_bytes for one in self.saved if one.is_parked)

    def park(self, slot: int, tokens: list[int]) -> bool:
        """Copy a slot's state, which is of these tokens; False: there is no room, or it failed.

        Those that were used longest ago make way.
        """
        if not self._make_room(self._backend.state_bytes(slot)):
            return False
        try:
            fd = os.memfd_create("shimpy-parked", os.MFD_CLOEXEC)
        except OSError:
            return False
        n_bytes = self._backend.save_state(slot, _path(fd))
        if not n_bytes or os.fstat(fd).st_size != n_bytes:
            os.close(fd)
            return False
        name = f"parked-{next(self._numbers)}"
        self._files[name] = fd
        self.saved.add(SavedPrefix(name, array("i", tokens), n_bytes, is_parked=True))
        return True

    def restore(self, prefix: SavedPrefix, slot: int) -> bool:
        """Read a state into an empty slot, and keep it; False: not taken, and forgotten."""
        fd = self._files[prefix.name]
        if self._backend.load_state(slot, _path(fd), len(prefix.tokens)):
            self.saved.touch(prefix)
            return True
        self.discard(prefix)
        return False

    def write(self, prefix: SavedPrefix, fd: int) -> int:
        """Write a state to the beginning of a file; return its bytes.

        Raises:
            OSError: no room.
        """
        n_written = 0
        while n_written < prefix.n_bytes:
            n_left = prefix.n_bytes - n_written
            n = os.sendfile(fd, self._files[prefix.name], n_written, n_left)
            if not n:
                raise OSError(f"{n_left} bytes of it are missing in RAM")
            n_written += n
        return n_written

    def discard(self, prefix: SavedPrefix) -> None:
        """Give back the RAM of one."""
        self.saved.discard(prefix.name)
        os.close(self._files.pop(prefix.name))

    def set_limit(self, n_bytes: int) -> None:
        """Take no more from now on; those that were used longest ago go at once."""
        self._limit = n_bytes
        while self.n_bytes > n_bytes:
            self.discard(next(one for one in self.saved if one.is_parked))

    def close(self) -> None:
        """Give back the RAM of all."""
        for prefix in [one for one in self.saved if one.is_parked]:
            self.discard(prefix)

    def _make_room(self, n_new: int) -> bool:
        parked = {one.name: one for one in self.saved if one.is_parked}
        files = [
            StoredFile(name, one.n_bytes, used_s)
            for used_s, (name, one) in enumerate(parked.items())
        ]
        removed = plan_room(
            files,
            n_new=n_new,
            limit=self._limit,
            n_free=self._available(),
            reserve=MIN_FREE_BYTES,
        )
        if removed is None:
            return False
        n_over = len(files) - len(removed) + 1 - _MAX_PARKED
        for file in [*removed, *[one for one in files if one not in removed][: max(0, n_over)]]:
            self.discard(parked[file.path])
        return True


def reserve_files() -> None:
    """Have the kernel's table of open files large enough for all that may be parked.

    To be called before there are threads. Linux doubles it at 64 files, 128 and so on, and then,
    where threads share it, waits until none can be reading the old one (fs/file.c,
    expand_fdtable): a copy took 8 to 19 ms then instead of 0.4.
    """
    any_fd = os.open(os.devnull, os.O_RDONLY)
    # Where the limit is lower, so is what can be parked.
    with contextlib.suppress(OSError):
        os.close(fcntl.fcntl(any_fd, fcntl.F_DUPFD, 2 * _MAX_PARKED))
    os.close(any_fd)


def can_park() -> bool:
    """Whether this system has files without a name in RAM, and names to open them by."""
    return sys.platform == "linux" and Path("/proc/self/fd").exists()


def available_bytes() -> int:
    """Return the RAM that is available, as the kernel estimates it; 0: it does not tell."""
    with contextlib.suppress(OSError, ValueError, IndexError), Path("/proc/meminfo").open() as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * KIB
    return 0


def _path(fd: int) -> str:
    return f"/proc/self/fd/{fd}"
