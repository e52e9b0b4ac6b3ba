"""What a context really holds, per device.

Read from llama_get_memory_breakdown, which is C++: it returns a std::map by value. On Linux
that is libstdc++'s, whose layout its ABI fixes; elsewhere, or when the symbol is gone, the
figures come from the log lines of the load.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

from shimpy.engine.llama.devices import device_of_buffer, device_of_buffer_name
from shimpy.engine.llama.library import Pointer, bind_cxx
from shimpy.engine.llama.log import LOG
from shimpy.protocol.messages import BufferUse
from shimpy.units import MIB

_SYMBOL = "_Z26llama_get_memory_breakdownPK13llama_context"
# More buffer types than any build has: a larger count means that the layout is another one.
_MAX_NODES = 256

# Buffer's device, bytes of weights, of the context (KV) and of computation.
_Use = tuple[str, int, int, int]


class _Node(ctypes.Structure):
    """libstdc++, _Rb_tree_node of pair<buffer type, llama_memory_breakdown_data>."""

    _fields_ = (
        ("color", ctypes.c_int),
        ("parent", ctypes.c_void_p),
        ("left", ctypes.c_void_p),
        ("right", ctypes.c_void_p),
        ("buffer_type", ctypes.c_void_p),
        ("model", ctypes.c_size_t),
        ("context", ctypes.c_size_t),
        ("compute", ctypes.c_size_t),
    )


class _Map(ctypes.Structure):
    """libstdc++, std::map: the comparison, the header node, the count of nodes."""

    _fields_ = (
        ("compare", ctypes.c_void_p),
        ("color", ctypes.c_int),
        ("root", ctypes.c_void_p),
        ("left", ctypes.c_void_p),
        ("right", ctypes.c_void_p),
        ("n_nodes", ctypes.c_size_t),
    )


def read_memory(context: Pointer) -> list[BufferUse]:
    """Return the bytes of weights, KV cache and computation on each device that holds any."""
    uses = _from_breakdown(context) or list(_from_log())
    sums: dict[str, list[int]] = {}
    for device, *sizes in uses:
        held = sums.setdefault(device, [0, 0, 0])
        held[:] = [total + size for total, size in zip(held, sizes, strict=True)]
    return [
        BufferUse(device=device, model_bytes=model, context_bytes=kv, compute_bytes=compute)
        for device, (model, kv, compute) in sums.items()
        if model or kv or compute
    ]


def _from_breakdown(context: Pointer) -> list[_Use]:
    """Return nothing where the layout is not the known one."""
    breakdown = bind_cxx(_SYMBOL, _Map, ctypes.c_void_p)
    if breakdown is None:
        return []
    tree: _Map = breakdown(context)
    if not 0 < tree.n_nodes < _MAX_NODES:
        return []
    return [
        (device_of_buffer(node.buffer_type), node.model, node.context, node.compute)
        for node in _walk(tree.root)
    ]


def _walk(address: int | None) -> Iterator[_Node]:
    if address:
        node = _Node.from_address(address)
        yield from _walk(node.left)
        yield node
        yield from _walk(node.right)


def _from_log() -> Iterator[_Use]:
    for line in LOG.buffers:
        size = int(line.mib * MIB)
        is_model, is_compute = line.kind == "model", line.kind == "compute"
        is_context = not (is_model or is_compute)
        device = device_of_buffer_name(line.buffer_type)
        yield device, size * is_model, size * is_context, size * is_compute
