"""Weighs single placements of one model on one machine: what each takes, and whether it fits.

Pure. `planner` asks it for rung after rung; it knows the devices, the margins and how layers
are shared out among several GPUs, but not which placement is better than another.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Final

import msgspec
from msgspec.structs import replace

from shimpy.gguf.arch import ModelShape
from shimpy.placement.defaults import N_SLOTS_APART, N_SLOTS_CPU, Streaming, default_ubatch
from shimpy.placement.figures import NO_FIGURES, Figures, Setup
from shimpy.placement.hardware import Gpu, Hardware
from shimpy.placement.memory import Context, Layout, MemoryModel, MemoryUse, kv_layer_bytes
from shimpy.placement.placement import (
    DeviceUse,
    HostUse,
    Mode,
    Placement,
    PlanOptions,
    Rung,
)
from shimpy.placement.reasons import exceeds_lock_limit
from shimpy.protocol.messages import KvType
from shimpy.units import MIB

# Stays free whatever the figures say: drivers round up, and share a card.
SAFETY_BYTES: Final = 64 * MIB
# And a tenth of a compute buffer that a formula tells; docs/placement.md has its errors.
_COMPUTE_SAFETY: Final = 10
# A rung that lacks no more than this by formula may fit after all. The formulas are up to 54 MiB
# too high with all layers on one card, and up to 267 MiB otherwise.
_DOUBT_BYTES: Final = 128 * MIB
_PARTIAL_DOUBT_BYTES: Final = 320 * MIB
# Each costs a simulation: the closest are enough.
_MAX_DOUBTS: Final = 4
# A worker process: the interpreter with llama.cpp, and its scratch memory (measured: 40 MB idle).
PROCESS_BYTES: Final = 96 * MIB
# The CUDA runtime's own host memory in a process that uses a GPU.
GPU_PROCESS_BYTES: Final = 256 * MIB
# Page-locked memory can't be taken back: a sixteenth of the RAM stays free beside it.
_LOCKED_SLACK: Final = 16
# CUDA maps page-locked memory for the card too: 8 bytes of its VRAM for each page of 4 KiB. Seen
# on an H200: 5, 11, 17 and 21 MiB for 2.4, 5.1, 7.9 and 9.2 GiB; the driver counts it for the
# card, not for the process.
_PAGE_TABLE_SHARE: Final = 512
_F32: Final = 4
# On CPUs plain attention decodes 1.2 times as fast as llama.cpp's flash attention at depth 500
# and 1.7 to 2.4 times at 2000; prefill is 0.8 to 0.9 times as fast at first and 0.6 to 0.9 from
# 500 to 2000 (docs/performance.md). Decode is what people wait for, and prefixes are reused. It
# keeps a score for each token of a micro-batch and cell: plain attention is taken where that is
# no more than this part of the free RAM.
_PLAIN_SHARE: Final = 16
# It also goes over all cells in use, whoever holds them: with 8 slots of 1024 tokens in one cache
# a prompt takes 5.4 times as long as with cells for each, and a step 1.5 times. Each slot gets as
# many as all would share where they take no more than this part of the RAM that is free beside
# the weights.
_APART_SHARE: Final = 8
# A quantized V cache can only be read by flash attention.
PLAIN_KV: Final = ("f32", "f16", "bf16")

Team = tuple[Gpu, ...]


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of a placement that do not say where its layers are."""

    n_ctx: int
    n_slots: int
    streaming: Streaming
    kv_type: KvType


class _Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """What a setup takes, and whether llama.cpp itself says so."""

    setup: Setup
    use: MemoryUse
    is_exact: bool


