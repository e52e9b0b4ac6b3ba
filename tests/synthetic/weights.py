"""Random weights of any GGML type, as the bytes of a tensor, from a seed.

Quantized blocks are random bits with a scale that gives the wanted standard deviation, so
that gigabytes are written at the disk's speed: beyond POOL_BYTES a tensor is slices of one
pool, at random offsets.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as GgmlType

Quant = Literal["f32", "f16", "q8_0", "q4_0", "q4_k_m"]
Bytes = npt.NDArray[np.uint8]

POOL_BYTES = 8 * 1024 * 1024

# general.file_type, from llama.h's llama_ftype.
FILE_TYPES: dict[Quant, int] = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7, "q4_k_m": 15}

_PLAIN: dict[Quant, GgmlType] = {
    "f32": GgmlType.F32,
    "f16": GgmlType.F16,
    "q8_0": GgmlType.Q8_0,
    "q4_0": GgmlType.Q4_0,
}
# What llama-quantize takes instead where a row is no multiple of 256.
_FALLBACK = {GgmlType.Q4_K: GgmlType.Q5_0, GgmlType.Q6_K: GgmlType.Q8_0}
# Where a block has its factors (float16), and by how much each is the scale: ggml-common.h. The
# second one of a block shifts its weights: with q at its mean they are zero.
_FACTORS: dict[GgmlType, tuple[tuple[int, float], ...]] = {
    GgmlType.Q4_0: ((0, 1.0),),
    GgmlType.Q5_0: ((0, 1.0),),
    GgmlType.Q5_1: ((0, 1.0), (2, -15.5)),
    GgmlType.Q8_0: ((0, 1.0),),
    GgmlType.Q2_K: ((80, 1.0), (82, 1.5)),
    GgmlType.Q3_K: ((108, 1.0),),
    GgmlType.Q4_K: ((0, 1.0), (2, 7.5)),
    GgmlType.Q5_K: ((0, 1.0), (2, 15.5)),
    GgmlType.Q6_K: ((208, 1.0),),
}
# MXFP4 has a power of two in its first byte instead; so much is added to it (E8M0).
_MXFP4_BIAS = 127


def tensor_type(quant: Quant, name: str, *, n_row: int, layer: int, n_layer: int) -> GgmlType:
    """Return the type that llama-quantize would give a tensor, with its fallbacks."""
    if "norm" in name or "ffn_gate_inp" in name or not name.endswith(".weight"):
        return GgmlType.F32
    if quant != "q4_k_m":
        return _PLAIN[quant] if n_row % 32 == 0 else GgmlType.F16
    more_bits = layer < n_layer // 8 or layer >= 7 * n_layer // 8 or (layer - n_layer // 8) % 3 == 2
    wide = name == "output.weight" or (more_bits and ("attn_v" in name or "ffn_down" in name))
    wanted = GgmlType.Q6_K if wide else GgmlType.Q4_K
    if n_row % 256 == 0:
        return wanted
    return _FALLBACK[wanted] if n_row % 32 == 0 else GgmlType.F16


def tensor_bytes(kind: GgmlType, shape: tuple[int, ...]) -> int:
    """Return how many bytes a tensor takes in the file."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return math.prod(shape) // block * size


class Weights:
    """Gives the bytes of random tensors, in the order in which they are asked for."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._pools: dict[tuple[GgmlType, float], Bytes] = {}

    def random(self, kind: GgmlType, shape: tuple[int, ...], std: float) -> Iterator[Bytes]:
        """Yield a tensor's bytes: zero mean, the given standard deviation."""
        block, size = gguf.GGML_QUANT_SIZES[kind]
        n_blocks = math.prod(shape) // block
        if n_blocks * size <= POOL_BYTES:
            yield self._blocks(kind, n_blocks, std)
            return
        pool = self._pools.get((kind, std))
        if pool is None:
            pool = self._pools[kind, std] = self._blocks(kind, POOL_BYTES // size, std)
        while n_blocks > 0:
            start = int(self._rng.integers(len(pool)))
            part = pool[start : start + n_blocks]
            n_blocks -= len(part)
            yield part

    def random_muted(
        self, kind: GgmlType, shape: tuple[int, ...], std: float, muted: list[int]
    ) -> Iterator[Bytes]:
        """Yield a tensor's bytes with the rows in `muted` all zero, whatever its type."""
        parts = [part.reshape(-1) for part in self.random(kind, shape, std)]
        rows = np.concatenate(parts).reshape(shape[0], -1)
        rows[muted] = 0
        yield rows

    def _blocks(self, kind: GgmlType, n_blocks: int, std: float) -> Bytes:
        if kind in (GgmlType.F32, GgmlType.F16):
            dtype = np.float32 if kind == GgmlType.F32 else np.float16
            values = (self._rng.standard_normal(n_blocks) * std).astype(dtype)
            return values.view(np.uint8).reshape(n_blocks, -1)
        size = gguf.GGML_QUANT_SIZES[kind][1]
        blocks = self._rng.integers(0, 256, (n_blocks, size), dtype=np.uint8)
        if kind == GgmlType.Q4_0:
            # Of 0 to 15 less 8, the 0 would pull the mean below zero and all rows together.
            low, high = self._rng.integers(1, 16, (2, n_blocks, size - 2), dtype=np.uint8)
            blocks[:, 2:] = low | high << 4
        _set_scale(blocks, kind, 1.0)
        sample = gguf.quants.dequantize(blocks[:4096].reshape(-1), kind)
        _set_scale(blocks, kind, std / float(sample.std()))
        return blocks


def _set_scale(blocks: Bytes, kind: GgmlType, scale: float) -> None:
    if kind == GgmlType.MXFP4:
        blocks[:, 0] = _MXFP4_BIAS + round(math.log2(scale))
        return
    for at, ratio in _FACTORS[kind]:
        blocks[:, at : at + 2] = np.array([scale * ratio], np.float16).view(np.uint8)
