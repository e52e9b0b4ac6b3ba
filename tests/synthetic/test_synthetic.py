"""The synthetic models themselves: the same each time, loadable, of the sizes they claim."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shimpy.gguf.arch import describe_model
from shimpy.gguf.reader import read_header
from tests.engine.llama.running import generate, generate_ids, loaded
from tests.synthetic import (
    CHAIN_TEXT,
    chain_pieces,
    write_bert,
    write_chain,
    write_deepseek,
    write_llama,
    write_mixtral,
    write_nomic_bert,
    write_preset,
    write_qwen3moe,
)

WRITERS = [
    write_llama,
    write_mixtral,
    write_deepseek,
    write_qwen3moe,
    write_bert,
    write_nomic_bert,
    write_chain,
]


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_the_same_arguments_give_the_same_bytes(
    write: Callable[[Path], Path], tmp_path: Path
) -> None:
    first, second = write(tmp_path / "a.gguf"), write(tmp_path / "b.gguf")
    assert first.read_bytes() == second.read_bytes()


def test_a_seed_gives_other_weights(tmp_path: Path) -> None:
    first = write_llama(tmp_path / "a.gguf", seed=1)
    second = write_llama(tmp_path / "b.gguf", seed=2)
    assert first.stat().st_size == second.stat().st_size
    assert first.read_bytes() != second.read_bytes()


@pytest.mark.parametrize("quant", ["f32", "f16", "q8_0", "q4_0", "q4_k_m"])
@pytest.mark.parametrize("n_embd", [64, 256])
def test_every_quantization_says_something_of_its_own(
    quant: str, n_embd: int, tmp_path: Path
) -> None:
    """Not one token for ever: equality of two runs would mean nothing."""
    with loaded(write_deepseek(tmp_path / "m.gguf", quant=quant, n_embd=n_embd)) as backend:
        texts = [generate_ids(backend, prompt, n=60) for prompt in ("Hello", "x")]
        assert texts[0] != texts[1]
        assert all(len(set(text)) > 20 for text in texts)


@pytest.mark.parametrize(
    ("preset", "n_params", "n_bytes"),
    [
        ("dense-200m", 0.21e9, 0.13e9),
        ("moe-300m", 0.31e9, 0.19e9),
        ("deepseek-8b", 8.15e9, 5.31e9),
        ("deepseek-16b", 16.38e9, 10.85e9),
    ],
)
def test_presets_have_their_sizes(
    preset: str, n_params: float, n_bytes: float, tmp_path: Path
) -> None:
    path = write_preset(tmp_path / "m.gguf", preset, header_only=True)
    shape = describe_model(read_header(path))
    assert shape.n_params == pytest.approx(n_params, rel=0.05)
    assert path.stat().st_size == pytest.approx(n_bytes, rel=0.05)


def test_a_header_alone_takes_no_disk(tmp_path: Path) -> None:
    whole = write_llama(tmp_path / "whole.gguf", n_embd=512)
    hole = write_llama(tmp_path / "hole.gguf", n_embd=512, header_only=True)
    assert hole.stat().st_size == whole.stat().st_size
    assert hole.stat().st_blocks * 512 < whole.stat().st_size / 4


@pytest.mark.parametrize(
    "text",
    [
        CHAIN_TEXT,
        "Hello",
        "the the the the fox",
        "日本日本日本",
        "a a a a a a",
        '{"name": "x", "size": 3}',
        "<think>so</think>\nit <tool_call>is</tool_call>",
    ],
)
def test_the_chain_says_any_text(text: str, tmp_path: Path) -> None:
    with loaded(write_chain(tmp_path / "chain.gguf", text)) as backend:
        for prompt in ("", "Hello", text):
            assert generate(backend, prompt, n=100) == text


def test_an_endless_chain_does_not_end(tmp_path: Path) -> None:
    with loaded(write_chain(tmp_path / "chain.gguf", " la la", endless=True)) as backend:
        assert generate(backend, "Hello", n=100).startswith(" la la la la la la")


@given(st.text(st.sampled_from("ab ,é日🙂"), min_size=2, max_size=40))
def test_pieces_are_the_text_and_all_differ(text: str) -> None:
    try:
        pieces = chain_pieces(text)
    except ValueError:
        return
    assert b"".join(pieces).decode() == text
    assert len(set(pieces)) == len(pieces)


def test_pieces_end_inside_characters() -> None:
    """What a stream of text has to hold back."""
    pieces = chain_pieces(CHAIN_TEXT)
    assert any(piece.decode(errors="ignore").encode() != piece for piece in pieces)
