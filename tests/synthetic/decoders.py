"""Models that generate: llama, mixtral-style, deepseek, qwen3moe; tiny by default.

Their weights are random with gains chosen so that each layer changes the stream about as
much as the embedding made it: greedy text depends on the whole context and does not fall
into one token. Control tokens and bytes outside printable ASCII are never the likeliest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from gguf import GGMLQuantizationType as GgmlType

from tests.synthetic.gguf_file import GgufFile
from tests.synthetic.vocabulary import CHATML, Vocabulary, bpe_vocabulary
from tests.synthetic.weights import FILE_TYPES, Quant, Weights, tensor_type

Arch = Literal["llama", "deepseek", "qwen3moe"]

# Gains over 1/sqrt(row): peaked attention, and MLP outputs as large as the stream.
_GAINS = {
    "attn_q": 2.0,
    "attn_k": 2.0,
    "attn_output": 2.0,
    "ffn_down": 2.0,
    "ffn_down_exps": 4.0,
    "ffn_down_shexp": 2.0,
}


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """The shape of a decoder; n_expert > 0 makes the layers from n_layer_dense on MoE."""

    arch: Arch = "llama"
    name: str = "synthetic"
    seed: int = 1
    quant: Quant = "f32"
    n_layer: int = 2
    n_embd: int = 64
    n_head: int = 4
    n_head_kv: int = 2
    n_embd_head: int | None = None
    n_ff: int = 128
    n_vocab: int = 512
    n_ctx_train: int = 4096
    n_expert: int = 0
    n_expert_used: int = 2
    n_expert_shared: int = 0
    n_expert_ff: int = 64
    n_layer_dense: int = 0
    chat_template: str | None = CHATML
    add_bos: bool = True
    # llama.cpp's name of the rules that cut text into words.
    tokenizer_pre: str = "default"
    # None: a generating model; "mean", "cls" or "last": one that embeds.
    pooling: Literal["mean", "cls", "last"] | None = None
    # Part the file at this many tensors; 0: one file.
    split_max_tensors: int = 0
    # Keys and tensor table only: the weights are a hole.
    header_only: bool = False

    @property
    def head_size(self) -> int:
        """Elements of one attention head."""
        return self.n_embd_head or self.n_embd // self.n_head

    def is_moe(self, layer: int) -> bool:
        """Whether a layer has experts."""
        return self.n_expert > 0 and layer >= self.n_layer_dense


_LLAMA = Decoder(arch="llama", name="synthetic llama")
_MIXTRAL = replace(_LLAMA, name="synthetic mixtral", n_layer=3, n_expert=4, n_expert_ff=96, n_ff=96)
_DEEPSEEK = Decoder(
    arch="deepseek",
    name="synthetic deepseek",
    n_layer=4,
    n_head_kv=4,
    n_expert=8,
    n_expert_shared=2,
    n_expert_ff=32,
    n_layer_dense=1,
)
_QWEN3MOE = Decoder(
    arch="qwen3moe",
    name="synthetic qwen3moe",
    n_layer=3,
    n_embd_head=32,
    n_expert=8,
    n_expert_ff=32,
    add_bos=False,
)
_DEEPSEEK_16B = Decoder(
    arch="deepseek",
    name="synthetic deepseek-moe-16b",
    quant="q4_k_m",
    n_layer=28,
    n_embd=2048,
    n_head=16,
    n_head_kv=16,
    n_ff=10944,
    n_vocab=102400,
    n_expert=64,
    n_expert_used=6,
    n_expert_shared=2,
    n_expert_ff=1408,
    n_layer_dense=1,
)
_DENSE_200M = Decoder(
    name="synthetic dense-200m",
    quant="q4_k_m",
    n_layer=12,
    n_embd=1024,
    n_head=16,
    n_head_kv=8,
    n_ff=2816,
    n_vocab=32000,
)

# Sizes by name, for benchmarks and demonstrations.
PRESETS: Mapping[str, Decoder] = MappingProxyType(
    {
        "llama": _LLAMA,
        "mixtral": _MIXTRAL,
        "deepseek": _DEEPSEEK,
        "qwen3moe": _QWEN3MOE,
        # 0.21 billion parameters.
        "dense-200m": _DENSE_200M,
        # 0.31 billion, of which 0.16 work on a token.
        "moe-300m": replace(
            _DENSE_200M,
            name="synthetic moe-300m",
            n_layer=6,
            n_ff=1024,
            n_expert=12,
            n_expert_used=4,
            n_expert_ff=1024,
        ),
        # 8.15 billion parameters, 5.3 GB; the whole shape: 16.38 billion, 10.9 GB.
        "deepseek-8b": replace(_DEEPSEEK_16B, name="synthetic deepseek-moe-8b", n_layer=14),
        "deepseek-16b": _DEEPSEEK_16B,
    }
)


def write_llama(path: Path, **options: Any) -> Path:
    """Write a dense llama; `options` are fields of Decoder. Returns the (first) file's path."""
    return write_decoder(path, replace(_LLAMA, **options))


def write_mixtral(path: Path, **options: Any) -> Path:
    """Write a llama whose layers all have experts, as Mixtral's do."""
    return write_decoder(path, replace(_MIXTRAL, **options))


def write_deepseek(path: Path, **options: Any) -> Path:
    """Write a DeepSeek-MoE: a dense first layer, then experts beside shared experts."""
    return write_decoder(path, replace(_DEEPSEEK, **options))


def write_qwen3moe(path: Path, **options: Any) -> Path:
    """Write a Qwen3-MoE: experts in all layers, norms on Q and K, heads wider than n_embd."""
    return write_decoder(path, replace(_QWEN3MOE, **options))


