"""Reads what processes hold on NVIDIA's cards, as the driver counts it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from shimpy.placement.cards import CardSources, pci_id


class CardUse(msgspec.Struct, frozen=True, kw_only=True):
    """What is in use on one card, in bytes."""

    used_bytes: int
    # By process id: the host's, which in a container are other ones.
    processes: Mapping[int, int]


def read_cards(sources: CardSources) -> dict[str, CardUse]:
    """Return the use of each card by its PCI address; blocking, about a millisecond.

    Empty where there is no NVML, or no right to ask it.
    """
    # NVML raises an error of its own for each thing that may be missing.
    try:
        nvml = sources.nvml()
        return dict(_cards(nvml))
    except Exception:  # noqa: BLE001 -- then it is just not known
        return {}


def held_by(pid: int, now: CardUse, before: CardUse) -> int | None:
    """Return what a process holds on a card; None: it can't be told.

    `before` is the card as it was when none of our processes was on it. In a container the
    driver counts by other process ids: then a single new one is ours. Where it lists none at
    all, everything new on the card is.
    """
    if pid in now.processes:
        return now.processes[pid]
    new = now.processes.keys() - before.processes.keys()
    if len(new) == 1:
        return now.processes[new.pop()]
    if not now.processes and not before.processes:
        return max(0, now.used_bytes - before.used_bytes)
    return None


def _cards(nvml: Any) -> Iterator[tuple[str, CardUse]]:
    for index in range(nvml.nvmlDeviceGetCount()):
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        bus = nvml.nvmlDeviceGetPciInfo(handle).busId
        processes: dict[int, int] = {}
        for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle):
            # None under drivers that keep it to themselves (WDDM, MIG without rights).
            if process.usedGpuMemory is not None:
                held = processes.get(process.pid, 0)
                processes[process.pid] = held + int(process.usedGpuMemory)
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        address = pci_id(bus.decode() if isinstance(bus, bytes) else bus)
        yield address, CardUse(used_bytes=int(memory.used), processes=processes)
