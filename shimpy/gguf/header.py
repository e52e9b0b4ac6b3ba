"""What a GGUF header says: metadata values, the tensor table, and where the data lies."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Final, TypeVar

import msgspec

from shimpy.errors import GgufError
from shimpy.gguf.quants import GgmlType

# GGUF's numbers for metadata value types, with struct's format of the fixed-size ones.
STRING_TYPE: Final = 8
ARRAY_TYPE: Final = 9
SCALAR_FORMATS: Final = MappingProxyType(
    {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
)

_U64 = struct.Struct("<Q")

_T = TypeVar("_T", int, str)

Scalar = int | float | bool | str


class TruncatedHeaderError(GgufError):
    """The bytes end within the header: at least `needed_bytes` of the file must be there.

    A reader that holds a prefix only fetches more and parses again.
    """

    def __init__(self, message: str, *, needed_bytes: int) -> None:
        super().__init__(message)
        self.needed_bytes = needed_bytes


class GgufArray(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """An array of metadata, kept as the file's bytes until its values are asked for.

    A vocabulary of 200,000 tokens is skipped in milliseconds; it is decoded only by those who
    need the texts. It owns a copy of its bytes, so no file or mapping stays open.
    """

    value_type: int
    count: int
    raw: bytes

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Scalar]:
        if self.value_type == STRING_TYPE:
            return self._iter_strings()
        scalars = struct.iter_unpack("<" + SCALAR_FORMATS[self.value_type], self.raw)
        return (value for (value,) in scalars)

    def values(self) -> tuple[Scalar, ...]:
        """Return all values, decoded."""
        return tuple(self)

    def contains_text(self, text: str) -> bool:
        """Return whether a string of the array is exactly `text`, without decoding the others."""
        encoded = text.encode()
        return self.value_type == STRING_TYPE and _U64.pack(len(encoded)) + encoded in self.raw

    def _iter_strings(self) -> Iterator[str]:
        position = 0
        for _ in range(self.count):
            (length,) = _U64.unpack_from(self.raw, position)
            position += _U64.size + length
            yield self.raw[position - length : position].decode("utf-8", "replace")


MetadataValue = Scalar | GgufArray


class TensorInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One row of the tensor table; a model has hundreds, and a struct is made in no time."""

    name: str
    # llama.cpp's order ("ne"): the contiguous dimension first.
    shape: tuple[int, ...]
    type: GgmlType
    # From the start of the data of its shard.
    offset: int
    n_bytes: int
    # Index into Header.shards.
    shard: int = 0

    @property
    def n_elements(self) -> int:
        """Number of weights."""
        total = 1
        for extent in self.shape:
            total *= extent
        return total


class Shard(msgspec.Struct, frozen=True, kw_only=True):
    """One file of a model."""

    name: str
    # Length of magic, metadata and tensor table.
    header_bytes: int
    # Where the tensors' data starts: header_bytes, aligned.
    data_offset: int
    # What the data takes by the tensor table, without padding after the last tensor.
    data_bytes: int
    # Hex sha256 of the header's bytes.
    sha256: str
    # The file's size; None: only a prefix of it was seen.
    file_bytes: int | None = None

    @property
    def required_bytes(self) -> int:
        """How long the file must be for its tensors to be whole."""
        return self.data_offset + self.data_bytes


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """All that a model's file, or its shards together, say before the data."""

    version: int
    alignment: int
    # Of the first shard, which carries the model's metadata.
    metadata: Mapping[str, MetadataValue]
    tensors: tuple[TensorInfo, ...]
    shards: tuple[Shard, ...]

    @property
    def name(self) -> str:
        """The first file's name, for messages."""
        return self.shards[0].name

    @property
    def file_bytes(self) -> int:
        """Size of all shards; for a prefix, what its tensor table demands."""
        return sum(
            shard.required_bytes if shard.file_bytes is None else shard.file_bytes
            for shard in self.shards
        )

    @property
    def header_bytes(self) -> int:
        """Length of the first shard's header."""
        return self.shards[0].header_bytes

    @property
    def data_offset(self) -> int:
        """Where the first shard's data starts."""
        return self.shards[0].data_offset

    def get_int(self, key: str, default: int | None = None) -> int:
        """Return a whole number of the metadata.

        Raises:
            GgufError: the key is missing and there is no default, or it is no whole number.
        """
        value = self.metadata.get(key)
        if value is None:
            return self._default(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise GgufError(f"{self.name}: metadata {key} is {_describe(value)}, not an integer")
        return value

    def get_str(self, key: str, default: str | None = None) -> str:
        """Return a text of the metadata; errors as `get_int`."""
        value = self.metadata.get(key)
        if value is None:
            return self._default(key, default)
        if not isinstance(value, str):
            raise GgufError(f"{self.name}: metadata {key} is {_describe(value)}, not a string")
        return value

    def get_array(self, key: str) -> GgufArray | None:
        """Return an array of the metadata; None: there is no such key, or it is no array."""
        value = self.metadata.get(key)
        return value if isinstance(value, GgufArray) else None

    def _default(self, key: str, default: _T | None) -> _T:
        if default is None:
            raise GgufError(f"{self.name}: metadata {key} is missing; the file is no whole model")
        return default


def _describe(value: MetadataValue) -> str:
    return f"an array of {value.count}" if isinstance(value, GgufArray) else f"{value!r}"
