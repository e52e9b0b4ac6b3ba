"""Header-only GGUF files with the exact shapes of published models.

A file's header is real and whole; its weights are a hole of the right size, so that a 78 GiB
model takes some KiB of disk. Each tensor gets the type that llama.cpp's own llama-quantize
gives it (llama_tensor_get_type_impl and tensor_type_fallback in src/llama-quant.cpp), so that
sizes are exact without any table of sizes. llama.cpp itself loads these files (no_alloc).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

FileType = Literal[
    "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K", "Q4_0", "MXFP4"
]

# name: (GGML id, elements of a block, bytes of a block); ggml/src/ggml-common.h.
GGML_TYPES = {
    "F32": (0, 1, 4),
    "F16": (1, 1, 2),
    "Q4_0": (2, 32, 18),
    "Q5_0": (6, 32, 22),
    "Q5_1": (7, 32, 24),
    "Q8_0": (8, 32, 34),
    "Q2_K": (10, 256, 84),
    "Q3_K": (11, 256, 110),
    "Q4_K": (12, 256, 144),
    "Q5_K": (13, 256, 176),
    "Q6_K": (14, 256, 210),
    "BF16": (30, 1, 2),
    "MXFP4": (39, 32, 17),
}
# general.file_type; include/llama.h, enum llama_ftype.
FTYPES: dict[FileType, int] = {
    "F16": 1, "Q4_0": 2, "Q8_0": 7, "Q2_K": 10, "Q3_K_M": 12, "Q4_K_M": 15, "Q5_K_M": 17,
    "Q6_K": 18, "BF16": 32, "MXFP4": 38,
}  # fmt: skip
DEFAULT_TYPES: dict[FileType, str] = {
    "F16": "F16", "BF16": "BF16", "Q8_0": "Q8_0", "Q6_K": "Q6_K", "Q5_K_M": "Q5_K",
    "Q4_K_M": "Q4_K", "Q3_K_M": "Q3_K", "Q2_K": "Q2_K", "Q4_0": "Q4_0", "MXFP4": "MXFP4",
}  # fmt: skip
# tensor_type_fallback: what a row that is no whole number of blocks gets instead.
FALLBACKS = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Spec:
    """A model before quantization: its metadata and its tensors, ne0 first."""

    arch: str
    title: str
    metadata: dict[str, int | float | str | bool | list[int] | list[bool]]
    tensors: tuple[tuple[str, Shape], ...]
    n_vocab: int
    n_layer: int
    n_head: int
    n_head_kv: int
    n_expert: int = 0
    # Types that the published conversion fixes, by a part of the name (GPT-OSS experts).
    fixed: dict[str, str] = field(default_factory=dict)
    tokenizer: Literal["gpt2", "bert"] = "gpt2"

    @property
    def is_tied(self) -> bool:
        """Whether the output uses the token embeddings."""
        return all(name != "output.weight" for name, _ in self.tensors)


def n_bytes(type_name: str, shape: Shape) -> int:
    """Return the bytes of a tensor; its rows are whole blocks."""
    _, block, size = GGML_TYPES[type_name]
    assert shape[0] % block == 0, (type_name, shape)
    return math.prod(shape) // block * size


def write_gguf(path: Path, spec: Spec, file_type: FileType) -> Path:
    """Write the header of `spec` at `file_type` and leave a hole for the weights."""
    infos = list(quantized(spec, file_type))
    metadata = {
        "general.architecture": spec.arch,
        "general.name": spec.title,
        "general.file_type": FTYPES[file_type],
        **{f"{spec.arch}.{key}": value for key, value in spec.metadata.items()},
    }
    table, offset = [], 0
    for name, shape, type_name in infos:
        dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        table.append(_string(name) + dims + struct.pack("<IQ", GGML_TYPES[type_name][0], offset))
        offset += _padded(n_bytes(type_name, shape))
    pairs = [_string(key) + _value(value) for key, value in metadata.items()]
    pairs += _tokenizer(spec)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(table), len(pairs)) + b"".join(pairs + table)
    with path.open("wb") as file:
        file.write(head)
        file.truncate(_padded(len(head)) + offset)
    return path


# --- llama-quantize ---------------------------------------------------------------------------


def quantized(spec: Spec, file_type: FileType) -> Iterator[tuple[str, Shape, str]]:
    """Yield (name, shape, type) of each tensor as llama-quantize writes it."""
    n_attn_v = sum(any(p in name for p in _ATTN_V) for name, _ in spec.tensors)
    i_attn_v = 0
    for name, shape in spec.tensors:
        fixed = next((t for part, t in spec.fixed.items() if part in name), None)
        if fixed is not None and name.endswith("weight"):
            yield name, shape, fixed
            continue
        if not _is_quantizable(name, shape):
            yield name, shape, "F32"
            continue
        wanted = _wanted_type(spec, name, file_type, i_attn_v, n_attn_v)
        i_attn_v += any(p in name for p in _ATTN_V)
        yield name, shape, _fallback(wanted, shape)


_ATTN_V = ("attn_v.weight", "attn_qkv.weight", "attn_kv_b.weight")
_KEPT = ("_norm.weight", "ffn_gate_inp.weight", "ssm_conv1d", "position_embd", "token_types")


def _is_quantizable(name: str, shape: Shape) -> bool:
    """tensor_allows_quantization."""
    return len(shape) > 1 and name.endswith("weight") and not any(part in name for part in _KEPT)


def _wanted_type(spec: Spec, name: str, file_type: FileType, i_v: int, n_v: int) -> str:  # noqa: C901, PLR0912 -- in the order of the C++ it restates
    """llama_tensor_get_type_impl without an importance matrix."""
    default = DEFAULT_TYPES[file_type]
    if file_type in ("F16", "BF16"):
        return default
    is_embd = name == "token_embd.weight"
    if name == "output.weight" or (is_embd and spec.is_tied):
        return "Q8_0" if default == "Q8_0" or file_type == "MXFP4" else "Q6_K"
    if file_type == "MXFP4":
        return "MXFP4" if "_exps" in name else "Q8_0"
    if is_embd:
        return default
    layer = int(name.split(".")[1]) if name.startswith("blk.") else 0
    n_gqa = spec.n_head // max(1, spec.n_head_kv)
    if any(part in name for part in _ATTN_V):
        if spec.n_expert == 8:
            return "Q8_0"
        if file_type == "Q2_K":
            return "Q4_K" if n_gqa >= 4 else "Q3_K"
        if file_type == "Q3_K_M":
            return "Q5_K" if i_v < 2 else "Q4_K"
        if file_type in ("Q4_K_M", "Q5_K_M"):
            return "Q6_K" if _use_more_bits(i_v, n_v) else default
    elif "attn_k.weight" in name and spec.n_expert == 8:
        return "Q8_0"
    elif "ffn_down" in name:
        if file_type == "Q2_K":
            return "Q3_K"
        if file_type == "Q3_K_M":
            return "Q5_K" if layer < spec.n_layer // 16 else "Q4_K"
        if file_type in ("Q4_K_M", "Q5_K_M") and _use_more_bits(layer, spec.n_layer):
            return "Q6_K"
    elif "attn_output.weight" in name:
        if spec.n_expert == 8 and file_type in ("Q2_K", "Q3_K_M", "Q4_K_M"):
            return "Q5_K"
        if file_type in ("Q2_K", "Q3_K_M"):
            return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K"}[file_type]
    return default


def _use_more_bits(i_layer: int, n_layer: int) -> bool:
    eighth = n_layer // 8
    return i_layer < eighth or i_layer >= 7 * n_layer // 8 or (i_layer - eighth) % 3 == 2


def _fallback(type_name: str, shape: Shape) -> str:
    """tensor_type_fallback."""
    if shape[0] % GGML_TYPES[type_name][1] == 0:
        return type_name
    smaller = FALLBACKS.get(type_name, type_name)
    return smaller if shape[0] % GGML_TYPES[smaller][1] == 0 else "F16"


# --- GGUF -------------------------------------------------------------------------------------


def _padded(size: int) -> int:
    return (size + 31) // 32 * 32


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: object) -> bytes:
    """Return the type and the value; an int is a uint32, a float a float32."""
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _string(value)
    assert isinstance(value, list)
    if isinstance(value[0], bool):
        return struct.pack(f"<IIQ{len(value)}?", 9, 7, len(value), *value)
    return struct.pack(f"<IIQ{len(value)}i", 9, 5, len(value), *value)


def _tokenizer(spec: Spec) -> list[bytes]:
    """Return the pairs of a vocabulary that llama.cpp accepts: bytes, then made-up words."""
    pairs = [_string("tokenizer.ggml.model") + _value(spec.tokenizer)]
    if spec.tokenizer == "bert":
        first = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        pairs.append(_string("tokenizer.ggml.token_type_count") + _value(2))
    else:
        first = [_byte_token(byte) for byte in range(256)] + ["\u0120t"]
        merges = struct.pack("<IIQ", 9, 8, 1) + _string("\u0120 t")
        pairs.append(_string("tokenizer.ggml.merges") + merges)
        pairs.append(_string("tokenizer.ggml.pre") + _value("default"))
        pairs.append(_string("tokenizer.ggml.bos_token_id") + _value(spec.n_vocab - 2))
        pairs.append(_string("tokenizer.ggml.eos_token_id") + _value(spec.n_vocab - 1))
    words = first + [f"<{i}>" for i in range(len(first), spec.n_vocab)]
    tokens = struct.pack("<IIQ", 9, 8, len(words)) + b"".join(map(_string, words))
    types = struct.pack(f"<IIQ{len(words)}i", 9, 5, len(words), *([1] * len(words)))
    pairs.append(_string("tokenizer.ggml.tokens") + tokens)
    pairs.append(_string("tokenizer.ggml.token_type") + types)
    return pairs


def _byte_token(byte: int) -> str:
    """Return GPT-2's printable stand-in for a byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    if byte in plain:
        return chr(byte)
    return chr(256 + sum(other not in plain for other in range(byte)))


