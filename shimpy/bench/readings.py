"""Reads what a worker holds: on the cards by NVML and amdgpu, in RAM by its process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

import msgspec
import psutil  # type: ignore[import-untyped]

from shimpy.bench.results import Reading
from shimpy.placement.cards import Card, CardSources, pci_id, probe_cards
from shimpy.placement.hardware import Gpu
from shimpy.placement.usage import read_cards


class Baseline(msgspec.Struct, frozen=True):
    """The cards before a worker is started."""

    used_bytes: Mapping[str, int]
    pids: frozenset[int]


class Readings(msgspec.Struct, frozen=True):
    """Reads the cards that a machine's GPUs are on; every method blocks for a millisecond."""

    gpus: tuple[Gpu, ...]
    sources: CardSources = msgspec.field(default_factory=CardSources)
    rss_of: Callable[[int], int] = lambda pid: int(psutil.Process(pid).memory_info().rss)

    def baseline(self) -> Baseline:
        """Return what is in use before a worker starts."""
        return Baseline(self._used(), frozenset(self._processes()))

    def take(self, pid: int, before: Baseline) -> Reading:
        """Return what a worker holds, by its process id and what was in use before it."""
        used = self._used()
        grown = [used[card] - before.used_bytes[card] for card in used if card in before.used_bytes]
        try:
            rss = self.rss_of(pid)
        except psutil.Error:
            rss = None
        return Reading(
            process_bytes=self._process_bytes(pid, before),
            card_bytes=sum(grown) if grown else None,
            rss_bytes=rss,
        )

    def _used(self) -> dict[str, int]:
        """Return the bytes in use of each card whose driver tells, by its PCI address."""
        if not self.gpus:
            return {}
        wanted = {pci_id(gpu.device_id) for gpu in self.gpus}
        return {
            card.device_id: _used_bytes(card)
            for card in probe_cards(self.sources)
            if card.device_id in wanted and card.free_bytes is not None
        }

    def _process_bytes(self, pid: int, before: Baseline) -> int | None:
        held = self._processes()
        if pid in held:
            return held[pid]
        # In a container the driver counts by the host's process ids: a single new one is ours.
        new = held.keys() - before.pids
        return held[new.pop()] if len(new) == 1 else None

    def _processes(self) -> dict[int, int]:
        """Return the bytes that each process holds on the cards, by NVML; empty: unknown."""
        if not self.gpus:
            return {}
        wanted = {pci_id(gpu.device_id) for gpu in self.gpus}
        held: Counter[int] = Counter()
        for address, use in read_cards(self.sources).items():
            if address in wanted:
                held.update(use.processes)
        return dict(held)


def _used_bytes(card: Card) -> int:
    return card.total_bytes - (card.free_bytes or 0)
