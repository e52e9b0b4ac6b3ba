"""Weights in RAM that a GPU copies from at full speed: the mapped file itself, page-locked.

llama.cpp reads weights into page-locked memory of its own (cudaMallocHost): 0.4 s for each GiB
until it has that, the time to copy them, and RAM for a second copy beside the page cache. CUDA
locks pages where they lie as well, of a mapped file for reading only, in 0.04 s for each GiB
(measured, H200). So a load takes as long as a mapped one, and workers and later loads share the
pages. Prefill and decode are as fast from there.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable, Sequence
from typing import Any

from shimpy.engine.llama.cuda import find_driver, ordinals_of, primary_context

Span = tuple[int, int]
"""The address of some memory, and the one behind it."""

# cuda.h: CU_DEVICE_ATTRIBUTE_READ_ONLY_HOST_REGISTER_SUPPORTED.
_CAN_LOCK_READ_ONLY = 113
# cuda.h: CU_MEMHOSTREGISTER_PORTABLE, for the contexts of all cards; ..._READ_ONLY.
_PORTABLE, _READ_ONLY = 0x01, 0x08
# cuda.h, enum CUresult: CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED.
_IS_LOCKED = 712


class PageLocks:
    """Spans of memory that are page-locked until `close`."""

    def __init__(self, cuda: Any, ordinal: int) -> None:
        """Lock none yet; `ordinal` is the card whose context holds the locks."""
        self._cuda = cuda
        self._ordinal = ordinal
        self._starts: list[int] = []

    def add(self, spans: Iterable[Span]) -> bool:
        """Lock whole pages of some memory; False: the driver refuses one, and none is locked."""
        with primary_context(self._cuda, self._ordinal) as is_current:
            if is_current and all(map(self._lock, spans)):
                return True
        self.close()
        return False

    def close(self) -> None:
        """Unlock them all, before the memory is given back."""
        with primary_context(self._cuda, self._ordinal) as is_current:
            while is_current and self._starts:
                self._cuda.cuMemHostUnregister(ctypes.c_void_p(self._starts.pop()))

    def _lock(self, span: Span) -> bool:
        start, end = span
        status: int = self._cuda.cuMemHostRegister_v2(
            ctypes.c_void_p(start), ctypes.c_size_t(end - start), _PORTABLE | _READ_ONLY
        )
        if not status:
            self._starts.append(start)
        return status in (0, _IS_LOCKED)


def page_locks(devices: Sequence[str], driver: Any = None) -> PageLocks | None:
    """Return what locks mapped memory for all of some devices; None: it can't be had for them.

    `driver`: libcuda, which is looked for unless given.
    """
    ordinals = ordinals_of(devices)
    if not ordinals or len(ordinals) < len(devices):
        return None
    cuda = driver or find_driver()
    if cuda is None or not all(_can_lock(cuda, ordinal) for ordinal in ordinals):
        return None
    return PageLocks(cuda, ordinals[0])


def _can_lock(cuda: Any, ordinal: int) -> bool:
    device, can_lock = ctypes.c_int(), ctypes.c_int()
    return bool(
        not cuda.cuDeviceGet(ctypes.byref(device), ordinal)
        and not cuda.cuDeviceGetAttribute(ctypes.byref(can_lock), _CAN_LOCK_READ_ONLY, device)
        and can_lock.value
    )


def whole_pages(spans: Iterable[Span]) -> list[Span]:
    """Return the pages that some spans touch, as spans in order; neighbours are one."""
    page = mmap.PAGESIZE
    merged: list[Span] = []
    for start, end in sorted(spans):
        first, last = start - start % page, end + -end % page
        if merged and first <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(last, merged[-1][1])
        else:
            merged.append((first, last))
    return merged
