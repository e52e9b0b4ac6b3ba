"""The saved prefixes of models that have gone, which nobody else would remove before they are old.

Workers write and read them (`engine.prefix_store`), each its own model's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from pathlib import Path

import msgspec

from shimpy.logs import get_logger
from shimpy.protocol.prefixes import folder_name
from shimpy.server.freshness import FreshRegistry

SWEEP_PERIOD_S = 3600.0

_log = get_logger("prefixes")


class Swept(msgspec.Struct, frozen=True):
    """What was removed."""

    n_files: int = 0
    n_bytes: int = 0


def sweep(root: Path, digests: Iterable[str]) -> Swept:
    """Remove the prefixes of all models but those of these digests; blocking.

    What can't be removed stays. A worker that is just writing one loses it, and no more.
    """
    kept = {folder_name(digest) for digest in digests}
    n_files = n_bytes = 0
    for folder in _listed(root):
        if folder.name in kept or folder.is_symlink() or not folder.is_dir():
            continue
        for path in _listed(folder):
            try:
                size = path.lstat().st_size
                path.unlink()
            except OSError:
                continue
            n_files += 1
            n_bytes += size
        try:
            folder.rmdir()
        except OSError:
            continue
    return Swept(n_files, n_bytes)


async def sweep_gone(root: Path, registry: FreshRegistry) -> None:
    """Remove the prefixes of models that have gone."""
    digests = {model.digest for model in await registry.models()}
    swept = await asyncio.to_thread(sweep, root, digests)
    if swept.n_files:
        _log.info("prefixes_swept", n_files=swept.n_files, n_bytes=swept.n_bytes)


async def watch_gone(root: Path, registry: FreshRegistry) -> None:
    """Do so now and then, for ever."""
    while True:
        try:
            await sweep_gone(root, registry)
        except Exception as error:  # noqa: BLE001 - the next time may well succeed
            _log.error("not_swept", exc_info=error)
        await asyncio.sleep(SWEEP_PERIOD_S)


def _listed(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []
