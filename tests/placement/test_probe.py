"""Snapshots of machines that are faked file by file: /proc, /sys, NVML and llama.cpp's answer."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec.structs import replace

from shimpy.errors import WorkerError
from shimpy.placement.cards import Card, CardSources, pci_id, probe_cards, visible_nvidia
from shimpy.placement.host import HostSources, probe_host
from shimpy.placement.probe import Prober, Sources, ask_worker, probe_hardware
from shimpy.protocol.messages import BuildInfo, DeviceInfo
from shimpy.units import GIB, MIB


class NvmlError(Exception):
    """pynvml.NVMLError."""


class FakeNvml:
    """As much of pynvml as is used, over cards given as (busId, free, total)."""

    NVMLError = NvmlError

    def __init__(self, *cards: tuple[str, int, int]) -> None:
        self.cards = list(cards)
        self.lost: set[int] = set()

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        if index in self.lost:
            raise NvmlError("GPU is lost")
        return index

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:  # noqa: N802
        _, free, total = self.cards[handle]
        return SimpleNamespace(free=free, total=total, used=total - free)

    def nvmlDeviceGetName(self, handle: int) -> bytes:  # noqa: N802
        return f"NVIDIA {handle}".encode()

    def nvmlDeviceGetPciInfo(self, handle: int) -> Any:  # noqa: N802
        return SimpleNamespace(busId=self.cards[handle][0].encode())

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        return "570.1"

    def nvmlDeviceGetUUID(self, handle: int) -> str:  # noqa: N802
        return f"GPU-{handle}abc"


def no_nvml() -> Any:
    raise NvmlError("Driver Not Loaded")


def cuda(index: int, device_id: str, *, free: int = 20 * GIB, total: int = 24 * GIB) -> DeviceInfo:
    return DeviceInfo(
        name=f"CUDA{index}",
        description=f"NVIDIA {index}",
        kind="gpu",
        backend="CUDA",
        free_bytes=free,
        total_bytes=total,
        device_id=device_id,
    )


CPU = DeviceInfo("CPU", "a processor", "cpu", "CPU", 1, 1)


def build(*devices: DeviceInfo) -> BuildInfo:
    return BuildInfo(llama_cpp="0.3.36", devices=[CPU, *devices], supports_gpu_offload=True)


@pytest.fixture
def host(tmp_path: Path) -> HostSources:
    """A host of 64 GiB, 60 available, 8 processors on 4 cores, in no control group."""
    return HostSources(
        proc=tmp_path / "proc",
        sys=tmp_path / "sys",
        memory=lambda: (64 * GIB, 60 * GIB),
        memlock=lambda: None,
        affinity=lambda: frozenset(range(8)),
    )


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def prober(
    tmp_path: Path,
    host: HostSources,
    list_devices: Callable[[], BuildInfo],
    *,
    nvml: Callable[[], Any] = no_nvml,
    environ: dict[str, str] | None = None,
    clock: Callable[[], float] = lambda: 0.0,
) -> Prober:
    cards = CardSources(
        sys=tmp_path / "sys", nvml=nvml, environ=environ or {}, system=("Linux", "x86_64")
    )
    return Prober(Sources(list_devices=list_devices, cards=cards, host=host, clock=clock))


# --- the host -------------------------------------------------------------------------------


def test_without_a_control_group_the_kernels_figure_counts(host: HostSources) -> None:
    found = probe_host(host, reserve_bytes=GIB)
    assert (found.total_bytes, found.available_bytes) == (64 * GIB, 59 * GIB)
    assert found.lockable_bytes is None


def test_a_container_is_bound_by_its_limit_less_what_it_uses(
    tmp_path: Path, host: HostSources
) -> None:
    """cgroup v2; the page cache counts as usage but is given back before a process is killed."""
    write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/pod/app\n",
            "sys/fs/cgroup/pod/app/memory.max": f"{16 * GIB}\n",
            "sys/fs/cgroup/pod/app/memory.current": f"{10 * GIB}\n",
            "sys/fs/cgroup/pod/app/memory.stat": f"anon 1\nactive_file {GIB}\ninactive_file {GIB}",
        },
    )
    found = probe_host(host)
    assert (found.total_bytes, found.available_bytes) == (16 * GIB, 8 * GIB)


def test_a_parent_group_binds_too(tmp_path: Path, host: HostSources) -> None:
    """A service without a limit in a slice that has one; memory.high throttles before max."""
    write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/system.slice/shimpy.service\n",
            "sys/fs/cgroup/system.slice/shimpy.service/memory.max": "max\n",
            "sys/fs/cgroup/system.slice/shimpy.service/memory.current": "0\n",
            "sys/fs/cgroup/system.slice/memory.max": f"{40 * GIB}\n",
            "sys/fs/cgroup/system.slice/memory.high": f"{32 * GIB}\n",
            "sys/fs/cgroup/system.slice/memory.current": f"{2 * GIB}\n",
        },
    )
    assert probe_host(host).available_bytes == 30 * GIB


def test_the_first_version_of_control_groups_binds_as_well(
    tmp_path: Path, host: HostSources
) -> None:
    """In a container the path is the host's, and only the root is mounted."""
    write(
        tmp_path,
        {
            "proc/self/cgroup": "7:cpu,cpuacct:/docker/abc\n5:memory:/docker/abc\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{8 * GIB}\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{3 * GIB}\n",
            "sys/fs/cgroup/memory/memory.stat": f"inactive_file 5\ntotal_inactive_file {GIB}\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "150000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
    )
    found = probe_host(host)
    assert found.available_bytes == 6 * GIB
    assert found.n_cores == 2


def test_an_unlimited_group_of_the_first_version_binds_nothing(
    tmp_path: Path, host: HostSources
) -> None:
    write(
        tmp_path,
        {
            "proc/self/cgroup": "5:memory:/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "1000\n",
        },
    )
    assert probe_host(host).available_bytes == 60 * GIB


def test_more_used_than_allowed_is_nothing_available(tmp_path: Path, host: HostSources) -> None:
    write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/memory.max": f"{GIB}\n",
            "sys/fs/cgroup/memory.current": f"{2 * GIB}\n",
        },
    )
    assert probe_host(host).available_bytes == 0


