"""Learns what workers take on each card besides llama.cpp's buffers, and keeps it.

Blocking, for threads: a reading takes a millisecond, and happens at most every ten seconds for
a worker. Where no driver tells, the defaults stay.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import msgspec
from msgspec.structs import replace

from shimpy.errors import DiskFullError, RegistryError
from shimpy.logs import get_logger
from shimpy.placement.cards import CardSources
from shimpy.placement.hardware import Gpu, Hardware
from shimpy.placement.overhead import Learnt, learn, with_learnt
from shimpy.placement.usage import CardUse, held_by, read_cards
from shimpy.protocol.cuda import STACK_BYTES
from shimpy.protocol.messages import BufferUse
from shimpy.registry.disk import write_file

FILE_NAME: Final = "overheads.json"
_PERIOD_S: Final = 10.0
_MAX_CARDS: Final = 64
_MAX_WORKERS: Final = 256

_log = get_logger("overheads")


class _File(msgspec.Struct):
    """What is kept: what was learnt of each card with its driver and library."""

    cards: dict[str, Learnt]


class Overheads:
    """Knows what workers take on each card besides their buffers."""

    def __init__(
        self,
        path: Path | None,
        *,
        sources: CardSources | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`path` is the file that keeps it; None: it is kept in memory alone."""
        self._path = path
        self._sources = sources or CardSources()
        self._clock = clock
        self._lock = threading.Lock()
        self._cards: dict[str, Learnt] | None = None
        # The cards as they were when none of our workers was on any.
        self._before: dict[str, CardUse] = {}
        # When each worker was looked at last, by its process id.
        self._read_at: dict[int, float] = {}

    def applied(self, hardware: Hardware) -> Hardware:
        """Return a snapshot with the overheads that were learnt of its cards."""
        with self._lock:
            cards = self._known()
        gpus = tuple(with_learnt(gpu, cards.get(_key(gpu, hardware))) for gpu in hardware.gpus)
        return replace(hardware, gpus=gpus)

    def look(self) -> None:
        """Remember the cards as they are, with none of our workers on them."""
        self._before = read_cards(self._sources)

    def is_due(self, pid: int) -> bool:
        """Whether a worker that has done something is to be looked at."""
        at = self._read_at.get(pid)
        return at is None or self._clock() - at >= _PERIOD_S

    def read(
        self, pid: int, device: str, memory: Sequence[BufferUse], hardware: Hardware
    ) -> int | None:
        """Learn from a worker with layers on one device; return its overhead there in bytes.

        `memory` is what the worker reported of its buffers. None: nothing is known.
        """
        gpu = next((gpu for gpu in hardware.gpus if gpu.name == device), None)
        is_first = pid not in self._read_at
        if len(self._read_at) >= _MAX_WORKERS:
            self._read_at.pop(next(iter(self._read_at)))
        self._read_at[pid] = self._clock()
        if gpu is None or not gpu.device_id:
            return None
        now, before = read_cards(self._sources).get(gpu.device_id), self._before.get(gpu.device_id)
        if now is None or before is None:
            return None
        held = held_by(pid, now, before)
        buffers = sum(
            use.model_bytes + use.context_bytes + use.compute_bytes
            for use in memory
            if use.device == device
        )
        if held is None or held < buffers:
            return None
        self._learn(_key(gpu, hardware), held - buffers, is_first=is_first)
        return held - buffers

    def _learn(self, key: str, overhead_bytes: int, *, is_first: bool) -> None:
        with self._lock:
            cards = self._known()
            old = cards.get(key, Learnt())
            new = learn(old, overhead_bytes, is_first=is_first)
            if new == old:
                return
            cards.pop(key, None)
            cards[key] = new
            if len(cards) > _MAX_CARDS:
                del cards[next(iter(cards))]
            _log.info("overhead", card=key, bytes=overhead_bytes, is_first=is_first)
            if self._path is None:
                return
            try:
                write_file(self._path, msgspec.json.encode(_File(cards=cards)))
            except (RegistryError, DiskFullError) as error:
                _log.warning("overheads_not_kept", reason=error.message)

    def _known(self) -> dict[str, Learnt]:
        if self._cards is None:
            self._cards = _read(self._path)
        return self._cards


def _key(gpu: Gpu, hardware: Hardware) -> str:
    """Return what an overhead depends on: the kind of card, its driver, the library, its stacks."""
    made = f"; stacks of {STACK_BYTES}" if gpu.backend == "CUDA" else ""
    return f"{gpu.backend}; {gpu.description}; {gpu.driver}; {hardware.library}{made}"


def _read(path: Path | None) -> dict[str, Learnt]:
    if path is None:
        return {}
    try:
        return msgspec.json.decode(path.read_bytes(), type=_File).cards
    except (OSError, msgspec.DecodeError):
        return {}
