"""A new KV cache takes RAM as it is used: what nothing has touched is not cleared.

llama.cpp fills a new cache with zeros. That takes the RAM of all of it, used or not, and 1.4 s
for 1.6 GiB, which a model's first request waits for. Pages that the kernel has not handed out yet
are zeros anyway. So while a context is made, large buffers of host memory have a `clear` that
leaves those out.

The bindings have no say in this. It goes through two pointers in structs of ggml
(ggml-backend-impl.h): a buffer type's `alloc_buffer` and a buffer's `clear`. A trial with a small
buffer tells first whether they are where they are looked for; where they are not, and where the
kernel does not tell of pages (Linux does), all is as llama.cpp has it.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar, Final, Self

import numpy as np
import numpy.typing as npt

from shimpy.engine.llama.library import bind
from shimpy.units import MIB

# Smaller buffers are cleared in a moment.
_LEAST_BYTES: Final = 16 * MIB
# struct ggml_backend_buffer_type begins with the functions get_name and alloc_buffer.
_ALLOC_BUFFER: Final = 1
# struct ggml_backend_buffer: functions, of which the last two are clear and reset; the type, the
# context, which of host memory is its address, and the size.
_CLEAR_TO_CONTEXT: Final = 3
_N_WORDS: Final = 16
# Documentation/admin-guide/mm/pagemap.rst: 8 bytes a page; bit 63, it is in RAM; bit 62, swapped.
_PAGEMAP: Final = "/proc/self/pagemap"
_HELD_SHIFT: Final = 62

_Alloc = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_Clear = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint8)

_host_type = bind("ggml_backend_cpu_buffer_type", ctypes.c_void_p)
_allocate = bind(
    "ggml_backend_buft_alloc_buffer", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t
)
_clear = bind("ggml_backend_buffer_clear", None, ctypes.c_void_p, ctypes.c_uint8)
_free = bind("ggml_backend_buffer_free", None, ctypes.c_void_p)
_base_of = bind("ggml_backend_buffer_get_base", ctypes.c_void_p, ctypes.c_void_p)
_size_of = bind("ggml_backend_buffer_get_size", ctypes.c_size_t, ctypes.c_void_p)


class LazyClear:
    """Has large new buffers of host memory cleared where there is something to clear; a context.

    Buffers keep this `clear` as long as they live, since nobody tells when one goes: llama.cpp
    makes and frees some as it makes a context. It leaves nothing uncleared later either.
    """

    # C may call them until the process ends.
    _kept: ClassVar[list[LazyClear]] = []

    def __init__(self, least_bytes: int = _LEAST_BYTES) -> None:
        """Buffers of `least_bytes` and more are cleared so."""
        self.n_cleared = 0
        # Bytes that take no RAM yet.
        self.untouched_bytes = 0
        self._least_bytes = least_bytes
        self._type = _words_at(_host_type())
        # What ggml had there.
        self._alloc_at: int = self._type[_ALLOC_BUFFER]
        self._alloc = _Alloc(self._alloc_at)
        self._callbacks = _Alloc(self._on_alloc), _Clear(self._on_clear)

    def __enter__(self) -> Self:
        """Have it so for the buffers that are made from now on."""
        self._kept.append(self)
        self._type[_ALLOC_BUFFER] = _address_of(self._callbacks[0])
        return self

    def __exit__(self, *_: object) -> None:
        """Have those that come later made as before."""
        self._type[_ALLOC_BUFFER] = self._alloc_at

    def _on_alloc(self, buffer_type: int, n_bytes: int) -> int | None:
        buffer: int | None = self._alloc(buffer_type, n_bytes)
        if not buffer or n_bytes < self._least_bytes:
            return buffer
        words, base = _words_at(buffer), _base_of(buffer)
        for index in range(_CLEAR_TO_CONTEXT, _N_WORDS - 1):
            if words[index] == base and words[index + 1] == _size_of(buffer):
                words[index - _CLEAR_TO_CONTEXT] = _address_of(self._callbacks[1])
                break
        return buffer

    def _on_clear(self, buffer: int, value: int) -> None:
        base, n_bytes = _base_of(buffer), _size_of(buffer)
        held = None if value else _held_pages(base, n_bytes)
        self.n_cleared += 1
        if held is None:
            ctypes.memset(base, value, n_bytes)
            return
        page = mmap.PAGESIZE
        first = base - base % page
        for index in np.flatnonzero(held):
            start = first + int(index) * page
            start, end = max(start, base), min(start + page, base + n_bytes)
            ctypes.memset(start, value, end - start)
        self.untouched_bytes += page * int(np.count_nonzero(~held))


@contextmanager
def lazily_cleared() -> Iterator[LazyClear]:
    """Let new buffers of host memory take RAM as they are used, where that can be had."""
    clearing = LazyClear()
    with clearing if _is_possible() else nullcontext():
        yield clearing


@functools.cache
def _is_possible() -> bool:
    """Whether ggml's pointers are where they are looked for, and the kernel tells of pages."""
    if sys.platform != "linux" or not os.access(_PAGEMAP, os.R_OK):
        return False
    with LazyClear(least_bytes=1) as trial:
        buffer: int | None = _allocate(_host_type(), mmap.PAGESIZE)
        if not buffer:
            return False
        _clear(buffer, 0)
    _free(buffer)
    return trial.n_cleared == 1


def _held_pages(start: int, n_bytes: int) -> npt.NDArray[np.bool_] | None:
    """Return of each page of some memory whether it holds anything; None: nobody knows."""
    first = start // mmap.PAGESIZE
    n_pages = -(-(start + n_bytes) // mmap.PAGESIZE) - first
    try:
        with open(_PAGEMAP, "rb", buffering=0) as file:  # noqa: PTH123 (its place is an address)
            file.seek(8 * first)
            data = file.read(8 * n_pages)
    except OSError:
        return None
    if data is None or len(data) != 8 * n_pages:
        return None
    held: npt.NDArray[np.bool_] = (np.frombuffer(data, np.uint64) >> _HELD_SHIFT) != 0
    return held


def _words_at(address: int) -> Any:
    return (ctypes.c_void_p * _N_WORDS).from_address(address)


def _address_of(function: Any) -> int | None:
    return ctypes.cast(function, ctypes.c_void_p).value