# --- models -----------------------------------------------------------------------------------


def _layers(
    n_layer: int, build: Callable[[int], list[tuple[str, Shape]]]
) -> list[tuple[str, Shape]]:
    return [(f"blk.{i}.{name}", shape) for i in range(n_layer) for name, shape in build(i)]


def _attention(n_embd: int, n_q: int, n_kv: int, *, bias: bool = False) -> list[tuple[str, Shape]]:
    pairs = [
        ("q", (n_embd, n_q)),
        ("k", (n_embd, n_kv)),
        ("v", (n_embd, n_kv)),
        ("output", (n_q, n_embd)),
    ]
    tensors: list[tuple[str, Shape]] = []
    for part, shape in pairs:
        tensors.append((f"attn_{part}.weight", shape))
        if bias:
            tensors.append((f"attn_{part}.bias", (shape[1],)))
    return tensors


def _norms(n_embd: int, *names: str, bias: bool = False) -> list[tuple[str, Shape]]:
    parts = ("weight", "bias") if bias else ("weight",)
    return [(f"{name}.{part}", (n_embd,)) for name in names for part in parts]


def _ffn(n_embd: int, n_ff: int, suffix: str = "", experts: Shape = ()) -> list[tuple[str, Shape]]:
    return [
        (f"ffn_gate{suffix}.weight", (n_embd, n_ff, *experts)),
        (f"ffn_down{suffix}.weight", (n_ff, n_embd, *experts)),
        (f"ffn_up{suffix}.weight", (n_embd, n_ff, *experts)),
    ]


