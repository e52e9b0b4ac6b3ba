"""Brings a file that is not in the page cache there before it is mapped, and tells how far it is.

llama.cpp maps files with MAP_POPULATE: that returns once all is read, with no word meanwhile, for
half a minute where 60 GB come from a disk of 2 GB/s. The same pages are asked for here in pieces,
at the same speed (MADV_POPULATE_READ, Linux 5.14; elsewhere nothing is done).

And as huge pages, where the file system has them in the page cache (ext4 since Linux 6.16, XFS):
llama.cpp's own mapping is of them then, and each token passes over all weights.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from shimpy.units import MIB

_PIECE_BYTES: Final = 64 * MIB
# In a moment anyway.
_LEAST_BYTES: Final = 4 * _PIECE_BYTES
# mman.h, which Python's mmap does not have.
_MADV_POPULATE_READ: Final = 22
# Pages that are looked at to tell whether a file is cached.
_N_SAMPLES: Final = 64


def read_ahead(paths: Iterable[str], on_progress: Callable[[float], bool]) -> bool:
    """Read the files that are not in the page cache; return whether to go on.

    `on_progress` takes the part that is read, 0 to 1; its False stops it. What can't be read is
    for who opens the file to tell.
    """
    cold = {path: n for path in paths if (n := _size(path)) >= _LEAST_BYTES and is_cold(path)}
    n_total, n_read = sum(cold.values()), 0
    for path, n_bytes in cold.items():
        with contextlib.suppress(OSError, ValueError), _mapped(path) as file:
            with contextlib.suppress(OSError):
                # A kernel may have none.
                file.madvise(mmap.MADV_HUGEPAGE)
            for at in range(0, min(n_bytes, len(file)), _PIECE_BYTES):
                file.madvise(_MADV_POPULATE_READ, at, min(_PIECE_BYTES, len(file) - at))
                if not on_progress((n_read + at) / n_total):
                    return False
        n_read += n_bytes
    return True


def is_cold(path: str) -> bool:
    """Whether a part of a file would have to be read from the disk; False: or nobody knows."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    page = bytearray(1)
    try:
        n_bytes = os.fstat(file).st_size
        # Else the first page that is not there brings in what follows it, in small pages.
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
        for at in range(0, n_bytes, n_bytes // _N_SAMPLES + 1):
            os.preadv(file, [page], at, os.RWF_NOWAIT)
    except BlockingIOError:
        return True
    except (OSError, AttributeError):
        # This file system, or this system, does not tell.
        return False
    finally:
        os.close(file)
    return False


def _size(path: str) -> int:
    try:
        return Path(path).stat().st_size
    except OSError:
        return 0


def _mapped(path: str) -> mmap.mmap:
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return mmap.mmap(file, 0, prot=mmap.PROT_READ)
    finally:
        os.close(file)