def write_preset(path: Path, name: str, **options: Any) -> Path:
    """Write one of PRESETS."""
    return write_decoder(path, replace(PRESETS[name], **options))


def write_decoder(path: Path, shape: Decoder) -> Path:
    """Write a decoder of any shape; return the path of the (first) file."""
    file = GgufFile(
        path,
        shape.arch,
        split_max_tensors=shape.split_max_tensors,
        header_only=shape.header_only,
    )
    vocabulary = bpe_vocabulary(shape.n_vocab, pre=shape.tokenizer_pre)
    _add_keys(file, shape)
    vocabulary.add_to(file.writer, add_bos=shape.add_bos, chat_template=shape.chat_template)
    _add_tensors(file, shape, vocabulary)
    return file.write()


def _add_keys(file: GgufFile, shape: Decoder) -> None:
    writer = file.writer
    writer.add_name(shape.name)
    writer.add_file_type(FILE_TYPES[shape.quant])
    writer.add_quantization_version(2)
    writer.add_block_count(shape.n_layer)
    writer.add_context_length(shape.n_ctx_train)
    writer.add_embedding_length(shape.n_embd)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_key_length(shape.head_size)
    writer.add_value_length(shape.head_size)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(shape.head_size)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(shape.n_vocab)
    if shape.pooling is not None:
        # llama.h, enum llama_pooling_type.
        writer.add_uint32(
            f"{shape.arch}.pooling_type", {"mean": 1, "cls": 2, "last": 3}[shape.pooling]
        )
    if shape.n_expert:
        writer.add_expert_count(shape.n_expert)
        writer.add_expert_used_count(shape.n_expert_used)
    if shape.arch != "llama" and shape.n_expert:
        writer.add_expert_feed_forward_length(shape.n_expert_ff)
    if shape.arch == "deepseek":
        writer.add_leading_dense_block_count(shape.n_layer_dense)
        writer.add_expert_shared_count(shape.n_expert_shared)
        writer.add_expert_weights_scale(1.0)


def _add_tensors(file: GgufFile, shape: Decoder, vocabulary: Vocabulary) -> None:
    weights = Weights(shape.seed)
    embeddings = (shape.n_vocab, shape.n_embd)
    # One per row's root: logits of standard deviation 2, so that sampling has likely tokens.
    std_output = 2.0 / float(np.sqrt(shape.n_embd))

    def kind_of(name: str, n_row: int, layer: int = 0) -> GgmlType:
        return tensor_type(shape.quant, name, n_row=n_row, layer=layer, n_layer=shape.n_layer)

    kind = kind_of("token_embd.weight", shape.n_embd)
    file.add("token_embd.weight", kind, embeddings, lambda: weights.random(kind, embeddings, 1.0))
    _add_norm(file, "output_norm.weight", shape.n_embd)
    out = kind_of("output.weight", shape.n_embd)
    file.add(
        "output.weight",
        out,
        embeddings,
        lambda: weights.random_muted(out, embeddings, std_output, vocabulary.muted),
    )
    for layer in range(shape.n_layer):
        for suffix, size in _norms(shape).items():
            _add_norm(file, f"blk.{layer}.{suffix}.weight", size)
        for suffix, dims in _matrices(shape, layer).items():
            name = f"blk.{layer}.{suffix}.weight"
            std = _GAINS.get(suffix, 1.0) / float(np.sqrt(dims[-1]))
            row_kind = kind_of(name, dims[-1], layer)
            file.add(name, row_kind, dims, partial(weights.random, row_kind, dims, std))


def _add_norm(file: GgufFile, name: str, size: int) -> None:
    ones = np.ones(size, np.float32).view(np.uint8)
    file.add(name, GgmlType.F32, (size,), lambda: iter([ones]))


def _norms(shape: Decoder) -> dict[str, int]:
    norms = {"attn_norm": shape.n_embd, "ffn_norm": shape.n_embd}
    if shape.arch == "qwen3moe":
        norms |= {"attn_q_norm": shape.head_size, "attn_k_norm": shape.head_size}
    return norms


def _matrices(shape: Decoder, layer: int) -> dict[str, tuple[int, ...]]:
    n_q, n_kv = shape.n_head * shape.head_size, shape.n_head_kv * shape.head_size
    n_embd, n_ff = shape.n_embd, shape.n_ff
    matrices: dict[str, tuple[int, ...]] = {
        "attn_q": (n_q, n_embd),
        "attn_k": (n_kv, n_embd),
        "attn_v": (n_kv, n_embd),
        "attn_output": (n_embd, n_q),
    }
    if not shape.is_moe(layer):
        return matrices | {
            "ffn_gate": (n_ff, n_embd),
            "ffn_up": (n_ff, n_embd),
            "ffn_down": (n_embd, n_ff),
        }
    n_expert, n_expert_ff = shape.n_expert, shape.n_expert_ff
    matrices |= {
        "ffn_gate_inp": (n_expert, n_embd),
        "ffn_gate_exps": (n_expert, n_expert_ff, n_embd),
        "ffn_up_exps": (n_expert, n_expert_ff, n_embd),
        "ffn_down_exps": (n_expert, n_embd, n_expert_ff),
    }
    if shape.n_expert_shared:
        n_shared_ff = n_expert_ff * shape.n_expert_shared
        matrices |= {
            "ffn_gate_shexp": (n_shared_ff, n_embd),
            "ffn_up_shexp": (n_shared_ff, n_embd),
            "ffn_down_shexp": (n_embd, n_shared_ff),
        }
    return matrices
