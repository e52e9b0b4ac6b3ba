"""Published models' shapes, whole: the files of tests/shapes.py with random weights in them.

Every tensor has the type that llama-quantize gives it, so that a file is as large as the
published one, and as fast. Norms and scales are ones, biases and sinks zero: nothing overflows.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as GgmlType

from tests.shapes import FileType, Spec, n_bytes, quantized, write_gguf
from tests.synthetic.weights import Weights

_ALIGNMENT = 32


def shrink(spec: Spec, n_layer: int) -> Spec:
    """Return the model with its first layers alone."""
    kept = tuple(
        (name, shape)
        for name, shape in spec.tensors
        if not name.startswith("blk.") or int(name.split(".")[1]) < n_layer
    )
    return replace(
        spec, tensors=kept, n_layer=n_layer, metadata={**spec.metadata, "block_count": n_layer}
    )


def write_filled(path: Path, spec: Spec, file_type: FileType, *, seed: int = 1) -> Path:
    """Write a model with random weights, gigabytes at the disk's speed; return its path."""
    write_gguf(path, replace(spec, title=f"synthetic {spec.title}"), file_type)
    weights = Weights(seed)
    infos = list(quantized(spec, file_type))
    total = sum(_padded(n_bytes(type_name, shape)) for _, shape, type_name in infos)
    with path.open("r+b") as file:
        at = file.seek(-total, os.SEEK_END)
        for name, shape, type_name in infos:
            file.seek(at)
            at += _padded(n_bytes(type_name, shape))
            if type_name == "F32" and not name.endswith("ffn_gate_inp.weight"):
                value = 0.0 if name.endswith(".bias") or "sinks" in name else 1.0
                file.write(np.full(shape[::-1], value, np.float32).tobytes())
                continue
            # Each layer then changes the stream about as much as the embedding made it.
            std = shape[0] ** -0.5
            for part in weights.random(GgmlType[type_name], shape[::-1], std):
                file.write(memoryview(np.ascontiguousarray(part)).cast("B"))
    return path


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