class Search:
    """Builds and weighs rungs; one per plan."""

    def __init__(
        self,
        shape: ModelShape,
        hardware: Hardware,
        options: PlanOptions,
        figures: Figures = NO_FIGURES,
    ) -> None:
        self.shape = shape
        self.hardware = hardware
        self.options = options
        self.memory = MemoryModel(shape)
        self.teams = _teams(hardware.gpus)
        self.n_all = shape.n_layer + 1
        self.moe_layers = shape.moe_layers
        # By number of GPUs, offloaded layers, layers with experts in RAM, and the context.
        self._estimates: dict[tuple[int, int, int, Context], _Estimate] = {}
        self._figures = figures
        # What was weighed by formula and lacks little, with how much.
        self._doubts: dict[Setup, int] = {}

    def rung(
        self, mode: Mode, team: Team, n_gpu_layers: int, n_cpu_moe: int, settings: Settings
    ) -> Rung:
        """Return the rung of a layout, with the best split where the team is several GPUs."""
        context = self._context(settings)
        for plain in () if team else self._plain_contexts(context):
            rung = self._weigh(
                mode, team, n_gpu_layers, n_cpu_moe, settings=settings, context=plain
            )
            if rung.fits:
                return rung
        return self._weigh(mode, team, n_gpu_layers, n_cpu_moe, settings=settings, context=context)

    def _weigh(
        self,
        mode: Mode,
        team: Team,
        n_gpu_layers: int,
        n_cpu_moe: int,
        *,
        settings: Settings,
        context: Context,
    ) -> Rung:
        estimate = self._estimate(team, n_gpu_layers, n_cpu_moe, context)
        layout = estimate.setup.layout
        devices = self._device_uses(team, estimate, settings)
        host = self._host_use(team, devices, estimate, settings)
        placement = Placement(
            mode=mode,
            n_gpu_layers=n_gpu_layers if team else 0,
            n_layers=self.shape.n_layer,
            n_cpu_moe=n_cpu_moe,
            moe_layers_in_ram=sum(index < n_cpu_moe for index in self.moe_layers),
            n_ctx=context.n_ctx,
            n_slots=context.n_slots,
            n_ubatch=context.n_ubatch,
            load_mode=settings.streaming.load_mode,
            kv_type=context.kv_type,
            flash_attn=context.flash_attn,
            kv_unified=context.kv_unified,
            devices=tuple(gpu.name for gpu in team),
            tensor_split=layout.split if len(team) > 1 else (),
        )
        fits = not host.missing_bytes and not any(device.missing_bytes for device in devices)
        if not fits:
            self._doubt(estimate, [host.missing_bytes, *(d.missing_bytes for d in devices)])
        fits = fits and not exceeds_lock_limit(self.hardware, placement, host)
        return Rung(
            placement=placement,
            devices=devices,
            host=host,
            fits=fits,
            reason="",
            is_exact=estimate.is_exact,
        )

    def doubts(self, chosen: Rung | None) -> tuple[Setup, ...]:
        """Return what exact figures are wanted of, given the choice, the most wanted first."""
        close = sorted(self._doubts, key=self._doubts.__getitem__)
        if chosen is not None and not chosen.is_exact:
            close.insert(0, setup_of(chosen.placement))
        return tuple(close[:_MAX_DOUBTS])

    def gpus_have_room(
        self, team: Team, n_gpu_layers: int, n_cpu_moe: int, settings: Settings
    ) -> bool:
        """Whether every GPU of a team has room for a layout, the host aside."""
        context = self._context(settings)
        estimate = self._estimate(team, n_gpu_layers, n_cpu_moe, context)
        missing = [device.missing_bytes for device in self._device_uses(team, estimate, settings)]
        if not any(missing):
            return True
        self._doubt(estimate, missing)
        return False

    def _estimate(
        self, team: Team, n_gpu_layers: int, n_cpu_moe: int, context: Context
    ) -> _Estimate:
        key = (len(team), n_gpu_layers, n_cpu_moe, context)
        found = self._estimates.get(key)
        if found is None:
            split = self._split(team, n_gpu_layers, n_cpu_moe, context)
            layout = Layout(n_gpu_layers=n_gpu_layers, n_cpu_moe=n_cpu_moe, split=split)
            setup = Setup(devices=_names(team), layout=layout, context=context)
            exact = self._figures.get(setup)
            use = exact or self.memory.estimate(layout, context)
            found = _Estimate(setup=setup, use=use, is_exact=exact is not None)
            self._estimates[key] = found
        return found

    def _doubt(self, estimate: _Estimate, missing: Sequence[int]) -> None:
        """Remember what lacks so little that an exact figure might show that it fits."""
        setup = estimate.setup
        is_plain = len(setup.devices) <= 1 and setup.layout.n_gpu_layers in {0, self.n_all}
        limit = _DOUBT_BYTES if is_plain else _PARTIAL_DOUBT_BYTES
        if not estimate.is_exact and max(missing) <= limit:
            self._doubts[setup] = max(missing)

    def _context(self, settings: Settings) -> Context:
        return Context(
            n_ctx=settings.n_ctx,
            n_slots=settings.n_slots,
            n_ubatch=default_ubatch(self.shape, self.options, settings.n_ctx, settings.streaming),
            kv_type=settings.kv_type,
            flash_attn=self.options.flash_attn is not False,
        )

    def _plain_contexts(self, context: Context) -> Iterator[Context]:
        """Yield what is better than a context on a CPU: no flash attention, cells for each slot.

        Where that takes little RAM.
        """
        is_asked = self.options.flash_attn
        if is_asked or self.shape.is_embedding or context.kv_type not in PLAIN_KV:
            return
        plain = replace(context, flash_attn=False)
        use = self._estimate((), 0, 0, plain).use.host
        available = self.hardware.host.available_bytes
        if is_asked is None and use.compute_bytes > available // _PLAIN_SHARE:
            return
        yield from self._apart(plain, (available - use.weights_bytes) // _APART_SHARE)
        yield plain

    def _apart(self, plain: Context, most_bytes: int) -> Iterator[Context]:
        """Yield the context with as many cells for each slot as for all, if they take no more.

        What has left a sliding window, or is one state, can't be copied from slot to slot.
        """
        shape = self.shape
        if shape.n_swa or any(layer.state_bytes for layer in shape.layers):
            return
        n_ctx = min(plain.n_ctx, shape.n_ctx_train or plain.n_ctx)
        asked = self.options.n_slots
        for n_slots in (N_SLOTS_CPU, N_SLOTS_APART) if asked is None else (asked,):
            apart = replace(plain, n_ctx=n_ctx, n_slots=n_slots, kv_unified=False)
            if n_slots > 1 and sum(kv_layer_bytes(shape, apart)) <= most_bytes:
                yield apart
                return

    def _device_uses(
        self, team: Team, estimate: _Estimate, settings: Settings
    ) -> tuple[DeviceUse, ...]:
        page_table = 0
        if settings.streaming.load_mode == "locked":
            page_table = estimate.use.host.weights_bytes // _PAGE_TABLE_SHARE
        return tuple(
            DeviceUse(
                name=gpu.name,
                free_bytes=gpu.free_bytes,
                weights_bytes=part.weights_bytes,
                kv_bytes=part.kv_bytes,
                compute_bytes=part.compute_bytes,
                overhead_bytes=gpu.overhead_bytes + (page_table if gpu.backend == "CUDA" else 0),
                workspace_bytes=gpu.workspace_bytes,
                margin_bytes=SAFETY_BYTES if estimate.is_exact else _margin(part.compute_bytes),
            )
            for gpu, part in zip(team, estimate.use.gpus, strict=True)
        )

    def _host_use(
        self, team: Team, devices: tuple[DeviceUse, ...], estimate: _Estimate, settings: Settings
    ) -> HostUse:
        use, n_slots = estimate.use, estimate.setup.context.n_slots
        host, locked = self.hardware.host, settings.streaming.load_mode == "locked"
        shared = sum(
            device.total_bytes for gpu, device in zip(team, devices, strict=True) if gpu.is_shared
        )
        process = PROCESS_BYTES + (GPU_PROCESS_BYTES if team else 0)
        logits = 0 if self.shape.is_embedding else self.shape.n_vocab * _F32 * n_slots
        margin = SAFETY_BYTES
        if locked:
            margin += host.total_bytes // _LOCKED_SLACK
        return HostUse(
            available_bytes=host.available_bytes,
            weights_bytes=use.host.weights_bytes,
            kv_bytes=use.host.kv_bytes,
            compute_bytes=use.host.compute_bytes + logits,
            locked=locked,
            overhead_bytes=process + shared,
            margin_bytes=margin,
        )

    # --- several GPUs ---------------------------------------------------------------------

    def _split(
        self, team: Team, n_gpu_layers: int, n_cpu_moe: int, context: Context
    ) -> tuple[float, ...]:
        """Return how many layers each GPU gets: in proportion to the room it has for them.

        Whole numbers that add up to the offloaded layers, so that llama.cpp's comparison of
        shares (a layer's index over their number) puts each border exactly there.
        """
        if len(team) <= 1:
            return (1.0,) * len(team)
        sizes = self.memory.layer_bytes(context, n_cpu_moe)[self.n_all - n_gpu_layers :]
        equal = Layout(n_gpu_layers=n_gpu_layers, n_cpu_moe=n_cpu_moe, split=(1.0,) * len(team))
        buffers = [use.compute_bytes for use in self.memory.estimate(equal, context).gpus]
        room = [
            max(0, _room(gpu) - compute - _margin(compute))
            for gpu, compute in zip(team, buffers, strict=True)
        ]
        return share_out(sizes, room)


def setup_of(placement: Placement) -> Setup:
    """Return what a placement's memory depends on."""
    return Setup(
        devices=placement.devices,
        layout=Layout(
            n_gpu_layers=placement.n_gpu_layers,
            n_cpu_moe=placement.n_cpu_moe,
            split=placement.tensor_split or (1.0,) * len(placement.devices),
        ),
        context=Context(
            n_ctx=placement.n_ctx,
            n_slots=placement.n_slots,
            n_ubatch=placement.n_ubatch,
            kv_type=placement.kv_type,
            flash_attn=placement.flash_attn,
            kv_unified=placement.kv_unified,
        ),
    )


def _room(gpu: Gpu) -> int:
    """Return what is left of a GPU for buffers; negative: not even a process fits."""
    return gpu.free_bytes - gpu.overhead_bytes - gpu.workspace_bytes


def _names(team: Team) -> tuple[str, ...]:
    return tuple(gpu.name for gpu in team)


def _margin(compute_bytes: int) -> int:
    return SAFETY_BYTES + compute_bytes // _COMPUTE_SAFETY


def first_with_room(counts: range, has_room: Callable[[int], bool]) -> int | None:
    """Return the first count for which the GPUs have room; None: there is none.

    What the GPUs need must not rise along `counts`: then halving finds the first.
    """
    if not counts or not has_room(counts[-1]):
        return None
    if has_room(counts[0]):
        return counts[0]
    low, high = 1, len(counts) - 1
    while low < high:
        middle = (low + high) // 2
        if has_room(counts[middle]):
            high = middle
        else:
            low = middle + 1
    return counts[high]


def _teams(gpus: tuple[Gpu, ...]) -> list[Team]:
    """Return the sets of GPUs to try: the one with most room, the two with most, and so on.

    A GPU in the host's own memory is used only where there is no other, as llama.cpp does.
    """
    usable = [gpu for gpu in gpus if not gpu.is_shared]
    if not usable:
        usable = [gpu for gpu in gpus if gpu.is_shared][:1]
    by_room = sorted(usable, key=_room, reverse=True)
    return [
        tuple(gpu for gpu in usable if gpu in by_room[:count])
        for count in range(1, len(by_room) + 1)
    ]


def share_out(sizes: Sequence[int], room: Sequence[int]) -> tuple[float, ...]:
    """Return how many of the consecutive layers go to each GPU: evenly, else as they fit.

    Where they fit in no way, the even shares say so.
    """
    even = _share_evenly(sizes, room)
    packed = _pack(sizes, room)
    counts = even if packed is None or _fits(even, sizes, room) else packed
    return tuple(float(count) for count in counts)


def _pack(sizes: Sequence[int], room: Sequence[int]) -> list[int] | None:
    """Fill one GPU after the other, from the last: the first has the largest buffers.

    Whenever there is a way for consecutive layers to fit, this is one; None: there is none.
    """
    counts, left = [0] * len(room), list(room)
    gpu = len(room) - 1
    for size in reversed(sizes):
        while gpu >= 0 and size > left[gpu]:
            gpu -= 1
        if gpu < 0:
            return None
        counts[gpu] += 1
        left[gpu] -= size
    return counts


def _fits(counts: Sequence[int], sizes: Sequence[int], room: Sequence[int]) -> bool:
    ends = [0, *accumulate(counts)]
    return all(sum(sizes[ends[i] : ends[i + 1]]) <= room[i] for i in range(len(room)))


def _share_evenly(sizes: Sequence[int], room: Sequence[int]) -> list[int]:
    """Return how many of the consecutive layers go to each GPU, all of them about equally full.

    Each takes its part of the whole in proportion to its room, a layer going where its middle
    falls.
    """
    total_room, total = sum(room) or 1, sum(sizes)
    borders = [total * part / total_room for part in accumulate(room)]
    counts, passed = [0] * len(room), 0
    for size in sizes:
        middle = passed + size / 2
        counts[min(bisect_left(borders, middle), len(room) - 1)] += 1
        passed += size
    return counts
