"""Which files lie on disks of this machine, where a look at one waits for nobody else."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

# Of these, and of no other kind, a call for a file that was looked at lately is answered from
# memory. What is behind a network or a program of somebody's may never answer.
_LOCAL_KINDS: Final = frozenset(
    {
        "apfs",
        "bcachefs",
        "btrfs",
        "exfat",
        "ext2",
        "ext3",
        "ext4",
        "f2fs",
        "hfs",
        "overlay",
        "ramfs",
        "tmpfs",
        "vfat",
        "xfs",
        "zfs",
    }
)


def are_local(paths: Iterable[Path]) -> bool:
    """Whether all files, and the links to them, are on disks of this machine; blocking."""
    import psutil  # type: ignore[import-untyped]

    kinds = {one.mountpoint: one.fstype for one in psutil.disk_partitions(all=True)}
    return all(
        _kind_at(name, kinds) in _LOCAL_KINDS
        for path in paths
        for name in {os.path.abspath(path), os.path.realpath(path)}  # noqa: PTH100 (no link read)
    )


def _kind_at(path: str, kinds: dict[str, str]) -> str:
    """Return the kind of file system that an absolute path is on; "": nobody tells."""
    while path not in kinds:
        parent = os.path.dirname(path)  # noqa: PTH120
        if parent == path:
            return ""
        path = parent
    return kinds[path].lower()