def _common(
    n_embd: int, n_vocab: int, *, tied: bool = False, bias: bool = False
) -> list[tuple[str, Shape]]:
    tensors: list[tuple[str, Shape]] = [("token_embd.weight", (n_embd, n_vocab))]
    tensors += _norms(n_embd, "output_norm", bias=bias)
    if not tied:
        tensors.append(("output.weight", (n_embd, n_vocab)))
    if bias:
        tensors.append(("output.bias", (n_vocab,)))
    return tensors


def _spec(arch: str, title: str, tensors: list[tuple[str, Shape]], **facts: object) -> Spec:
    """Build a Spec from the usual facts; others are metadata keys with `__` for a dot."""
    known = {key: facts.pop(key) for key in ("n_vocab", "fixed", "tokenizer") if key in facts}
    renamed = {
        "block_count": facts.pop("n_layer"),
        "context_length": facts.pop("n_ctx"),
        "embedding_length": facts.pop("n_embd"),
        "attention.head_count": facts.pop("n_head"),
        "attention.head_count_kv": facts.pop("n_head_kv"),
        "feed_forward_length": facts.pop("n_ff"),
        "attention.layer_norm_rms_epsilon": 1e-6,
        "vocab_size": known["n_vocab"],
        **{key.replace("__", "."): value for key, value in facts.items()},
    }
    return Spec(
        arch=arch, title=title, metadata=renamed, tensors=tuple(tensors),
        n_layer=renamed["block_count"], n_head=renamed["attention.head_count"],
        n_head_kv=renamed["attention.head_count_kv"], n_expert=facts.get("expert_count", 0),
        **known,
    )  # type: ignore[arg-type]  # fmt: skip


