"""What a process takes on a card besides llama.cpp's buffers, learnt from what was seen. Pure.

Two figures for each card: the overhead, which is there once a model has answered (the driver's
context, the kernels that were loaded, the first workspace), and the further workspace that heavy
work claims later. The first is what a prediction counts; the second has to stay free.
"""

from __future__ import annotations

from statistics import median_low
from typing import Final

import msgspec
from msgspec.structs import replace

from shimpy.placement.hardware import Gpu
from shimpy.units import GIB

# Readings that the overhead is the median of: one that another program spoilt does no harm.
_MAX_READINGS: Final = 9
# More than any driver's context: what was read is something else.
_MOST_BYTES: Final = 4 * GIB


class Learnt(msgspec.Struct, frozen=True, kw_only=True):
    """What was seen on one card, in bytes beside the buffers."""

    # After a worker's first answer, the newest last.
    answered: tuple[int, ...] = ()
    # The most that was ever seen.
    most: int = 0


def learn(learnt: Learnt, overhead_bytes: int, *, is_first: bool) -> Learnt:
    """Return what is known with one more reading; `is_first`: after a worker's first answer."""
    if not 0 <= overhead_bytes <= _MOST_BYTES:
        return learnt
    answered = learnt.answered
    if is_first:
        answered = (*answered, overhead_bytes)[-_MAX_READINGS:]
    return Learnt(answered=answered, most=max(learnt.most, overhead_bytes))


def with_learnt(gpu: Gpu, learnt: Learnt | None) -> Gpu:
    """Return a GPU with the overhead that was learnt; as it is where nothing was.

    The workspace is never taken for less than its default: light work does not show it.
    """
    if learnt is None or not learnt.answered:
        return gpu
    overhead = median_low(learnt.answered)
    workspace = max(gpu.workspace_bytes, learnt.most - overhead)
    return replace(gpu, overhead_bytes=overhead, workspace_bytes=workspace)
