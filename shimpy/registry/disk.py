"""Writing that a crash or a full disk leaves either done or undone, never half.

What is written goes to a temporary name in the same folder, is synced, renamed, and its
folder synced. Each step announces itself to a hook, through which tests kill the process or
fill the disk there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final

from shimpy.errors import DiskFullError, RegistryError

TEMPORARY: Final = ".tmp-"
# Called with the name of each step before it is taken.
Hook = Callable[[str], None]
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def no_hook(_step: str) -> None:
    """Do nothing: what a running program does between steps."""


def write_file(path: Path, data: bytes, *, hook: Hook = no_hook) -> None:
    """Put `data` at `path`, whole or not at all; blocking.

    Raises:
        DiskFullError: there is no room; what was at `path` before still is.
        RegistryError: it can't be written; likewise.
    """
    with explained(path):
        make_folder(path.parent)
        hook("create")
        temporary, file = create_temporary(path.parent)
        try:
            with file:
                hook("write")
                file.write(data)
                hook("sync")
                sync_file(file)
            publish(temporary, path, hook=hook)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


def create_temporary(folder: Path) -> tuple[Path, BinaryIO]:
    """Open a new file in `folder` for writing; `is_temporary` tells its name."""
    path = folder / f"{TEMPORARY}{secrets.token_hex(8)}"
    return path, path.open("xb")


def is_temporary(path: Path) -> bool:
    """Whether a file was left by a process that died while it wrote."""
    return path.name.startswith(TEMPORARY)


def publish(temporary: Path, path: Path, *, hook: Hook = no_hook) -> None:
    """Give a synced file its final name, for good."""
    hook("rename")
    temporary.replace(path)
    hook("sync folder")
    sync_folder(path.parent)


def remove_file(path: Path, *, hook: Hook = no_hook) -> None:
    """Remove a file for good; one that is not there is no error.

    Raises:
        RegistryError: it can't be removed.
    """
    with explained(path):
        hook("unlink")
        path.unlink(missing_ok=True)
        hook("sync folder")
        sync_folder(path.parent)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, each entry synced into its parent."""
    missing = [folder, *folder.parents]
    missing = [path for path in missing if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_folder(path.parent)


def sync_file(file: BinaryIO) -> None:
    """Return when a file's data is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Return when a folder's entries are on the disk; some file systems can't, and need not."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.ENOTSUP, errno.EBADF}:
            raise
    finally:
        os.close(descriptor)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn the system's errors about `path` into ours."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise DiskFullError(
                f"{path}: there is no room on the disk: {error.strerror}; `shimpy rm` and "
                "`shimpy gc` make some, data_dir puts the store elsewhere"
            ) from error
        raise RegistryError(f"{path}: can't be written: {error.strerror or error}") from error