def deepseek_moe_16b() -> Spec:
    """DeepSeek-MoE-16B: 28 layers, the first dense, 64 experts and 2 shared ones."""

    def layer(i: int) -> list[tuple[str, Shape]]:
        tensors = _norms(2048, "attn_norm", "ffn_norm") + _attention(2048, 2048, 2048)
        if i == 0:
            return tensors + _ffn(2048, 10944)
        tensors.append(("ffn_gate_inp.weight", (2048, 64)))
        return tensors + _ffn(2048, 1408, "_exps", (64,)) + _ffn(2048, 2816, "_shexp")

    return _spec(
        "deepseek", "DeepSeek MoE 16B", _common(2048, 102400) + _layers(28, layer),
        n_layer=28, n_ctx=4096, n_embd=2048, n_head=16, n_head_kv=16, n_ff=10944, n_vocab=102400,
        expert_count=64, expert_used_count=6, expert_shared_count=2, expert_weights_scale=1.0,
        expert_feed_forward_length=1408, leading_dense_block_count=1, rope__dimension_count=128,
    )  # fmt: skip


def phi35_moe() -> Spec:
    """Phi-3.5-MoE: 32 layers of 16 experts, LayerNorm and biases."""

    def layer(i: int) -> list[tuple[str, Shape]]:
        tensors = _norms(4096, "attn_norm", "ffn_norm", bias=True)
        tensors += _attention(4096, 4096, 1024, bias=True)
        # blk.N has none of its own: rope_factors are the model's, once.
        return [*tensors, ("ffn_gate_inp.weight", (4096, 16)), *_ffn(4096, 6400, "_exps", (16,))]

    factors: list[tuple[str, Shape]] = [
        ("rope_factors_long.weight", (64,)),
        ("rope_factors_short.weight", (64,)),
    ]
    return _spec(
        "phimoe", "Phi 3.5 MoE", factors + _common(4096, 32064, bias=True) + _layers(32, layer),
        n_layer=32, n_ctx=131072, n_embd=4096, n_head=32, n_head_kv=8, n_ff=6400, n_vocab=32064,
        expert_count=16, expert_used_count=2, rope__dimension_count=128,
        attention__sliding_window=131072, rope__scaling__original_context_length=4096,
    )  # fmt: skip


def gpt_oss_20b() -> Spec:
    """GPT-OSS-20B: 24 layers of 32 experts in MXFP4, every other one with a window of 128."""

    def layer(i: int) -> list[tuple[str, Shape]]:
        tensors = _norms(2880, "attn_norm", "post_attention_norm")
        tensors += _attention(2880, 4096, 512, bias=True)
        tensors += [
            ("attn_sinks.weight", (64,)),
            ("ffn_gate_inp.weight", (2880, 32)),
            ("ffn_gate_inp.bias", (32,)),
        ]
        for part in ("gate", "down", "up"):
            tensors += [
                (f"ffn_{part}_exps.weight", (2880, 2880, 32)),
                (f"ffn_{part}_exps.bias", (2880, 32)),
            ]
        return tensors

    return _spec(
        "gpt-oss", "GPT OSS 20B", _common(2880, 201088) + _layers(24, layer),
        n_layer=24, n_ctx=131072, n_embd=2880, n_head=64, n_head_kv=8, n_ff=2880, n_vocab=201088,
        expert_count=32, expert_used_count=4, expert_feed_forward_length=2880,
        attention__key_length=64, attention__value_length=64, attention__sliding_window=128,
        fixed={"_exps": "MXFP4"},
    )  # fmt: skip


