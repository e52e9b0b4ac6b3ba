"""Exact figures, from llama.cpp's own simulation of a load: what was asked, what it answered.

Pure. The planner takes the figures that there are in place of its formulas, and names those
that it would like to have (`Plan.doubts`); `scheduler.simulations` gets them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Final

import msgspec

from shimpy.placement.memory import Context, Layout, MemoryUse, Use
from shimpy.protocol.messages import BufferUse

HOST: Final = "CPU"


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """All that the memory of a loaded model depends on, beside the model and the machine."""

    # llama.cpp's names, in the order of the layout's shares.
    devices: tuple[str, ...]
    layout: Layout
    context: Context


Figures = Mapping[Setup, MemoryUse]
NO_FIGURES: Final[Figures] = MappingProxyType({})


def use_from_buffers(devices: Iterable[str], buffers: Iterable[BufferUse]) -> MemoryUse | None:
    """Return what a simulated load takes; None: it takes something where nobody expects it."""
    held = {buffer.device: _use(buffer) for buffer in buffers}
    host = held.pop(HOST, Use())
    gpus = tuple(held.pop(name, Use()) for name in devices)
    return None if held else MemoryUse(gpus=gpus, host=host)


def _use(buffer: BufferUse) -> Use:
    return Use(
        weights_bytes=buffer.model_bytes,
        kv_bytes=buffer.context_bytes,
        compute_bytes=buffer.compute_bytes,
    )
