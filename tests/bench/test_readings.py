"""What a worker holds on the cards, as a faked NVML tells it, and in RAM."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
from msgspec.structs import replace

from shimpy.bench.readings import Readings
from shimpy.placement.cards import CardSources
from shimpy.placement.hardware import Gpu
from shimpy.units import GIB, MIB
from tests.placement.machines import machine
from tests.placement.test_probe import FakeNvml, NvmlError

PID = 4711


class Nvml(FakeNvml):
    """A FakeNvml that knows processes too, by the card's index."""

    def __init__(self, *cards: tuple[str, int, int]) -> None:
        super().__init__(*cards)
        self.processes: dict[int, dict[int, int | None]] = {}

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> Any:  # noqa: N802
        held = self.processes.get(handle, {})
        return [SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in held.items()]

    def take(self, handle: int, pid: int, size: int | None, *, told: bool = True) -> None:
        bus, free, total = self.cards[handle]
        self.cards[handle] = (bus, free - (size or 0), total)
        self.processes.setdefault(handle, {})[pid] = size if told else None


@pytest.fixture
def nvml() -> Nvml:
    return Nvml(*((f"0000:0{i}:00.0", 20 * GIB, 24 * GIB) for i in range(3)))


def readings(nvml: Nvml, tmp_path: Path, n_gpus: int = 2) -> Readings:
    """Readings of the first cards; another is none of ours."""
    gpus: tuple[Gpu, ...] = tuple(
        replace(gpu, device_id=f"0000:0{i}:00.0")
        for i, gpu in enumerate(machine(*[24] * n_gpus).gpus)
    )
    sources = CardSources(sys=tmp_path, nvml=lambda: nvml, environ={}, system=("Linux", "x86_64"))
    return Readings(gpus, sources, lambda _pid: 3 * GIB)


def test_all_cards_of_the_machine_are_summed(nvml: Nvml, tmp_path: Path) -> None:
    look = readings(nvml, tmp_path)
    nvml.take(0, 1, GIB)
    before = look.baseline()
    nvml.take(0, PID, 5 * GIB)
    nvml.take(1, PID, 2 * GIB)
    nvml.take(2, 99, 8 * GIB)
    reading = look.take(PID, before)
    assert reading.process_bytes == 7 * GIB
    assert reading.card_bytes == 7 * GIB
    assert reading.rss_bytes == 3 * GIB


def test_in_a_container_a_single_new_process_is_the_worker(nvml: Nvml, tmp_path: Path) -> None:
    look = readings(nvml, tmp_path)
    nvml.take(0, 1, GIB)
    before = look.baseline()
    nvml.take(0, 500_000, 5 * GIB)
    assert look.take(PID, before).process_bytes == 5 * GIB
    nvml.take(0, 500_001, 5 * GIB)
    # Two new ones: nobody knows which is ours.
    assert look.take(PID, before).process_bytes is None


def test_what_a_driver_keeps_to_itself_is_unknown(nvml: Nvml, tmp_path: Path) -> None:
    look = readings(nvml, tmp_path)
    before = look.baseline()
    nvml.take(0, PID, 512 * MIB, told=False)
    reading = look.take(PID, before)
    assert (reading.process_bytes, reading.card_bytes) == (None, 512 * MIB)


def test_without_nvml_nothing_is_known_of_the_cards(tmp_path: Path) -> None:
    def missing() -> Any:
        raise NvmlError("Driver Not Loaded")

    (gpu,) = machine(8).gpus
    look = Readings((gpu,), CardSources(sys=tmp_path, nvml=missing, environ={}))
    reading = look.take(os.getpid(), look.baseline())
    assert (reading.process_bytes, reading.card_bytes) == (None, None)
    assert reading.rss_bytes is not None
    assert reading.rss_bytes > 10 * MIB


def test_without_a_gpu_no_driver_is_asked(tmp_path: Path) -> None:
    look = Readings((), CardSources(sys=tmp_path, nvml=lambda: 1 / 0, environ={}))
    assert look.take(os.getpid(), look.baseline()).card_bytes is None


def test_a_worker_that_has_gone_has_no_memory(tmp_path: Path) -> None:
    def gone(pid: int) -> int:
        raise psutil.NoSuchProcess(pid)

    look = Readings((), CardSources(sys=tmp_path, environ={}), gone)
    assert look.take(PID, look.baseline()).rss_bytes is None
