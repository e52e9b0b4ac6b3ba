"""The tables of types against the `gguf` package, which llama.cpp's authors keep."""

import ctypes

import gguf
import pytest
from llama_cpp import llama_cpp

from shimpy.gguf.quants import FILE_TYPE_NAMES, GGML_TYPES, REMOVED_TYPES, GgmlType


@pytest.mark.parametrize("quant", list(gguf.GGMLQuantizationType), ids=lambda q: q.name)
def test_type_agrees_with_the_gguf_package(quant: gguf.GGMLQuantizationType) -> None:
    """Sizes of files and memory follow from these numbers alone."""
    ours = GGML_TYPES[int(quant)]
    assert ours.name == quant.name
    if quant is not gguf.GGMLQuantizationType.Q8_1:  # the package counts its scale as float32
        assert (ours.block_size, ours.type_size) == gguf.GGML_QUANT_SIZES[quant]


@pytest.mark.parametrize("ours", GGML_TYPES.values(), ids=lambda t: t.name)
def test_type_agrees_with_llama_cpp(ours: GgmlType) -> None:
    """The library that reads the files has the last word."""
    library = llama_cpp._lib
    library.ggml_type_size.restype = ctypes.c_size_t
    library.ggml_blck_size.restype = ctypes.c_int64
    library.ggml_type_name.restype = ctypes.c_char_p
    assert library.ggml_type_size(ours.id) == ours.type_size
    assert library.ggml_blck_size(ours.id) == ours.block_size
    assert library.ggml_type_name(ours.id).decode().upper() == ours.name


@pytest.mark.parametrize("file_type", list(gguf.LlamaFileType), ids=lambda f: f.name)
def test_file_type_agrees_with_the_gguf_package(file_type: gguf.LlamaFileType) -> None:
    if file_type is gguf.LlamaFileType.GUESSED:
        assert int(file_type) not in FILE_TYPE_NAMES
    else:
        expected = file_type.name.removeprefix("MOSTLY_").removeprefix("ALL_")
        assert FILE_TYPE_NAMES[int(file_type)] == expected


def test_removed_types_are_not_offered() -> None:
    assert not REMOVED_TYPES.keys() & GGML_TYPES.keys()