def test_two_threads_of_a_core_are_one_core(tmp_path: Path, host: HostSources) -> None:
    """Processors 0 and 4 share core 0, and so on; llama.cpp gains nothing by the second."""
    cpu = "sys/devices/system/cpu"
    for number in range(8):
        write(
            tmp_path,
            {
                f"{cpu}/cpu{number}/topology/core_id": f"{number % 4}\n",
                f"{cpu}/cpu{number}/topology/physical_package_id": "0\n",
            },
        )
    assert probe_host(host).n_cores == 4
    pinned = replace(host, affinity=lambda: frozenset((0, 4)))
    assert probe_host(pinned).n_cores == 1


def test_a_quota_bounds_the_cores(tmp_path: Path, host: HostSources) -> None:
    write(
        tmp_path,
        {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "250000 100000\n"},
    )
    assert probe_host(host).n_cores == 3


def test_the_lock_limit_is_told(host: HostSources) -> None:
    assert probe_host(replace(host, memlock=lambda: 8 * MIB)).lockable_bytes == 8 * MIB


# --- devices and cards ----------------------------------------------------------------------


def test_free_memory_comes_from_nvml_by_the_bus_address(tmp_path: Path, host: HostSources) -> None:
    """NVML's order is another than CUDA's: only the address tells which card is which."""
    nvml = FakeNvml(
        ("00000000:41:00.0", 3 * GIB, 24 * GIB), ("00000000:01:00.0", 9 * GIB, 24 * GIB)
    )
    snapshot = prober(
        tmp_path,
        host,
        lambda: build(cuda(0, "0000:01:00.0"), cuda(1, "0000:41:00.0")),
        nvml=lambda: nvml,
    ).probe(reserve_vram=GIB, reserve_ram=GIB)
    assert [(gpu.name, gpu.free_bytes) for gpu in snapshot.gpus] == [
        ("CUDA0", 8 * GIB),
        ("CUDA1", 2 * GIB),
    ]
    assert snapshot.unusable == ()
    assert snapshot.host.available_bytes == 59 * GIB
    assert {gpu.overhead_bytes + gpu.workspace_bytes for gpu in snapshot.gpus} == {594 * MIB}