def mixtral_8x7b() -> Spec:
    """Mixtral-8x7B: 32 layers of 8 experts under the architecture `llama`."""

    def layer(i: int) -> list[tuple[str, Shape]]:
        tensors = _norms(4096, "attn_norm", "ffn_norm") + _attention(4096, 4096, 1024)
        return [*tensors, ("ffn_gate_inp.weight", (4096, 8)), *_ffn(4096, 14336, "_exps", (8,))]

    return _spec(
        "llama", "Mixtral 8x7B", _common(4096, 32000) + _layers(32, layer),
        n_layer=32, n_ctx=32768, n_embd=4096, n_head=32, n_head_kv=8, n_ff=14336, n_vocab=32000,
        expert_count=8, expert_used_count=2, rope__dimension_count=128,
    )  # fmt: skip


def qwen3_30b_a3b() -> Spec:
    """Qwen3-30B-A3B: 48 layers of 128 experts, heads wider than the model."""

    def layer(i: int) -> list[tuple[str, Shape]]:
        tensors = _norms(2048, "attn_norm", "ffn_norm") + _norms(128, "attn_q_norm", "attn_k_norm")
        tensors += _attention(2048, 4096, 512)
        return [*tensors, ("ffn_gate_inp.weight", (2048, 128)), *_ffn(2048, 768, "_exps", (128,))]

    return _spec(
        "qwen3moe", "Qwen3 30B A3B", _common(2048, 151936) + _layers(48, layer),
        n_layer=48, n_ctx=40960, n_embd=2048, n_head=32, n_head_kv=4, n_ff=6144, n_vocab=151936,
        expert_count=128, expert_used_count=8, expert_feed_forward_length=768,
        attention__key_length=128, attention__value_length=128,
    )  # fmt: skip


def deepseek_v2_lite() -> Spec:
    """DeepSeek-V2-Lite: multi-head latent attention, one latent of 576 per token."""

    def layer(i: int) -> list[tuple[str, Shape]]:
        tensors: list[tuple[str, Shape]] = [
            *_norms(2048, "attn_norm", "ffn_norm"), ("attn_kv_a_norm.weight", (512,)),
            ("attn_q.weight", (2048, 3072)), ("attn_kv_a_mqa.weight", (2048, 576)),
            ("attn_k_b.weight", (128, 512, 16)), ("attn_v_b.weight", (512, 128, 16)),
            ("attn_output.weight", (2048, 2048)),
        ]  # fmt: skip
        if i == 0:
            return tensors + _ffn(2048, 10944)
        tensors.append(("ffn_gate_inp.weight", (2048, 64)))
        return tensors + _ffn(2048, 1408, "_exps", (64,)) + _ffn(2048, 2816, "_shexp")

    return _spec(
        "deepseek2", "DeepSeek V2 Lite", _common(2048, 102400) + _layers(27, layer),
        n_layer=27, n_ctx=163840, n_embd=2048, n_head=16, n_head_kv=1, n_ff=10944, n_vocab=102400,
        expert_count=64, expert_used_count=6, expert_shared_count=2, expert_weights_scale=1.0,
        expert_feed_forward_length=1408, leading_dense_block_count=1, rope__dimension_count=64,
        attention__kv_lora_rank=512, attention__key_length=576, attention__value_length=512,
        attention__key_length_mla=192, attention__value_length_mla=128,
    )  # fmt: skip


def llama3_8b() -> Spec:
    """Llama-3.1-8B: dense."""

    def layer(i: int) -> list[tuple[str, Shape]]:
        return (
            _norms(4096, "attn_norm", "ffn_norm") + _attention(4096, 4096, 1024) + _ffn(4096, 14336)
        )

    return _spec(
        "llama", "Llama 3.1 8B",
        [*_common(4096, 128256), ("rope_freqs.weight", (64,)), *_layers(32, layer)],
        n_layer=32, n_ctx=131072, n_embd=4096, n_head=32, n_head_kv=8, n_ff=14336, n_vocab=128256,
        rope__dimension_count=128,
    )  # fmt: skip


