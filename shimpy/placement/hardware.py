"""A frozen snapshot of the memory and processors that a model can be placed on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A device that the installed llama.cpp can use."""

    # llama.cpp's name: "CUDA0", "Vulkan1", "Metal".
    name: str
    description: str
    backend: str
    free_bytes: int
    total_bytes: int
    # What a process costs on the card before its first buffer, and what appears with work.
    overhead_bytes: int
    # Its memory is the host's own (Apple, integrated GPUs).
    is_shared: bool = False
    # PCI bus id or UUID, to match a llama.cpp device with NVML's.
    device_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnusableGpu:
    """A card that is in the machine but that this build of llama.cpp can't use."""

    description: str
    total_bytes: int
    reason: str
    # The command that builds llama-cpp-python for it.
    remedy: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """The host's memory as a new process may use it."""

    total_bytes: int
    # MemAvailable, or what the cgroup's limit leaves, whichever is less.
    available_bytes: int
    # RLIMIT_MEMLOCK, and what may be page-locked at all; None: unlimited.
    lockable_bytes: int | None
    n_cores: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """Everything the planner may know of a machine."""

    gpus: tuple[Gpu, ...]
    unusable: tuple[UnusableGpu, ...]
    host: Host