def test_llama_cpp_is_asked_once_where_a_driver_tells_the_rest(
    tmp_path: Path, host: HostSources
) -> None:
    """Asking it takes 0.3 s, and memory on each card."""
    asked: list[int] = []
    nvml = FakeNvml(("0000:01:00.0", 9 * GIB, 24 * GIB))

    def list_devices() -> BuildInfo:
        asked.append(1)
        return build(cuda(0, "0000:01:00.0"))

    taker = prober(tmp_path, host, list_devices, nvml=lambda: nvml)
    taker.probe()
    nvml.cards[0] = ("0000:01:00.0", 5 * GIB, 24 * GIB)
    assert taker.probe().gpus[0].free_bytes == 5 * GIB
    assert len(asked) == 1


def test_llama_cpp_is_asked_again_where_no_driver_tells(tmp_path: Path, host: HostSources) -> None:
    answers = iter([7 * GIB, 5 * GIB])

    def list_devices() -> BuildInfo:
        vulkan = DeviceInfo("Vulkan0", "Arc", "gpu", "Vulkan", next(answers), 8 * GIB)
        return build(vulkan)

    taker = prober(tmp_path, host, list_devices)
    assert taker.probe().gpus[0].free_bytes == 7 * GIB
    assert taker.probe().gpus[0].free_bytes == 5 * GIB


def test_a_slice_of_a_card_is_not_taken_for_the_whole(tmp_path: Path, host: HostSources) -> None:
    """NVML tells of the whole card what a MIG slice of it has not."""
    nvml = FakeNvml(("0000:01:00.0", 70 * GIB, 80 * GIB))
    slice_ = cuda(0, "0000:01:00.0", free=9 * GIB, total=10 * GIB)
    taker = prober(tmp_path, host, lambda: build(slice_), nvml=lambda: nvml)
    assert taker.probe().gpus[0].free_bytes == 9 * GIB


def test_an_amd_card_tells_its_memory_in_sysfs(tmp_path: Path, host: HostSources) -> None:
    add_card(tmp_path, "card0", "0000:03:00.0", "0x1002", vram=(16 * GIB, 3 * GIB))
    rocm = DeviceInfo("ROCm0", "Radeon", "gpu", "ROCm", 1, 16 * GIB, "0000:03:00.0")
    found = prober(tmp_path, host, lambda: build(rocm)).probe()
    assert found.gpus[0].free_bytes == 13 * GIB
    assert found.unusable == ()


def test_a_card_that_two_backends_offer_is_one(tmp_path: Path, host: HostSources) -> None:
    vulkan = DeviceInfo("Vulkan0", "NVIDIA 0", "gpu", "Vulkan", 1, 24 * GIB, "0000:01:00.0")
    found = prober(tmp_path, host, lambda: build(vulkan, cuda(0, "0000:01:00.0"))).probe()
    assert [gpu.name for gpu in found.gpus] == ["CUDA0"]


@pytest.mark.parametrize(
    ("kind", "backend", "is_shared"),
    [("gpu", "CUDA", False), ("igpu", "Vulkan", True), ("gpu", "Metal", True)],
)
def test_memory_that_is_the_hosts_is_marked(
    tmp_path: Path, host: HostSources, kind: Any, backend: str, *, is_shared: bool
) -> None:
    device = DeviceInfo("X0", "x", kind, backend, GIB, GIB)
    assert prober(tmp_path, host, lambda: build(device)).probe().gpus[0].is_shared is is_shared