def llama3_70b() -> Spec:
    """Llama-3.1-70B: dense, larger than most cards."""

    def layer(i: int) -> list[tuple[str, Shape]]:
        return (
            _norms(8192, "attn_norm", "ffn_norm") + _attention(8192, 8192, 1024) + _ffn(8192, 28672)
        )

    return _spec(
        "llama", "Llama 3.1 70B", _common(8192, 128256) + _layers(80, layer),
        n_layer=80, n_ctx=131072, n_embd=8192, n_head=64, n_head_kv=8, n_ff=28672, n_vocab=128256,
        rope__dimension_count=128,
    )  # fmt: skip


def gemma3_12b() -> Spec:
    """Gemma-3-12B: tied embeddings of 262,144 tokens, five layers of six with a window of 1024."""

    def layer(i: int) -> list[tuple[str, Shape]]:
        names = ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")
        tensors = _norms(3840, *names) + _norms(256, "attn_q_norm", "attn_k_norm")
        return tensors + _attention(3840, 4096, 2048) + _ffn(3840, 15360)

    return _spec(
        "gemma3", "Gemma 3 12B", _common(3840, 262144, tied=True) + _layers(48, layer),
        n_layer=48, n_ctx=131072, n_embd=3840, n_head=16, n_head_kv=8, n_ff=15360, n_vocab=262144,
        attention__key_length=256, attention__value_length=256, attention__sliding_window=1024,
    )  # fmt: skip


def mamba_3b() -> Spec:
    """Mamba-2.8B: no KV cache, a recurrent state per sequence."""
    inner, state, rank = 5120, 16, 160

    def layer(i: int) -> list[tuple[str, Shape]]:
        return [
            *_norms(2560, "attn_norm"), ("ssm_in.weight", (2560, 2 * inner)),
            ("ssm_conv1d.weight", (4, inner)), ("ssm_conv1d.bias", (inner,)),
            ("ssm_x.weight", (inner, rank + 2 * state)), ("ssm_dt.weight", (rank, inner)),
            ("ssm_dt.bias", (inner,)), ("ssm_a", (state, inner)), ("ssm_d", (inner,)),
            ("ssm_out.weight", (inner, 2560)),
        ]  # fmt: skip

    return _spec(
        "mamba", "Mamba 2.8B", _common(2560, 50280, tied=True) + _layers(64, layer),
        n_layer=64, n_ctx=1048576, n_embd=2560, n_head=0, n_head_kv=0, n_ff=0, n_vocab=50280,
        ssm__conv_kernel=4, ssm__inner_size=inner, ssm__state_size=state, ssm__time_step_rank=rank,
    )  # fmt: skip


def bge_base() -> Spec:
    """A BERT of 110M parameters: embeddings only, no cache, attention both ways."""

    def layer(i: int) -> list[tuple[str, Shape]]:
        tensors = _attention(768, 768, 768, bias=True)
        tensors += _norms(768, "attn_output_norm", "layer_output_norm", bias=True)
        return [
            *tensors, ("ffn_up.weight", (768, 3072)), ("ffn_up.bias", (3072,)),
            ("ffn_down.weight", (3072, 768)), ("ffn_down.bias", (768,)),
        ]  # fmt: skip

    first: list[tuple[str, Shape]] = [
        ("token_embd.weight", (768, 30522)), ("token_types.weight", (768, 2)),
        ("position_embd.weight", (768, 512)), *_norms(768, "token_embd_norm", bias=True),
    ]  # fmt: skip
    return _spec(
        "bert", "BGE base", first + _layers(12, layer),
        n_layer=12, n_ctx=512, n_embd=768, n_head=12, n_head_kv=12, n_ff=3072, n_vocab=30522,
        tokenizer="bert", attention__causal=False, pooling_type=2,
        attention__layer_norm_epsilon=1e-12,
    )  # fmt: skip


MODELS: dict[str, Callable[[], Spec]] = {
    "deepseek-moe-16b": deepseek_moe_16b,
    "phi-3.5-moe": phi35_moe,
    "gpt-oss-20b": gpt_oss_20b,
    "mixtral-8x7b": mixtral_8x7b,
    "qwen3-30b-a3b": qwen3_30b_a3b,
    "deepseek-v2-lite": deepseek_v2_lite,
    "llama3-8b": llama3_8b,
    "llama3-70b": llama3_70b,
    "gemma3-12b": gemma3_12b,
    "mamba-2.8b": mamba_3b,
    "bge-base": bge_base,
}
