"""The shape of a model: its layers, the width of its KV cache, and which tensors are experts.

Experts are detected by tensor name, never by metadata: a dense merge may carry
expert_count, and a draft file may hold no experts at all. The pattern is llama.cpp's own
(common/common.h, LLM_FFN_EXPS_REGEX).
"""

from __future__ import annotations

from collections import Counter
from typing import Final

import msgspec

from shimpy.errors import GgufError
from shimpy.gguf.cache import Hparams, LayerCache, describe_cache, n_nextn
from shimpy.gguf.header import Header
from shimpy.gguf.quants import FILE_TYPE_NAMES
from shimpy.gguf.tensors import TensorSizes, sum_tensors

_EMBEDDERS: Final = frozenset(
    {
        "bert",
        "eurobert",
        "gemma-embedding",
        "jina-bert-v2",
        "jina-bert-v3",
        "llama-embed",
        "modern-bert",
        "neo-bert",
        "nomic-bert",
        "nomic-bert-moe",
        "t5encoder",
    }
)
# Files that are no models but belong to one, by their architecture and by general.type.
PROJECTOR_ARCH: Final = "clip"
_PARTS: Final = {
    PROJECTOR_ARCH: "a projector (mmproj) for images or sound; put it beside its model",
    "adapter": "a LoRA adapter; it is used together with its model",
    "controlvector": "a control vector; it is used together with its model",
    "imatrix": "an importance matrix, which is made for quantizing",
}
# enum llama_pooling_type: none 0, mean 1, cls 2, last 3, rank 4.
_POOLING_NONE: Final = 0
_POOLING_RANK: Final = 4
# LLAMA_MAX_EXPERTS of llama.cpp.
_MAX_EXPERTS: Final = 1024
# LLAMA_FTYPE_GUESSED, a flag that is added to a file type.
_FTYPE_GUESSED: Final = 1024

# The tokens for filling in the middle, as llama.cpp knows them by key or text (llama-vocab.cpp).
_FIM_KEYS: Final = (
    ("fim_pre_token_id", "prefix_token_id"),
    ("fim_suf_token_id", "suffix_token_id"),
    ("fim_mid_token_id", "middle_token_id"),
)
_FIM_TEXTS: Final = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    # DeepSeek writes full-width bars and word-start signs.
    ("<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>"),
    ("<PRE>", "<SUF>", "<MID>"),
    ("\u2581<PRE>", "\u2581<SUF>", "\u2581<MID>"),
    ("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),
    ("<|prefix|>", "<|suffix|>", "<|middle|>"),
)

SPLIT_EXPERTS_EXPLANATION: Final = (
    "its experts are split into one tensor each (blk.0.ffn_gate.0.weight), the format of before "
    "April 2024: llama.cpp loads it no more, and such tensors don't match the pattern by which "
    "experts stay in RAM; get a newer GGUF of the model, or convert and quantize it again"
)


class LayerShape(msgspec.Struct, frozen=True, kw_only=True):
    """One block of a model; sizes are those of the file's tensors, in bytes."""

    index: int
    # Everything but the expert tensors: attention, norms, router, shared experts, dense FFN.
    dense_bytes: int
    # Tensors that llama.cpp's expert pattern matches: weights, biases and scales.
    expert_bytes: int
    n_expert_tensors: int
    # The largest single tensor among the experts, and among the rest: a layer in host memory
    # passes through the GPU tensor by tensor in prefill, so its compute buffer holds one.
    largest_expert_bytes: int = 0
    largest_dense_bytes: int = 0
    # Elements of K and of V that one token adds to the cache; 0: the layer keeps none.
    n_embd_k: int
    n_embd_v: int
    # The layer attends to a sliding window only (ModelShape.n_swa tokens).
    is_swa: bool = False
    # Bytes of recurrent state (Mamba, RWKV) that each sequence keeps; 0: a plain layer.
    state_bytes: int = 0


