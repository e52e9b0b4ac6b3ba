"""The demo model's file as shimpy reads it: its size, its shape, and under what terms it comes."""

from __future__ import annotations

import pytest

from shimpy.demo import MODEL_PATH
from shimpy.gguf.arch import ModelShape, describe_model
from shimpy.gguf.header import Header
from shimpy.gguf.reader import read_header


@pytest.fixture(scope="module")
def header() -> Header:
    return read_header(MODEL_PATH)


@pytest.fixture(scope="module")
def shape(header: Header) -> ModelShape:
    return describe_model(header)


def test_the_file_is_small_enough_to_be_in_the_wheel() -> None:
    assert MODEL_PATH.stat().st_size <= 12_000_000


def test_it_is_a_deepseek_mixture_of_experts(shape: ModelShape) -> None:
    """It stands for DeepSeek-MoE-16B in tests: a dense layer, then shared and routed experts."""
    assert shape.arch == "deepseek"
    assert shape.quantization == "Q8_0"
    assert shape.n_expert >= 16
    assert 1 < shape.n_expert_used < shape.n_expert
    assert shape.n_expert_shared == 2
    assert shape.moe_layers == tuple(range(1, shape.n_layer))


def test_every_layer_but_the_first_has_three_expert_tensors(shape: ModelShape) -> None:
    assert [layer.n_expert_tensors for layer in shape.layers] == [0] + [3] * (shape.n_layer - 1)
    per_layer = 3 * shape.n_expert * shape.n_expert_ff * shape.n_embd
    q8_0_bytes = per_layer // 32 * 34
    assert {layer.expert_bytes for layer in shape.layers[1:]} == {q8_0_bytes}


def test_it_has_room_for_a_chat_and_can_fill_in(shape: ModelShape) -> None:
    assert shape.n_ctx_train >= 1024
    assert shape.has_fim
    assert shape.chat_template


def test_its_licence_and_its_data_are_recorded(header: Header) -> None:
    assert header.get_str("general.license") == "PSF-2.0"
    assert header.get_str("general.license.link") == "https://docs.python.org/3/license.html"
    assert "Python standard library" in header.get_str("general.dataset.0.name")
