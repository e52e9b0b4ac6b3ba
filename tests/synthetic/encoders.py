"""Models that embed text: bert and nomic-bert; tiny by default."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from gguf import GGMLQuantizationType as GgmlType

from tests.synthetic.gguf_file import GgufFile
from tests.synthetic.vocabulary import add_wordpiece
from tests.synthetic.weights import FILE_TYPES, Bytes, Quant, Weights, tensor_type

# llama.h, enum llama_pooling_type.
_POOLING = {"mean": 1, "cls": 2, "rank": 4}


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """The shape of an encoder."""

    arch: Literal["bert", "nomic-bert"] = "bert"
    name: str = "synthetic bert"
    seed: int = 1
    quant: Quant = "f32"
    n_layer: int = 2
    n_embd: int = 64
    n_head: int = 4
    n_ff: int = 128
    n_vocab: int = 512
    n_ctx_train: int = 512
    # "rank": with a head that gives a text one score.
    pooling: Literal["mean", "cls", "rank"] = "mean"
    # The prompt that a model ranks by, as Qwen's rerankers have one.
    rank_prompt: str = ""


def write_bert(path: Path, **options: Any) -> Path:
    """Write a BERT; `options` are fields of Encoder."""
    return _write(path, replace(Encoder(), **options))


def write_nomic_bert(path: Path, **options: Any) -> Path:
    """Write a nomic-bert: rotary positions, fused QKV, a gated MLP."""
    return _write(path, replace(Encoder(arch="nomic-bert", name="synthetic nomic"), **options))


def write_reranker(path: Path, **options: Any) -> Path:
    """Write a BERT that ranks: what it embeds are scores."""
    return _write(path, replace(Encoder(name="synthetic reranker", pooling="rank"), **options))


def _write(path: Path, shape: Encoder) -> Path:
    file = GgufFile(path, shape.arch)
    writer = file.writer
    writer.add_name(shape.name)
    writer.add_file_type(FILE_TYPES[shape.quant])
    writer.add_block_count(shape.n_layer)
    writer.add_context_length(shape.n_ctx_train)
    writer.add_embedding_length(shape.n_embd)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_layer_norm_eps(1e-12)
    writer.add_causal_attention(value=False)
    writer.add_uint32(f"{shape.arch}.pooling_type", _POOLING[shape.pooling])
    if shape.arch == "nomic-bert":
        writer.add_rope_freq_base(1000.0)
    add_wordpiece(writer, shape.n_vocab)
    if shape.rank_prompt:
        writer.add_string("tokenizer.chat_template.rerank", shape.rank_prompt)
    weights = Weights(shape.seed)
    for name, dims in _tensors(shape):
        _add(file, weights, shape, name, dims)
    return file.write()


def _tensors(shape: Encoder) -> Iterator[tuple[str, tuple[int, ...]]]:
    n_embd, n_ff = shape.n_embd, shape.n_ff
    is_bert = shape.arch == "bert"
    yield "token_embd.weight", (shape.n_vocab, n_embd)
    yield "token_types.weight", (2, n_embd)
    if is_bert:
        yield "position_embd.weight", (shape.n_ctx_train, n_embd)
    yield "token_embd_norm.weight", (n_embd,)
    yield "token_embd_norm.bias", (n_embd,)
    for layer in range(shape.n_layer):
        block = f"blk.{layer}."
        if is_bert:
            for part in ("attn_q", "attn_k", "attn_v"):
                yield f"{block}{part}.weight", (n_embd, n_embd)
                yield f"{block}{part}.bias", (n_embd,)
            yield f"{block}attn_output.bias", (n_embd,)
            yield f"{block}ffn_up.bias", (n_ff,)
            yield f"{block}ffn_down.bias", (n_embd,)
        else:
            yield f"{block}attn_qkv.weight", (3 * n_embd, n_embd)
            yield f"{block}ffn_gate.weight", (n_ff, n_embd)
        yield f"{block}attn_output.weight", (n_embd, n_embd)
        yield f"{block}ffn_up.weight", (n_ff, n_embd)
        yield f"{block}ffn_down.weight", (n_embd, n_ff)
        for norm in ("attn_output_norm", "layer_output_norm"):
            yield f"{block}{norm}.weight", (n_embd,)
            yield f"{block}{norm}.bias", (n_embd,)
    yield from _head_tensors(shape)


def _head_tensors(shape: Encoder) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the head's: a hidden layer, then the score (llama.cpp, build_pooling)."""
    if shape.pooling == "rank":
        yield "cls.weight", (shape.n_embd, shape.n_embd)
        yield "cls.bias", (shape.n_embd,)
        yield "cls.output.weight", (1, shape.n_embd)
        yield "cls.output.bias", (1,)


def _add(
    file: GgufFile, weights: Weights, shape: Encoder, name: str, dims: tuple[int, ...]
) -> None:
    if name.endswith("norm.weight"):
        _add_constant(file, name, np.ones(dims, np.float32))
        return
    if name.endswith(".bias"):
        _add_constant(file, name, np.zeros(dims, np.float32))
        return
    kind = tensor_type(shape.quant, name, n_row=dims[-1], layer=0, n_layer=shape.n_layer)
    if name in ("token_types.weight", "position_embd.weight"):
        kind = GgmlType.F32
    std = 1.0 if "embd" in name or "types" in name else 1.5 / float(np.sqrt(dims[-1]))
    file.add(name, kind, dims, lambda: weights.random(kind, dims, std))


def _add_constant(file: GgufFile, name: str, values: np.ndarray[Any, np.dtype[np.float32]]) -> None:
    data: Bytes = values.view(np.uint8)
    file.add(name, GgmlType.F32, values.shape, lambda: iter([data]))