class ModelShape(msgspec.Struct, frozen=True, kw_only=True):
    """All that placement needs to know of a model, and what a listing shows."""

    arch: str
    title: str
    # As GGUF prints it: "Q4_K_M", "F16"; from general.file_type, else the commonest type.
    quantization: str
    n_params: int
    file_bytes: int
    n_layer: int
    n_ctx_train: int
    # Past this length positions are turned otherwise (LongRoPE, YaRN); 0: the file says nothing.
    n_ctx_original: int = 0
    n_embd: int
    n_vocab: int
    n_head: int
    n_ff: int
    # Width of one attention head's K (key_length, else n_embd / n_head); 0: no attention.
    n_embd_head: int = 0
    n_expert: int = 0
    n_expert_used: int = 0
    n_expert_shared: int = 0
    n_expert_ff: int = 0
    n_swa: int = 0
    layers: tuple[LayerShape, ...]
    # token_embd and other inputs: always in host memory.
    input_bytes: int
    # output.weight and output_norm (the tied token_embd counts here again: it is copied).
    output_bytes: int
    # K and V are one shared latent per token (DeepSeek-V2 MLA).
    is_mla: bool = False
    # The model computes embeddings or ranks, and generates no text.
    is_embedding: bool = False
    is_reranker: bool = False
    # Mixtral files from before llama.cpp merged experts into one tensor (`ffn_gate.0.weight`).
    has_split_experts: bool = False
    has_fim: bool = False
    chat_template: str | None = None

    @property
    def is_moe(self) -> bool:
        """Whether any layer has expert tensors."""
        return any(layer.n_expert_tensors for layer in self.layers)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers that have expert tensors."""
        return tuple(layer.index for layer in self.layers if layer.n_expert_tensors)

    @property
    def expert_bytes(self) -> int:
        """Bytes of all expert tensors."""
        return sum(layer.expert_bytes for layer in self.layers)

    @property
    def active_bytes(self) -> int:
        """Bytes of the weights that one token is computed with."""
        dense_bytes = sum(layer.dense_bytes for layer in self.layers) + self.output_bytes
        share = self.n_expert_used / self.n_expert if self.n_expert else 0.0
        return dense_bytes + int(self.expert_bytes * share)

    @property
    def n_expert_tensors(self) -> int:
        """Number of all expert tensors."""
        return sum(layer.n_expert_tensors for layer in self.layers)

    @property
    def explanation(self) -> str | None:
        """What hinders the use of this model, in words; None: nothing."""
        return SPLIT_EXPERTS_EXPLANATION if self.has_split_experts else None


class NotAModelError(GgufError):
    """A GGUF file is whole, but holds something that only serves a model."""

    def __init__(self, message: str, *, is_projector: bool) -> None:
        super().__init__(message)
        self.is_projector = is_projector


def describe_model(header: Header) -> ModelShape:
    """Return the shape of the model that a header describes.

    Raises:
        NotAModelError: the file holds a projector, an adapter or the like.
        GgufError: it lacks what llama.cpp demands of one.
    """
    for key in ("general.architecture", "general.type"):
        part = _PARTS.get(header.get_str(key, ""))
        if part is not None:
            raise NotAModelError(
                f"{header.name}: is no model by itself but {part}",
                is_projector=header.metadata.get("general.architecture") == PROJECTOR_ARCH,
            )
    if not header.tensors:
        raise GgufError(f"{header.name}: has no tensors, only metadata (a vocabulary or template)")
    hparams = Hparams(header)
    cache = describe_cache(hparams)
    sizes = sum_tensors(header.tensors, n_loaded=hparams.n_layer - n_nextn(hparams))
    n_expert, n_expert_used = _expert_counts(hparams)
    pooling = hparams.get("pooling_type", _POOLING_NONE)
    is_embedding = hparams.arch in _EMBEDDERS or pooling != _POOLING_NONE
    chat_template = header.metadata.get("tokenizer.chat_template")
    return ModelShape(
        arch=hparams.arch,
        title=_title(header),
        quantization=_quantization(header),
        n_params=sum(tensor.n_elements for tensor in header.tensors),
        file_bytes=header.file_bytes,
        n_layer=hparams.n_layer,
        n_ctx_train=hparams.get("context_length"),
        n_ctx_original=hparams.get("rope.scaling.original_context_length", 0),
        n_embd=hparams.get("embedding_length"),
        n_vocab=_n_vocab(hparams),
        n_head=max(hparams.per_layer("attention.head_count", 0)),
        n_ff=max(hparams.per_layer("feed_forward_length", 0)),
        n_embd_head=cache.n_embd_head,
        n_expert=n_expert,
        n_expert_used=n_expert_used,
        n_expert_shared=hparams.get("expert_shared_count", 0),
        n_expert_ff=max(hparams.per_layer("expert_feed_forward_length", 0)),
        n_swa=cache.n_swa,
        layers=tuple(_layer(i, sizes, kept) for i, kept in enumerate(cache.layers)),
        input_bytes=sizes.input_bytes,
        output_bytes=sizes.output_bytes + (0 if is_embedding else sizes.tied_bytes),
        is_mla=cache.is_mla,
        is_embedding=is_embedding,
        is_reranker=pooling == _POOLING_RANK or (is_embedding and sizes.has_classifier),
        has_split_experts=sizes.has_split_experts,
        has_fim=_has_fim(header),
        chat_template=chat_template if isinstance(chat_template, str) else None,
    )


def _layer(index: int, sizes: TensorSizes, cache: LayerCache) -> LayerShape:
    return LayerShape(
        index=index,
        dense_bytes=sizes.dense[index],
        expert_bytes=sizes.expert[index],
        n_expert_tensors=sizes.n_expert_tensors[index],
        largest_expert_bytes=sizes.largest_expert[index],
        largest_dense_bytes=sizes.largest_dense[index],
        n_embd_k=cache.n_embd_k,
        n_embd_v=cache.n_embd_v,
        is_swa=cache.is_swa,
        state_bytes=cache.state_bytes,
    )


def _expert_counts(hparams: Hparams) -> tuple[int, int]:
    """Return the experts that there are and those used per token, as the metadata has them.

    What is refused here makes llama.cpp abort its process (GGML_ASSERT in load_hparams).
    """
    n_expert = hparams.get("expert_count", 0)
    n_used = max(hparams.per_layer("expert_used_count", 0))
    if hparams.arch in ("hunyuan-dense", "hunyuan_vl") and n_expert <= 1:
        return 0, 0
    if n_expert > _MAX_EXPERTS or n_used > n_expert or (n_expert > 0 and n_used == 0):
        raise GgufError(
            f"{hparams.header.name}: {hparams.arch}.expert_count is {n_expert} and "
            f"expert_used_count is {n_used}; llama.cpp takes at most {_MAX_EXPERTS} experts, of "
            "which 1 or more are used"
        )
    return n_expert, n_used


def _title(header: Header) -> str:
    for key in ("general.name", "general.basename"):
        title = header.metadata.get(key)
        if isinstance(title, str) and title.strip():
            return title.strip()
    return header.get_str("general.architecture")


def _quantization(header: Header) -> str:
    """Return the file's quantization by name: what it says, else the type of most of its bytes."""
    file_type = header.metadata.get("general.file_type")
    if isinstance(file_type, int) and file_type & ~_FTYPE_GUESSED in FILE_TYPE_NAMES:
        return FILE_TYPE_NAMES[file_type & ~_FTYPE_GUESSED]
    by_type: Counter[str] = Counter()
    for tensor in header.tensors:
        by_type[tensor.type.name] += tensor.n_bytes
    return by_type.most_common(1)[0][0] if by_type else "unknown"


def _n_vocab(hparams: Hparams) -> int:
    tokens = hparams.header.get_array("tokenizer.ggml.tokens")
    return hparams.get("vocab_size", 0) if tokens is None else len(tokens)


def _has_fim(header: Header) -> bool:
    """Return whether the vocabulary has tokens for a prefix, a suffix and the middle."""
    tokens = header.get_array("tokenizer.ggml.tokens")
    has_keys = all(
        any(f"tokenizer.ggml.{key}" in header.metadata for key in keys) for keys in _FIM_KEYS
    )
    return has_keys or (
        tokens is not None and any(all(map(tokens.contains_text, texts)) for texts in _FIM_TEXTS)
    )
