"""The registry as requests see it: always fresh enough, scanned by one thread at a time.

A scan reads directories and, for files it has not seen, headers: blocking work, so it runs
in a thread. Whoever needs a scan while one runs joins it.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from shimpy.errors import GgufError, NotFoundError
from shimpy.logs import get_logger
from shimpy.registry.model import Model
from shimpy.registry.mounts import are_local

# Scans are milliseconds: each request that needs one gets a new one. Where they are slow (a
# folder on a network, hundreds of new files), one may be this old before it is repeated.
SLOW_SCAN_S = 0.25
MAX_AGE_S = 2.0
WATCH_PERIOD_S = 30.0

_log = get_logger("registry")


class Scanner(Protocol):
    """What is needed of `registry.Registry`."""

    def refresh(self) -> None:
        """Look at the folders again; blocking."""

    def use_folders(self, folders: Sequence[Path]) -> None:
        """Search other folders from the next scan on; blocking."""

    def models(self) -> tuple[Model, ...]:
        """Return the models as of the last scan."""

    def resolve(self, text: str) -> Model:
        """Return the model that a name means, as of the last scan."""

    @property
    def problems(self) -> tuple[str, ...]:
        """What kept the last scan from seeing or naming all there is, in words."""


class FreshRegistry:
    """The models of this machine; it belongs to the event loop's thread."""

    def __init__(self, registry: Scanner, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._registry = registry
        self._clock = clock
        self._scan: asyncio.Future[None] | None = None
        self._started_s = -float("inf")
        self._took_s = 0.0
        self._told: tuple[str, ...] = ()
        # Files that a scan looked at lately and that are on a disk of this machine: the kernel
        # has them in memory, and to ask it takes microseconds, a thread tenths of milliseconds.
        self._at_hand: set[tuple[Path, ...]] = set()

    @property
    def problems(self) -> tuple[str, ...]:
        """What kept the last scan from seeing or naming all there is, in words."""
        return self._registry.problems

    async def models(self) -> tuple[Model, ...]:
        """Return all models, the broken ones too, sorted by name."""
        await self._ensure_fresh()
        return self._registry.models()

    async def resolve(self, text: str) -> Model:
        """Return the model that `text` means; a file that came or changed a moment ago counts.

        Raises:
            InvalidNameError: no name.
            NotFoundError: no such model.
            GgufError: its file is broken; says how.
        """
        try:
            model = self._registry.resolve(text)
        except (NotFoundError, GgufError):
            await self._ensure_fresh()
            return self._registry.resolve(text)
        if await self._is_current(model):
            return model
        await self.scan()
        return self._registry.resolve(text)

    async def _is_current(self, model: Model) -> bool:
        """Whether the model's files are those that were scanned."""
        if model.files in self._at_hand:
            return _is_current(model)
        is_current, is_at_hand = await asyncio.to_thread(_look, model)
        if is_at_hand:
            self._at_hand.add(model.files)
        return is_current

    async def use_folders(self, folders: Sequence[Path]) -> None:
        """Search other folders from now on."""
        await asyncio.to_thread(self._registry.use_folders, folders)
        await self.scan()

    async def watch(self) -> None:
        """Scan now and then, for ever, so that a vanished model does not linger unseen."""
        while True:
            try:
                await self.scan()
            except Exception as error:  # noqa: BLE001 - the next scan may well succeed
                _log.error("scan_failed", exc_info=error)
            await asyncio.sleep(WATCH_PERIOD_S)

    async def scan(self) -> None:
        """Look at the folders once more; a scan that began before this call does not count."""
        running = self._scan
        if running is not None:
            await asyncio.shield(running)
        # Whoever waited with us may have begun the next one meanwhile: it is new enough.
        await self._join_or_start()

    async def _ensure_fresh(self) -> None:
        if self._took_s < SLOW_SCAN_S:
            await self.scan()
        elif self._scan is not None or self._clock() - self._started_s > MAX_AGE_S:
            await self._join_or_start()

    async def _join_or_start(self) -> None:
        if self._scan is None:
            self._started_s = self._clock()
            loop = asyncio.get_running_loop()
            self._scan = loop.run_in_executor(None, self._registry.refresh)
            self._scan.add_done_callback(self._on_scanned)
        # A caller that is cancelled must not take the scan from the others.
        await asyncio.shield(self._scan)

    def _on_scanned(self, scan: asyncio.Future[None]) -> None:
        self._scan = None
        # Something else may be mounted there by now.
        self._at_hand.clear()
        self._took_s = self._clock() - self._started_s
        if not scan.cancelled():
            # Seen here, so that a scan whose callers have all gone does not warn.
            scan.exception()
        self._tell_problems()

    def _tell_problems(self) -> None:
        """Log what is new among the problems: scans are many, and they mostly stay."""
        problems = self._registry.problems
        for problem in problems:
            if problem not in self._told:
                _log.info("scan_problem", reason=problem)
        self._told = problems


def _is_current(model: Model) -> bool:
    """Whether the model's files are those that were scanned; touches the disk."""
    try:
        stats = [os.stat(path) for path in model.files]  # noqa: PTH116 - for each request
    except OSError:
        return False
    if len(stats) == 1:
        # Mostly.
        (stat,) = stats
        return stat.st_size == model.size_bytes and stat.st_mtime == model.modified_s
    size = sum(stat.st_size for stat in stats)
    return size == model.size_bytes and max(stat.st_mtime for stat in stats) == model.modified_s


def _look(model: Model) -> tuple[bool, bool]:
    """Return `_is_current`, and whether that may be asked again without a thread."""
    return _is_current(model), are_local(model.files)
