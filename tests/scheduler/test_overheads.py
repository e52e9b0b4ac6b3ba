"""What workers take on a card beside their buffers: read, learnt, kept, and planned with."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from shimpy.placement.cards import CardSources
from shimpy.placement.hardware import Hardware
from shimpy.placement.overhead import Learnt, learn, with_learnt
from shimpy.placement.placement import PlanOptions
from shimpy.placement.planner import plan_model
from shimpy.protocol.messages import BufferUse
from shimpy.scheduler.overheads import Overheads
from shimpy.units import GIB, MIB
from tests.placement.machines import machine, model
from tests.scheduler.workshop import FakeClock

ADDRESS = "0000:41:00.0"
MEMORY = [
    BufferUse("CUDA0", 700 * MIB, 200 * MIB, 100 * MIB),
    BufferUse("CPU", 9000 * MIB, 0, 10 * MIB),
]
BUFFERS = 1000 * MIB


@dataclass
class Nvml:
    """A driver with one card, on which processes hold memory."""

    processes: dict[int, int | None] = field(default_factory=dict)
    other_bytes: int = 0
    is_broken: bool = False

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        if self.is_broken:
            raise RuntimeError("GPU is lost")
        return 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetPciInfo(self, _handle: int) -> Any:  # noqa: N802
        return SimpleNamespace(busId=f"0000{ADDRESS}".encode())

    def nvmlDeviceGetMemoryInfo(self, _handle: int) -> Any:  # noqa: N802
        return SimpleNamespace(used=self.other_bytes + sum(filter(None, self.processes.values())))

    def nvmlDeviceGetComputeRunningProcesses(self, _handle: int) -> list[Any]:  # noqa: N802
        return [SimpleNamespace(pid=p, usedGpuMemory=n) for p, n in self.processes.items()]


def card_machine(*, driver: str = "570.1") -> Hardware:
    hardware = machine(8)
    gpu = replace(hardware.gpus[0], device_id=ADDRESS, driver=driver, workspace_bytes=160 * MIB)
    return replace(hardware, gpus=(gpu,), library="b1")


def overheads_of(nvml: Nvml, path: Path | None = None, clock: FakeClock | None = None) -> Overheads:
    sources = CardSources(nvml=lambda: nvml)
    return Overheads(path, sources=sources, clock=(clock or FakeClock()).now)


def applied(overheads: Overheads, hardware: Hardware) -> tuple[int, int]:
    (gpu,) = overheads.applied(hardware).gpus
    return gpu.overhead_bytes // MIB, gpu.workspace_bytes // MIB


def test_an_overhead_is_learnt_and_kept(tmp_path: Path) -> None:
    nvml, hardware, path = Nvml({7: 50 * MIB}), card_machine(), tmp_path / "state" / "o.json"
    overheads = overheads_of(nvml, path)
    assert applied(overheads, hardware) == (740, 160)
    overheads.look()
    nvml.processes[99] = BUFFERS + 310 * MIB

    assert overheads.read(99, "CUDA0", MEMORY, hardware) == 310 * MIB

    assert applied(overheads, hardware) == (310, 160)
    assert applied(overheads_of(Nvml(), path), hardware) == (310, 160)
    # Another driver may take more or less.
    assert applied(overheads, card_machine(driver="580.2")) == (740, 160)


def test_work_raises_what_is_kept_free() -> None:
    nvml, hardware, clock = Nvml(), card_machine(), FakeClock()
    overheads = overheads_of(nvml, clock=clock)
    overheads.look()
    nvml.processes[99] = BUFFERS + 600 * MIB
    overheads.read(99, "CUDA0", MEMORY, hardware)
    assert not overheads.is_due(99)
    assert overheads.is_due(100)
    clock.advance(11)
    assert overheads.is_due(99)
    nvml.processes[99] = BUFFERS + 850 * MIB

    overheads.read(99, "CUDA0", MEMORY, hardware)

    assert applied(overheads, hardware) == (600, 250)


def test_a_container_has_other_process_ids() -> None:
    """A single new process is the worker; of two nobody knows which."""
    nvml, hardware = Nvml({7: 50 * MIB}), card_machine()
    overheads = overheads_of(nvml)
    overheads.look()
    nvml.processes[40123] = BUFFERS + 320 * MIB
    assert overheads.read(99, "CUDA0", MEMORY, hardware) == 320 * MIB
    nvml.processes[40124] = 9 * GIB
    assert overheads.read(99, "CUDA0", MEMORY, hardware) is None


def test_where_no_process_is_listed_the_card_tells() -> None:
    nvml, hardware = Nvml(other_bytes=100 * MIB), card_machine()
    overheads = overheads_of(nvml)
    overheads.look()
    nvml.other_bytes += BUFFERS + 330 * MIB
    assert overheads.read(99, "CUDA0", MEMORY, hardware) == 330 * MIB


@pytest.mark.parametrize(
    ("nvml", "device"),
    [
        pytest.param(Nvml(is_broken=True), "CUDA0", id="no-driver"),
        pytest.param(Nvml({99: None}), "CUDA0", id="not-told"),
        pytest.param(Nvml({99: BUFFERS - 1}), "CUDA0", id="less-than-its-buffers"),
        pytest.param(Nvml({99: BUFFERS}), "CUDA1", id="another-device"),
    ],
)
def test_what_can_not_be_read_changes_nothing(nvml: Nvml, device: str) -> None:
    hardware = card_machine()
    overheads = overheads_of(nvml)
    overheads.look()
    assert overheads.read(99, device, MEMORY, hardware) is None
    assert applied(overheads, hardware) == (740, 160)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"cards":{"a":{"most":"x"}}}'])
def test_a_file_that_cannot_be_read_is_as_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "o.json"
    path.write_bytes(content)
    assert applied(overheads_of(Nvml(), path), card_machine()) == (740, 160)


@given(
    st.lists(st.tuples(st.integers(-GIB, 9 * GIB), st.booleans()), max_size=40),
    st.integers(0, GIB),
)
def test_what_is_learnt_is_bounded_and_covers_what_was_seen(
    readings: list[tuple[int, bool]], workspace: int
) -> None:
    learnt = Learnt()
    for overhead, is_first in readings:
        learnt = learn(learnt, overhead, is_first=is_first)
    gpu = replace(card_machine().gpus[0], workspace_bytes=workspace)
    seen = with_learnt(gpu, learnt)
    sane = [(n, is_first) for n, is_first in readings if 0 <= n <= 4 * GIB]
    firsts = [n for n, is_first in sane if is_first]
    assert len(learnt.answered) <= 9
    assert seen.workspace_bytes >= workspace
    if not firsts:
        assert seen == gpu
        return
    assert min(firsts) <= seen.overhead_bytes <= max(firsts)
    assert seen.overhead_bytes + seen.workspace_bytes >= max(n for n, _ in sane)


def test_one_spoilt_reading_does_no_harm() -> None:
    learnt = Learnt()
    for overhead in (600, 601, 3000, 602, 599):
        learnt = learn(learnt, overhead * MIB, is_first=True)
    assert with_learnt(card_machine().gpus[0], learnt).overhead_bytes == 601 * MIB


def test_a_plan_predicts_the_overhead_and_keeps_the_workspace_free() -> None:
    plan = plan_model(model(), card_machine(), PlanOptions(n_ctx=4096))
    assert plan.chosen is not None
    (device,) = plan.chosen.devices
    parts = device.weights_bytes + device.kv_bytes + device.compute_bytes
    page_table = plan.chosen.host.weights_bytes // 512
    assert device.total_bytes == parts + 740 * MIB + page_table
    assert device.total_bytes + 160 * MIB + device.margin_bytes <= device.free_bytes
