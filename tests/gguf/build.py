"""GGUF headers from plain values, so that tests can also make those that no writer would."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from shimpy.gguf.quants import GGML_TYPES

TYPES = {t.name: t for t in GGML_TYPES.values()}
Value = int | float | bool | str | list[int] | list[float] | list[str] | list[bool]
# Name, shape in llama.cpp's order, type.
Tensor = tuple[str, tuple[int, ...], str]


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def value(item: Value) -> bytes:
    """Return type and value, the types being those that converters use."""
    if isinstance(item, list):
        kind, fmt = _kind(item[0])
        body = b"".join(string(x) if fmt is None else struct.pack(fmt, x) for x in item)
        return struct.pack("<IIQ", 9, kind, len(item)) + body
    kind, fmt = _kind(item)
    return struct.pack("<I", kind) + (
        string(item) if isinstance(item, str) else struct.pack(str(fmt), item)
    )


def _kind(item: object) -> tuple[int, str | None]:
    if isinstance(item, bool):
        return 7, "<?"
    if isinstance(item, int):
        return (5, "<i") if item < 0 else (4, "<I") if item < 1 << 32 else (10, "<Q")
    return (6, "<f") if isinstance(item, float) else (8, None)


@dataclass
class Gguf:
    """A file in parts; `header()` lays them out, each part can be wrong."""

    metadata: Mapping[str, Value] = field(default_factory=dict)
    tensors: Sequence[Tensor] = ()
    version: int = 3
    alignment: int = 32
    n_tensors: int | None = None
    n_pairs: int | None = None

    def header(self) -> bytes:
        parts = [b"GGUF", struct.pack("<I", self.version)]
        parts.append(
            struct.pack(
                "<QQ",
                len(self.tensors) if self.n_tensors is None else self.n_tensors,
                len(self.metadata) if self.n_pairs is None else self.n_pairs,
            )
        )
        parts += [string(key) + value(item) for key, item in self.metadata.items()]
        offset = 0
        for name, shape, type_name in self.tensors:
            parts.append(tensor_row(name, shape, TYPES[type_name].id, offset))
            offset = self._align(offset + n_bytes(shape, type_name))
        return b"".join(parts)

    def size(self) -> int:
        """Return how long the whole file is."""
        end = self._align(len(self.header()))
        for _, shape, type_name in self.tensors:
            end = self._align(end + n_bytes(shape, type_name))
        return end

    def write(self, path: Path) -> Path:
        """Write the header and a hole where the data would be."""
        with path.open("wb") as file:
            file.write(self.header())
            file.truncate(self.size())
        return path

    def _align(self, position: int) -> int:
        return -(-position // self.alignment) * self.alignment


def n_bytes(shape: tuple[int, ...], type_name: str) -> int:
    total = 1
    for extent in shape:
        total *= extent
    kind = TYPES[type_name]
    return total // kind.block_size * kind.type_size


def tensor_row(name: str | bytes, shape: Sequence[int], type_id: int, offset: int) -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, type_id, offset)


def llama(n_layer: int = 2, arch: str = "llama", **extra: Value) -> dict[str, Value]:
    """Return the metadata of a small model; `extra` keys are the architecture's, "__" for "."."""
    metadata: dict[str, Value] = {
        "general.architecture": arch,
        f"{arch}.block_count": n_layer,
        f"{arch}.context_length": 4096,
        f"{arch}.embedding_length": 64,
        f"{arch}.feed_forward_length": 128,
        f"{arch}.attention.head_count": 4,
    }
    return metadata | {f"{arch}.{k.replace('__', '.')}": v for k, v in extra.items()}


def dense_tensors(n_layer: int = 2, type_name: str = "F16") -> list[Tensor]:
    """Return a small model's tensors: 64 wide, 10 tokens."""
    rows: list[Tensor] = [("token_embd.weight", (64, 10), type_name)]
    for i in range(n_layer):
        rows.append((f"blk.{i}.attn_q.weight", (64, 64), type_name))
        rows.append((f"blk.{i}.ffn_up.weight", (64, 128), type_name))
    return [*rows, ("output_norm.weight", (64,), "F32"), ("output.weight", (64, 10), type_name)]


def small_model(path: Path, **metadata: Value) -> Path:
    """Write a dense model of two layers."""
    return Gguf(metadata=llama() | metadata, tensors=dense_tensors()).write(path)
