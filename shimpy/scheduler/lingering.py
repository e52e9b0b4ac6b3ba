"""Waits until the cards no longer show what workers held that have gone. Blocking, for threads.

The driver gives a process's memory back some time after the process has been reaped: on an H200
its CUDA context, 585 MiB, was still there when nvidia-smi looked a moment after that. A plan made
meanwhile would keep two layers' experts in RAM for nothing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Final

from shimpy.placement.cards import CardSources
from shimpy.placement.usage import CardUse, read_cards
from shimpy.units import MIB

# Others may take what comes back: then it never shows.
LIMIT_S: Final = 0.5
_LOOK_S: Final = 0.02
_ALLOWED_BYTES: Final = 64 * MIB
_MAX_WORKERS: Final = 256


class Lingering:
    """Knows what cards should show once those have gone that were told to."""

    def __init__(
        self,
        sources: CardSources | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._sources = sources or CardSources()
        self._clock = clock
        self._sleep = sleep
        self._lock = threading.Lock()
        # By process id, then by the card's PCI address: the bytes in use, and those it holds.
        self._stopping: dict[int, dict[str, tuple[int, int]]] = {}
        # The bytes that should be in use now.
        self._wanted: dict[str, int] = {}

    def on_stop(self, pid: int) -> None:
        """Look at what a worker holds that is about to be stopped; a millisecond."""
        cards = read_cards(self._sources)
        held = {
            address: (use.used_bytes, use.processes[pid])
            for address, use in cards.items()
            if use.processes.get(pid)
        }
        with self._lock:
            if held and len(self._stopping) < _MAX_WORKERS:
                self._stopping[pid] = held

    def on_exit(self, pid: int) -> None:
        """Expect back what it held."""
        with self._lock:
            for address, (used, held) in self._stopping.pop(pid, {}).items():
                # One that has gone before is among what was in use.
                self._wanted[address] = self._wanted.get(address, used) - held

    @property
    def is_expected(self) -> bool:
        """Whether something should have come back."""
        return bool(self._wanted)

    def wait(self) -> None:
        """Wait until it has, or LIMIT_S."""
        with self._lock:
            wanted, self._wanted = self._wanted, {}
        until_s = self._clock() + LIMIT_S
        while not _are_there(wanted, read_cards(self._sources)) and self._clock() < until_s:
            self._sleep(_LOOK_S)


def _are_there(wanted: Mapping[str, int], cards: Mapping[str, CardUse]) -> bool:
    return all(
        cards[address].used_bytes <= used + _ALLOWED_BYTES
        for address, used in wanted.items()
        if address in cards
    )
