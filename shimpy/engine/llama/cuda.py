"""CUDA's driver, for what llama.cpp does not ask it: cards by llama.cpp's names, and contexts.

A card's primary context is the one that the CUDA runtime, and so llama.cpp, uses.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


def find_driver() -> Any:
    """Return libcuda, ready for calls; None: there is none, or it refuses."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    return None if cuda.cuInit(0) else cuda


def ordinals_of(devices: Iterable[str]) -> list[int]:
    """Return the numbers of the CUDA cards among some devices ("CUDA0")."""
    return [int(found[1]) for name in devices if (found := re.fullmatch(r"CUDA(\d+)", name))]


@contextmanager
def primary_context(cuda: Any, ordinal: int) -> Iterator[bool]:
    """Make a card's primary context the current one; yield whether that was possible.

    It is made where there is none, takes VRAM, and stays: given back it would be made anew.
    """
    device, context = ctypes.c_int(), ctypes.c_void_p()
    is_current = not (
        cuda.cuDeviceGet(ctypes.byref(device), ordinal)
        or cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
        or cuda.cuCtxPushCurrent_v2(context)
    )
    try:
        yield is_current
    finally:
        if is_current:
            cuda.cuCtxPopCurrent_v2(ctypes.byref(context))