def add_card(
    tmp_path: Path, name: str, address: str, vendor: str, *, vram: tuple[int, int] | None = None
) -> None:
    """Add a card to the faked /sys; `vram` is total and used bytes."""
    device = tmp_path / "sys/devices/pci" / address
    write(device, {"vendor": f"{vendor}\n", "class": "0x030000\n"})
    if vram:
        write(device, {"mem_info_vram_total": f"{vram[0]}\n", "mem_info_vram_used": f"{vram[1]}\n"})
    folder = tmp_path / "sys/class/drm" / name
    folder.mkdir(parents=True)
    (folder / "device").symlink_to(device)


@pytest.mark.parametrize(
    ("vendor", "flag"), [("0x10de", "CUDA"), ("0x1002", "HIP"), ("0x8086", "VULKAN")]
)
def test_a_card_that_the_build_can_not_use_is_named_with_its_remedy(
    tmp_path: Path, host: HostSources, vendor: str, flag: str
) -> None:
    add_card(tmp_path, "card1", "0000:03:00.0", vendor)
    found = prober(tmp_path, host, build).probe()
    (card,) = found.unusable
    assert found.gpus == ()
    assert "0000:03:00.0" in card.description
    assert "this build of llama.cpp has no" in card.reason
    assert card.remedy == (
        f'CMAKE_ARGS="-DGGML_{flag}=on" pip install --force-reinstall --no-cache-dir '
        "--no-binary llama-cpp-python llama-cpp-python~=0.3.36"
    )


def test_nvml_names_its_cards_better_than_sysfs(tmp_path: Path, host: HostSources) -> None:
    add_card(tmp_path, "card1", "0000:01:00.0", "0x10de")
    nvml = FakeNvml(("00000000:01:00.0", 20 * GIB, 24 * GIB))
    (card,) = prober(tmp_path, host, build, nvml=lambda: nvml).probe().unusable
    assert (card.description, card.total_bytes) == ("NVIDIA 0", 24 * GIB)


@pytest.mark.parametrize(
    ("address", "vendor", "vram"),
    [
        ("0000:00:02.0", "0x8086", None),
        ("0000:05:00.0", "0x1002", (512 * MIB, MIB)),
        ("0000:00:01.0", "0x1af4", None),
    ],
    ids=["intel-integrated", "amd-integrated", "virtual"],
)
def test_display_adapters_are_no_cards(
    tmp_path: Path,
    host: HostSources,
    address: str,
    vendor: str,
    vram: tuple[int, int] | None,
) -> None:
    """Every server has one; to advise a rebuild for it would be noise."""
    add_card(tmp_path, "card0", address, vendor, vram=vram)
    assert prober(tmp_path, host, build).probe().unusable == ()


def test_hidden_cards_are_hidden_on_purpose(tmp_path: Path, host: HostSources) -> None:
    nvml = FakeNvml(("0000:01:00.0", GIB, 24 * GIB), ("0000:02:00.0", GIB, 24 * GIB))
    found = prober(
        tmp_path,
        host,
        lambda: build(cuda(0, "0000:02:00.0")),
        nvml=lambda: nvml,
        environ={"CUDA_VISIBLE_DEVICES": "1"},
    ).probe()
    assert [gpu.device_id for gpu in found.gpus] == ["0000:02:00.0"]
    assert found.unusable == ()


def test_a_card_that_cuda_does_not_list_is_told_apart_from_no_cuda(
    tmp_path: Path, host: HostSources
) -> None:
    nvml = FakeNvml(("0000:01:00.0", GIB, 24 * GIB), ("0000:02:00.0", GIB, 24 * GIB))
    found = prober(
        tmp_path, host, lambda: build(cuda(0, "0000:02:00.0")), nvml=lambda: nvml
    ).probe()
    (card,) = found.unusable
    assert "does not list it" in card.reason


