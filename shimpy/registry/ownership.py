"""One owner for a folder: a file that is locked as long as its process lives."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from shimpy.errors import StoreLockedError
from shimpy.registry import disk


def take_lock(path: Path, *, owned: str) -> int:
    """Lock a file, made if need be, and return its descriptor; closing it, or dying, unlocks it.

    Args:
        path: the file; it holds the owner's process id, for whoever comes second.
        owned: what is locked, for the message.

    Raises:
        StoreLockedError: another process has it; says which.
        RegistryError: the file can't be made.
    """
    with disk.explained(path):
        disk.make_folder(path.parent)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        except BlockingIOError:
            owner = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            raise StoreLockedError(
                f"{owned} belongs to another running daemon (process {owner}); stop that one, or "
                "give this one a folder of its own with SHIMPY_HOME or data_dir",
                owner=int(owner) if owner.isdecimal() else None,
            ) from None
        except BaseException:
            os.close(descriptor)
            raise
    return descriptor
