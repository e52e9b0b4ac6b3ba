"""The parser of GGUF headers: bytes in, a Header or one GgufError out.

Layout, little-endian (ggml/include/gguf.h of llama.cpp): magic, version, tensor count, pair
count, the metadata pairs, the tensor table, padding, the tensors' data. Versions 2 and 3 lay
it out alike. Every count and length is a claim of a file that nobody vouches for: it is
checked against what is there before it is believed.
"""

from __future__ import annotations

import hashlib
import mmap
import struct
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from shimpy.errors import GgufError
from shimpy.gguf.header import (
    ARRAY_TYPE,
    SCALAR_FORMATS,
    STRING_TYPE,
    GgufArray,
    Header,
    MetadataValue,
    Shard,
    TensorInfo,
    TruncatedHeaderError,
)
from shimpy.gguf.quants import GGML_TYPES, REMOVED_TYPES, GgmlType
from shimpy.units import MIB

Buffer = bytes | mmap.mmap

MAGIC: Final = b"GGUF"
SUPPORTED_VERSIONS: Final = (2, 3)
DEFAULT_ALIGNMENT: Final = 32

# Limits that no real model comes near (vocabularies of 262,144 tokens have headers of about
# 15 MiB, the largest mixtures some thousand tensors); they bound the work for a hostile file.
MAX_HEADER_BYTES: Final = 128 * MIB
MAX_PAIRS: Final = 1 << 16
MAX_TENSORS: Final = 1 << 18
MAX_KEY_BYTES: Final = 1 << 16
# GGML_MAX_NAME and GGML_MAX_DIMS of llama.cpp, which refuses what goes past them.
MAX_TENSOR_NAME_BYTES: Final = 63
MAX_DIMS: Final = 4

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_COUNTS = struct.Struct("<QQ")
_ARRAY_HEAD = struct.Struct("<IQ")
_SCALARS = {number: struct.Struct("<" + fmt) for number, fmt in SCALAR_FORMATS.items()}
# Shape, type and offset of a tensor, by how many dimensions it has.
_TENSORS = tuple(struct.Struct(f"<{n_dims}QIQ") for n_dims in range(MAX_DIMS + 1))
_SMALLEST_PAIR = 8 + 4 + 1
_SMALLEST_TENSOR = 8 + 4 + 4 + 8


def parse_header(buffer: Buffer, *, name: str) -> Header:
    """Return what the header at the start of `buffer` says; `name` is for messages.

    Whether the data that the tensor table promises is there is not looked at, so a prefix of a
    file is enough: see `reader.check_data`.

    Raises:
        TruncatedHeaderError: the header goes on past the end of `buffer`.
        GgufError: it is no GGUF header, or none that llama.cpp would read.
    """
    return _Parser(buffer, name).parse()


