"""A frozen snapshot of the memory and processors that a model can be placed on."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from shimpy.units import MIB

# What a process takes on a CUDA card besides llama.cpp's buffers, until it is learnt (`overhead`):
# a context of 330 MiB, and 70 more with the first answer; heavy work claims 116 to 166 beyond that.
# Measured on an H200; smaller cards take less.
CUDA_OVERHEAD_BYTES = 402 * MIB
CUDA_WORKSPACE_BYTES = 192 * MIB


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """A device that the installed llama.cpp can use."""

    # llama.cpp's name: "CUDA0", "Vulkan1", "Metal".
    name: str
    description: str
    backend: str
    free_bytes: int
    total_bytes: int
    # What a process takes on the card besides its buffers once it has answered.
    overhead_bytes: int
    # What heavy work may add to that.
    workspace_bytes: int = 0
    # Its memory is the host's own (Apple, integrated GPUs).
    is_shared: bool = False
    # PCI bus id or UUID, to match a llama.cpp device with NVML's.
    device_id: str = ""
    # The driver's version, where it tells.
    driver: str = ""


class UnusableGpu(msgspec.Struct, frozen=True, kw_only=True):
    """A card that is in the machine but that this build of llama.cpp can't use."""

    description: str
    total_bytes: int
    reason: str
    # The command that builds llama-cpp-python for it.
    remedy: str


class Host(msgspec.Struct, frozen=True, kw_only=True):
    """The host's memory as a new process may use it."""

    total_bytes: int
    # MemAvailable, or what the cgroup's limit leaves, whichever is less.
    available_bytes: int
    # RLIMIT_MEMLOCK; None: unlimited. It binds only where no driver locks the memory itself.
    lockable_bytes: int | None
    n_cores: int


class Hardware(msgspec.Struct, frozen=True, kw_only=True):
    """Everything the planner may know of a machine."""

    gpus: tuple[Gpu, ...]
    unusable: tuple[UnusableGpu, ...]
    host: Host
    # Version of llama.cpp and of its bindings; empty: unknown.
    library: str = ""


def suppose(
    actual: Hardware | None, *, vram_bytes: Sequence[int] | None, ram_bytes: int | None
) -> Hardware:
    """Return a machine with so much free memory; what is None is as on the actual one.

    Each entry of `vram_bytes` is a CUDA card; an empty list is a machine without GPU.
    """
    gpus, unusable = (actual.gpus, actual.unusable) if actual else ((), ())
    if vram_bytes is not None:
        unusable = ()
        gpus = tuple(
            Gpu(
                name=f"GPU{i}",
                description="a supposed card",
                backend="CUDA",
                free_bytes=size,
                total_bytes=size,
                overhead_bytes=CUDA_OVERHEAD_BYTES,
                workspace_bytes=CUDA_WORKSPACE_BYTES,
            )
            for i, size in enumerate(vram_bytes)
        )
    host = (
        actual.host
        if actual
        else Host(total_bytes=0, available_bytes=0, lockable_bytes=None, n_cores=1)
    )
    if ram_bytes is not None:
        host = Host(
            total_bytes=ram_bytes,
            available_bytes=ram_bytes,
            lockable_bytes=None,
            n_cores=host.n_cores,
        )
    # Nothing can be simulated on a card that is not there.
    library = actual.library if actual and not vram_bytes else ""
    return Hardware(gpus=gpus, unusable=unusable, host=host, library=library)
