"""The outcome of planning: a placement, what it costs on each device, and why it was chosen."""

from __future__ import annotations

from typing import Literal

import msgspec

from shimpy.placement.figures import Setup
from shimpy.protocol.messages import KvType, LoadMode

Mode = Literal["gpu", "experts-in-ram", "partial-gpu", "cpu"]
# auto: by free memory; on: all experts in RAM; off: none; a number: those of the first N layers.
CpuMoe = Literal["auto", "on", "off"] | int


class PlanOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What the user asked for; None leaves the choice to the planner."""

    n_ctx: int | None = None
    n_slots: int | None = None
    kv_type: KvType | None = None
    cpu_moe: CpuMoe = "auto"
    # Layers on the GPU (the output layer counts as one); 0 keeps the model off every GPU.
    n_gpu_layers: int | None = None
    n_ubatch: int | None = None
    load_mode: LoadMode | None = None
    flash_attn: bool | None = None


class Placement(msgspec.Struct, frozen=True, kw_only=True):
    """Where each part of a model lives, and the settings that it is loaded with."""

    mode: Mode
    # Counts the output layer as one, as llama.cpp does: n_layers + 1 is everything.
    n_gpu_layers: int
    n_layers: int
    # Experts of the layers before this one are in RAM, llama.cpp's --n-cpu-moe.
    n_cpu_moe: int
    # How many of those layers have experts at all.
    moe_layers_in_ram: int
    # Tokens that all slots share, or that each has for itself where not `kv_unified`.
    n_ctx: int
    n_slots: int
    n_ubatch: int
    load_mode: LoadMode
    kv_type: KvType
    # Off where the CPU computes attention and has the memory to do without.
    flash_attn: bool = True
    kv_unified: bool = True
    # Names of the devices in use, with the share of the layers of each; empty on a CPU.
    devices: tuple[str, ...] = ()
    tensor_split: tuple[float, ...] = ()

    @property
    def held(self) -> str:
        """How the weights in RAM are held, in words; they are page-locked for a GPU alone."""
        if self.load_mode == "mmap":
            return "mapped"
        return "page-locked" if self.devices else "private"


class DeviceUse(msgspec.Struct, frozen=True, kw_only=True):
    """What a placement takes on one device, in bytes."""

    name: str
    free_bytes: int
    weights_bytes: int
    kv_bytes: int
    compute_bytes: int
    # The process's own share: a context on the card, and what appears with the first answer.
    overhead_bytes: int
    # What heavy work may add to that: kept free too.
    workspace_bytes: int = 0
    # Kept free beside it: what a forecast may be off by.
    margin_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """All that the worker takes on this device, once it has answered."""
        return self.weights_bytes + self.kv_bytes + self.compute_bytes + self.overhead_bytes

    @property
    def missing_bytes(self) -> int:
        """How much more than the free memory it needs, its margin counted; 0 when it fits."""
        return max(0, self.most_bytes + self.margin_bytes - self.free_bytes)

    @property
    def most_bytes(self) -> int:
        """All that the worker may come to take on this device."""
        return self.total_bytes + self.workspace_bytes


class HostUse(msgspec.Struct, frozen=True, kw_only=True):
    """What a placement takes in host memory, in bytes."""

    available_bytes: int
    weights_bytes: int
    kv_bytes: int
    compute_bytes: int
    # Weights are page-locked or private: they can't be dropped and read again like a mapped file.
    locked: bool
    # The process itself, and what GPUs that share the host's memory take of it.
    overhead_bytes: int = 0
    # As DeviceUse.margin_bytes.
    margin_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """All that the worker takes in host memory."""
        return self.weights_bytes + self.kv_bytes + self.compute_bytes + self.overhead_bytes

    @property
    def missing_bytes(self) -> int:
        """How much more than the available memory it needs, its margin counted; 0: it fits."""
        return max(0, self.total_bytes + self.margin_bytes - self.available_bytes)


class Rung(msgspec.Struct, frozen=True, kw_only=True):
    """One placement that was weighed, with its costs; `fits` on the hardware it was weighed for."""

    placement: Placement
    devices: tuple[DeviceUse, ...]
    host: HostUse
    fits: bool
    # What is missing where, when it does not fit; else what speaks for or against it.
    reason: str
    # llama.cpp's own simulation says so; else formulas do.
    is_exact: bool = False


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """The planner's answer: the rung it took, if any fits, and all it weighed, best first."""

    chosen: Rung | None
    reason: str
    ladder: tuple[Rung, ...]
    # What exact figures may change the choice, the most wanted first: of the chosen rung, and
    # of better ones that lack little.
    doubts: tuple[Setup, ...] = ()
