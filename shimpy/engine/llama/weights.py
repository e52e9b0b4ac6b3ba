"""Where a loaded model's weights lie in RAM.

llama.cpp has no call for it in C. Its own tools use llama_internal_get_tensor_map, which returns a
reference to a std::vector of names and tensors; on Linux these are libstdc++'s, whose layout its
ABI fixes. The tensor is as ggml.h has it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

from shimpy.engine.llama.library import Pointer, bind, bind_cxx
from shimpy.engine.llama.page_locks import Span

_SYMBOL = "_Z29llama_internal_get_tensor_mapB5cxx11PK11llama_model"
# More than any model has: a larger count means that the layout is another one.
_MAX_TENSORS = 1 << 20


class _Tensor(ctypes.Structure):
    """ggml.h, the beginning of struct ggml_tensor."""

    _fields_ = (("type", ctypes.c_int), ("buffer", ctypes.c_void_p))


class _Named(ctypes.Structure):
    """libstdc++, pair<string, ggml_tensor *>."""

    _fields_ = (("name", ctypes.c_char * 32), ("tensor", ctypes.POINTER(_Tensor)))


class _Vector(ctypes.Structure):
    """libstdc++, std::vector: the first element, the end, the end of the room."""

    _fields_ = (("start", ctypes.c_size_t), ("end", ctypes.c_size_t), ("room", ctypes.c_size_t))


_data_of = bind("ggml_get_data", ctypes.c_void_p, ctypes.c_void_p)
_bytes_of = bind("ggml_nbytes", ctypes.c_size_t, ctypes.c_void_p)
_is_host = bind("ggml_backend_buffer_is_host", ctypes.c_bool, ctypes.c_void_p)


def spans_in_ram(model: Pointer) -> list[Span]:
    """Return where each tensor of a model lies that is in RAM; none where that can't be known."""
    tensor_map = bind_cxx(_SYMBOL, ctypes.POINTER(_Vector), ctypes.c_void_p)
    return [] if tensor_map is None else list(_spans(tensor_map(model).contents))


def _spans(tensors: _Vector) -> Iterator[Span]:
    n, rest = divmod(tensors.end - tensors.start, ctypes.sizeof(_Named))
    if rest or not 0 < n < _MAX_TENSORS:
        return
    for named in (_Named * n).from_address(tensors.start):
        address = ctypes.addressof(named.tensor.contents)
        start: int | None = _data_of(address)
        buffer = named.tensor.contents.buffer
        if start and buffer and _is_host(buffer):
            yield start, start + _bytes_of(address)