def test_a_card_that_is_lost_is_left_out(tmp_path: Path, host: HostSources) -> None:
    nvml = FakeNvml(("0000:01:00.0", GIB, 24 * GIB), ("0000:02:00.0", 2 * GIB, 24 * GIB))
    nvml.lost = {0}
    cards = probe_cards(CardSources(sys=tmp_path, nvml=lambda: nvml, system=("Linux", "x86_64")))
    assert [card.device_id for card in cards] == ["0000:02:00.0"]


def test_when_llama_cpp_can_not_be_asked_the_host_is_still_known(
    tmp_path: Path, host: HostSources
) -> None:
    """The card is named with the reason; it is asked again after a while, not at each request."""
    now, asked = [0.0], []
    nvml = FakeNvml(("0000:01:00.0", GIB, 24 * GIB))

    def list_devices() -> BuildInfo:
        asked.append(now[0])
        if now[0] < 100:
            raise WorkerError("llama.cpp could not list its devices: libcuda.so.1 is missing")
        return build(cuda(0, "0000:01:00.0"))

    taker = prober(tmp_path, host, list_devices, nvml=lambda: nvml, clock=lambda: now[0])
    first = taker.probe()
    assert first.gpus == ()
    assert "libcuda.so.1 is missing" in first.unusable[0].reason
    assert first.host.total_bytes == 64 * GIB
    now[0] = 30
    taker.probe()
    assert asked == [0.0]
    now[0] = 120
    assert [gpu.name for gpu in taker.probe().gpus] == ["CUDA0"]


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("00000000:41:00.0", "0000:41:00.0"),
        ("0000:3B:00.0", "0000:3b:00.0"),
        ("01:00.0", "0000:01:00.0"),
        ("GPU-1234", ""),
        ("", ""),
    ],
)
def test_bus_addresses_compare_however_they_are_written(text: str, address: str) -> None:
    assert pci_id(text) == address


CARDS = tuple(Card(vendor="nvidia", description=f"card {i}", uuid=f"GPU-{i}abc") for i in range(3))


@pytest.mark.parametrize(
    ("value", "visible"),
    [
        (None, [0, 1, 2]),
        ("", []),
        ("2,0", [2, 0]),
        ("GPU-1", [1]),
        ("0,7,1", [0]),
        ("-1", []),
        ("GPU-", []),
    ],
    ids=str,
)
def test_cuda_visible_devices_is_read_as_cuda_reads_it(
    value: str | None, visible: list[int]
) -> None:
    environ = {} if value is None else {"CUDA_VISIBLE_DEVICES": value}
    assert visible_nvidia(CARDS, environ) == tuple(CARDS[i] for i in visible)


# --- the worker -----------------------------------------------------------------------------


def test_this_build_of_llama_cpp_can_be_asked() -> None:
    """The real engine in a real process: it lists at least the processor."""
    info = ask_worker()
    assert any(device.kind == "cpu" for device in info.devices)
    assert info.llama_cpp


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import sys; sys.exit('libcuda.so.1: cannot open')", "libcuda.so.1: cannot open"),
        ("import sys; sys.exit(3)", "exit status 3.*it said nothing"),
        ("print('{}')", "can't be read"),
        ("import time; time.sleep(60)", "timed out"),
    ],
    ids=["message", "silent", "garbage", "hangs"],
)
def test_a_worker_that_fails_says_how(code: str, message: str) -> None:
    with pytest.raises(WorkerError, match=message):
        ask_worker([sys.executable, "-c", code], timeout_s=0.5 if "sleep" in code else 30)


def test_this_machine_can_be_probed() -> None:
    snapshot = probe_hardware(reserve_ram=MIB)
    assert 0 < snapshot.host.available_bytes <= snapshot.host.total_bytes
    assert snapshot.host.n_cores >= 1