class _Parser:
    """Walks a header once, front to back."""

    def __init__(self, buffer: Buffer, name: str) -> None:
        self._buffer = buffer
        self._name = name
        self._end = len(buffer)
        # What is before this need not be looked at more closely: it is there, and allowed.
        self._limit = min(self._end, MAX_HEADER_BYTES)
        self._position = 0

    def parse(self) -> Header:
        version = self._parse_version()
        n_tensors, n_pairs = self._unpack(_COUNTS, "its", "counts")
        self._check_count("tensors", n_tensors, MAX_TENSORS, _SMALLEST_TENSOR)
        self._check_count("metadata pairs", n_pairs, MAX_PAIRS, _SMALLEST_PAIR)
        metadata = self._parse_metadata(n_pairs)
        alignment = self._parse_alignment(metadata)
        tensors = self._parse_tensors(n_tensors, alignment)
        header_bytes = self._position
        shard = Shard(
            name=self._name,
            header_bytes=header_bytes,
            data_offset=_align(header_bytes, alignment),
            data_bytes=max((t.offset + t.n_bytes for t in tensors), default=0),
            sha256=self._digest(header_bytes),
        )
        return Header(
            version=version,
            alignment=alignment,
            metadata=MappingProxyType(metadata),
            tensors=tensors,
            shards=(shard,),
        )

    def _digest(self, n_bytes: int) -> str:
        # Released at once: a mapping can't be closed while a view of it lives.
        with memoryview(self._buffer) as view, view[:n_bytes] as head:
            return hashlib.sha256(head).hexdigest()

    def _parse_version(self) -> int:
        magic = self._take(4, "its magic", "number")
        if magic != MAGIC:
            raise self._error(_explain_magic(self._buffer[:64]))
        (version,) = self._unpack(_U32, "its", "version")
        if version in SUPPORTED_VERSIONS:
            return version
        if version & 0xFFFF == 0:
            raise self._error("it is a big-endian GGUF file; get the little-endian one")
        if version == 1:
            raise self._error("it is GGUF version 1, which llama.cpp reads no more; convert again")
        raise self._error(f"it is GGUF version {version}; versions 2 and 3 can be read")

    def _parse_metadata(self, n_pairs: int) -> dict[str, MetadataValue]:
        metadata: dict[str, MetadataValue] = {}
        for number in range(n_pairs):
            key = self._parse_string("the key of metadata pair", number, MAX_KEY_BYTES)
            if not key or key in metadata:
                raise self._error(f"metadata key {key!r} (pair {number}) is empty or there twice")
            (value_type,) = self._unpack(_U32, "the type of", key)
            metadata[key] = self._parse_value(key, value_type)
        return metadata

    def _parse_value(self, key: str, value_type: int) -> MetadataValue:
        if value_type == STRING_TYPE:
            return self._parse_string("metadata", key, MAX_HEADER_BYTES)
        if value_type == ARRAY_TYPE:
            return self._parse_array(key)
        scalar = _SCALARS.get(value_type)
        if scalar is None:
            raise self._error(f"metadata {key} has the unknown type {value_type}")
        value: int | float | bool = self._unpack(scalar, "metadata", key)[0]
        return value

    def _parse_array(self, key: str) -> GgufArray:
        value_type, count = self._unpack(_ARRAY_HEAD, "the array", key)
        start = self._position
        if value_type == STRING_TYPE:
            self._check_size(f"the array {key} of {count} strings", count * _U64.size)
            self._skip_strings(key, count)
        elif value_type in _SCALARS:
            self._skip(count * _SCALARS[value_type].size, f"the array {key} of {count} values")
        else:
            raise self._error(f"the array {key} holds values of the unknown type {value_type}")
        raw = bytes(self._buffer[start : self._position])
        return GgufArray(value_type=value_type, count=count, raw=raw)

    def _skip_strings(self, key: str, count: int) -> None:
        # The hot loop: 400,000 rounds for tokens and merges. Locals and no calls but one.
        unpack, buffer, position = _U64.unpack_from, self._buffer, self._position
        try:
            for _ in range(count):
                (length,) = unpack(buffer, position)
                position += 8 + length
        except (struct.error, OverflowError):
            position = max(position, self._end) + _U64.size
        self._skip(position - self._position, f"the strings of {key}")

    def _parse_alignment(self, metadata: Mapping[str, MetadataValue]) -> int:
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
            raise self._error(f"general.alignment is {alignment!r}, not a power of two")
        return alignment

    def _parse_tensors(self, n_tensors: int, alignment: int) -> tuple[TensorInfo, ...]:
        tensors: dict[str, TensorInfo] = {}
        expected = 0
        for number in range(n_tensors):
            tensor = self._parse_tensor(number)
            if tensor.name in tensors:
                raise self._error(f"there are two tensors of the name {tensor.name}")
            if tensor.offset != expected:
                raise self._error(
                    f"tensor {tensor.name} starts at {tensor.offset} of the data, where {expected} "
                    f"follows from the tensors before it (alignment {alignment})"
                )
            expected = _align(tensor.offset + tensor.n_bytes, alignment)
            tensors[tensor.name] = tensor
        return tuple(tensors.values())

    def _parse_tensor(self, number: int) -> TensorInfo:
        name = self._parse_string("the name of tensor", number, MAX_TENSOR_NAME_BYTES)
        (n_dims,) = self._unpack(_U32, "tensor", name)
        if n_dims > MAX_DIMS:
            raise self._error(f"tensor {name} has {n_dims} dimensions; at most {MAX_DIMS} can be")
        *shape, type_id, offset = self._unpack(_TENSORS[n_dims], "the tensor table at", name)
        ggml_type = self._tensor_type(name, type_id)
        n_elements = 1
        for extent in shape:
            n_elements *= extent
        if n_elements >= 1 << 63:
            raise self._error(f"tensor {name} has the impossible shape {shape}")
        if shape and shape[0] % ggml_type.block_size:
            raise self._error(
                f"tensor {name} has rows of {shape[0]} elements, which is no multiple of the "
                f"{ggml_type.block_size} of a {ggml_type.name} block"
            )
        return TensorInfo(
            name=name,
            shape=tuple(shape),
            type=ggml_type,
            offset=offset,
            n_bytes=n_elements // ggml_type.block_size * ggml_type.type_size,
        )

    def _tensor_type(self, name: str, type_id: int) -> GgmlType:
        ggml_type = GGML_TYPES.get(type_id)
        if ggml_type is not None:
            return ggml_type
        if type_id in REMOVED_TYPES:
            raise self._error(
                f"tensor {name} is of type {REMOVED_TYPES[type_id]}, which llama.cpp reads no "
                "more; get the model in another quantization"
            )
        raise self._error(f"tensor {name} is of the unknown type {type_id}")

    # These three are called for each field of a header: where all is well they call nothing
    # else, and what they were at is put into words for an error only, from `what` and `which`.

    def _parse_string(self, what: str, which: object, max_bytes: int) -> str:
        (length,) = self._unpack(_U64, what, which)
        if length > max_bytes:
            raise self._error(f"{what} {which} claims {length} bytes; at most {max_bytes} can be")
        return self._take(length, what, which).decode("utf-8", "replace")

    def _unpack(self, layout: struct.Struct, what: str, which: object) -> tuple[int, ...]:
        start = self._position
        end = start + layout.size
        if end > self._limit:
            self._check_size(f"{what} {which}", layout.size)
        self._position = end
        return layout.unpack_from(self._buffer, start)

    def _take(self, n_bytes: int, what: str, which: object) -> bytes:
        start = self._position
        end = start + n_bytes
        if end > self._limit:
            self._check_size(f"{what} {which}", n_bytes)
        self._position = end
        return self._buffer[start:end]

    def _skip(self, n_bytes: int, what: str) -> None:
        self._check_size(what, n_bytes)
        self._position += n_bytes

    def _check_size(self, what: str, n_bytes: int) -> None:
        end = self._position + n_bytes
        if end > MAX_HEADER_BYTES:
            raise self._error(
                f"{what} claims to go on to byte {end}; a header has at most {MAX_HEADER_BYTES}"
            )
        if end > self._end:
            raise TruncatedHeaderError(
                f"{self._name}: the file ends at byte {self._end}, within {what}; it is truncated "
                "or corrupt: copy or download it again",
                needed_bytes=end,
            )

    def _check_count(self, what: str, count: int, most: int, smallest: int) -> None:
        if count > most:
            raise self._error(f"it claims {count} {what}; at most {most} can be")
        self._check_size(f"the table of its {count} {what}", count * smallest)

    def _error(self, reason: str) -> GgufError:
        return GgufError(f"{self._name}: {reason}")


def _align(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


def _explain_magic(head: bytes) -> str:
    """Return what a file that is no GGUF seems to be instead."""
    start = head.lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page, not a GGUF model; download the file itself"
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the model itself; run `git lfs pull`"
    if start.startswith((b"{", b"[")):
        return "it is a JSON text, not a GGUF model"
    if head.startswith(b"PK\x03\x04"):
        return "it is a zip archive or PyTorch file; convert it to GGUF first"
    if head[:4] in (b"lmgg", b"fmgg", b"tjgg", b"algg"):
        return "it is of a format before GGUF, which llama.cpp reads no more; convert it again"
    if head[8:10] == b'{"':
        return "it is a safetensors file; convert it to GGUF first"
    if not head.strip(b"\0"):
        return "it starts with zeros; a download may have reserved its space and not filled it"
    return f"it is not a GGUF file: it starts with {head[:4]!r}, not {MAGIC!r}"
