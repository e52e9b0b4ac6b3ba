"""A GGUF file written tensor by tensor: its size is bounded by the disk, not by memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from gguf import GGMLQuantizationType as GgmlType
from gguf import GGUFWriter

from tests.synthetic.weights import Bytes, tensor_bytes

Source = Callable[[], Iterator[Bytes]]


class GgufFile:
    """Collects keys (on `writer`) and tensors, and writes them in the order of their adding.

    `split_max_tensors` > 0 writes parts `-00001-of-0000N`; `header_only` leaves the tensor data
    as a hole in the file: right sizes, no blocks on the disk.
    """

    def __init__(
        self, path: Path, arch: str, *, split_max_tensors: int = 0, header_only: bool = False
    ) -> None:
        self.writer = GGUFWriter(path, arch, split_max_tensors=split_max_tensors)
        self._header_only = header_only
        self._sources: dict[str, Source] = {}

    def add(self, name: str, kind: GgmlType, shape: tuple[int, ...], source: Source) -> None:
        """Add a tensor; its shape is numpy's, the row (ne[0]) last."""
        dtype = np.dtype(np.float16 if kind == GgmlType.F16 else np.float32)
        self.writer.add_tensor_info(name, shape, dtype, tensor_bytes(kind, shape), raw_dtype=kind)
        self._sources[name] = source

    def write(self) -> Path:
        """Write the file or its parts; return the path of the (first) one."""
        writer = self.writer
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if writer.fout is None:
            raise AssertionError
        for file, tensors in zip(writer.fout, writer.tensors, strict=True):
            for name, info in tensors.items():
                self._write_tensor(file, name, info.nbytes)
            _pad(file)
            file.truncate()
        paths = [Path(os.fsdecode(file.name)) for file in writer.fout]
        writer.close()
        return paths[0]

    def _write_tensor(self, file: BinaryIO, name: str, n_bytes: int) -> None:
        _pad(file)
        if self._header_only:
            file.seek(n_bytes, os.SEEK_CUR)
            return
        start = file.tell()
        parts = self._sources[name]()
        file.writelines(memoryview(np.ascontiguousarray(part)).cast("B") for part in parts)
        if file.tell() - start != n_bytes:
            message = f"{name}: {file.tell() - start} bytes written, {n_bytes} announced"
            raise AssertionError(message)


def _pad(file: BinaryIO) -> None:
    """Move to the next multiple of GGUF's default alignment of 32."""
    file.write(b"\0" * (-file.tell() % 32))
