"""The shape of a model: its layers, the width of its KV cache, and which tensors are experts.

Experts are detected by tensor name, never by metadata: a dense merge may carry
expert_count, and a draft file may hold no experts at all. The pattern is llama.cpp's own
(common/common.h, LLM_FFN_EXPS_REGEX).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """One block of a model; sizes are those of the file's tensors, in bytes."""

    index: int
    # Everything but the expert tensors: attention, norms, router, shared experts, dense FFN.
    dense_bytes: int
    # Tensors that llama.cpp's expert pattern matches: weights, biases and scales.
    expert_bytes: int
    n_expert_tensors: int
    # Elements of K and of V that one token adds to the cache; 0: the layer keeps none.
    n_embd_k: int
    n_embd_v: int
    # The layer attends to a sliding window only (ModelShape.n_swa tokens).
    is_swa: bool = False
    # Bytes of recurrent state (Mamba, RWKV) that each sequence keeps; 0: a plain layer.
    state_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """All that placement needs to know of a model, and what a listing shows."""

    arch: str
    title: str
    # As GGUF prints it: "Q4_K_M", "F16"; from general.file_type, else the commonest type.
    quantization: str
    n_params: int
    file_bytes: int
    n_layer: int
    n_ctx_train: int
    n_embd: int
    n_vocab: int
    n_head: int
    n_ff: int
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
    def n_expert_tensors(self) -> int:
        """Number of all expert tensors."""
        return sum(layer.n_expert_tensors for layer in self.layers)
