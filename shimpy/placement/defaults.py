"""What the planner chooses where the user asked for nothing: context, slots, micro-batch.

The context is the KV budget that all slots share, not what each of them gets; only on a CPU
with RAM to spare each gets as much (`search`). By default it
is what one long text needs, 8192 tokens or the model's own limit, or 1024 tokens for each
slot, whichever is more. Where memory is short it is halved down to 4096 before a slower
placement is taken. With experts in RAM it is 8192 at most, and with layers in RAM 4096, since
there the cache takes the place of weights. Where a model is all on the GPU it is doubled, up
to 32768, as long as the cache takes no more than an eighth of the free VRAM.
"""

from __future__ import annotations

from typing import Final

import msgspec

from shimpy.errors import InvalidOptionError
from shimpy.gguf.arch import ModelShape
from shimpy.placement.memory import KV_BLOCKS, Context, kv_layer_bytes
from shimpy.placement.placement import PlanOptions
from shimpy.protocol.messages import KvType, LoadMode

N_SLOTS_GPU: Final = 16
N_SLOTS_CPU: Final = 8
# Fewer with cells for each are better than more that share them.
N_SLOTS_APART: Final = 4
# Each slot of a recurrent model holds its whole state, used or not.
N_SLOTS_RECURRENT: Final = 4
# LLAMA_MAX_SEQ (src/llama-cparams.h).
MAX_SLOTS: Final = 256

N_CTX_TEXT: Final = 8192
N_CTX_PER_SLOT: Final = 1024
N_CTX_LEAST: Final = 4096
N_CTX_EXPERTS: Final = 8192
N_CTX_MOST: Final = 32768
# Of the free VRAM, for a context longer than the usual one.
KV_SHARE: Final = 8

N_UBATCH: Final = 512
# Where weights in RAM pass through the GPU: it makes them pass a quarter as often.
N_UBATCH_STREAMED: Final = 2048
# An embedding model sees a text at once, in one micro-batch (llama_context::encode).
N_UBATCH_EMBEDDING: Final = 2048
N_UBATCH_EMBEDDING_MOST: Final = 8192

KV_TYPE: Final[KvType] = "f16"
# Half the size, at next to no loss: taken where only so a faster placement fits. Flash attention
# has to be able to read it, and has kernels for heads of these widths on every backend that
# weights are placed on (ggml/src/ggml-cuda/fattn.cu).
KV_TYPE_SMALL: Final[KvType] = "q8_0"
_SMALL_KV_HEADS: Final = (64, 128, 256)


class Streaming(msgspec.Struct, frozen=True, kw_only=True):
    """How weights in host memory are held, and by how many tokens at once they are used."""

    load_mode: LoadMode
    n_ubatch: int


# Best first, by prefill of DeepSeek-MoE-16B Q4_K_M with its experts in RAM on an H200, tok/s:
# 8717, 3678, 2293, 736. A mapped file is pageable memory, from which the GPU copies at a
# seventh of the speed.
STREAMED: Final = (
    Streaming(load_mode="locked", n_ubatch=N_UBATCH_STREAMED),
    Streaming(load_mode="locked", n_ubatch=N_UBATCH),
    Streaming(load_mode="mmap", n_ubatch=N_UBATCH_STREAMED),
    Streaming(load_mode="mmap", n_ubatch=N_UBATCH),
)
# Weights that stay where they are read: mapped, so that the system can share and drop them.
RESIDENT: Final = (Streaming(load_mode="mmap", n_ubatch=N_UBATCH),)
# On a GPU a long micro-batch keeps its units busier, above all with many experts, of which each
# sees a part of the tokens. Taken where its compute buffer is at most this part of the free VRAM.
RESIDENT_ON_GPU: Final = (Streaming(load_mode="mmap", n_ubatch=N_UBATCH_STREAMED), *RESIDENT)
UBATCH_SHARE: Final = 16


def check_options(shape: ModelShape, options: PlanOptions) -> None:
    """Raise InvalidOptionError where an option cannot be used with the model."""
    _check_least("n_ctx", options.n_ctx, 1)
    _check_least("n_slots", options.n_slots, 1)
    _check_least("n_ubatch", options.n_ubatch, 1)
    _check_least("n_gpu_layers", options.n_gpu_layers, 0)
    if isinstance(options.cpu_moe, int):
        _check_least("cpu_moe", options.cpu_moe, 0)
    if options.n_slots is not None and options.n_slots > MAX_SLOTS:
        raise InvalidOptionError(
            f"n_slots is {options.n_slots}; llama.cpp takes at most {MAX_SLOTS}", option="n_slots"
        )
    n_elements, _ = KV_BLOCKS[options.kv_type or KV_TYPE]
    if shape.n_embd_head % n_elements:
        raise InvalidOptionError(
            f"kv_type {options.kv_type} needs attention heads of a multiple of {n_elements}; "
            f"this model's are {shape.n_embd_head} wide: use f16",
            option="kv_type",
        )
    if options.flash_attn is False and n_elements > 1:
        raise InvalidOptionError(
            f"kv_type {options.kv_type} can only be read by flash attention: leave it on",
            option="flash_attn",
        )


def _check_least(option: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise InvalidOptionError(f"{option} is {value}; it must be at least {least}", option=option)


def default_slots(shape: ModelShape, options: PlanOptions, *, on_gpu: bool) -> int:
    """Return how many sequences the model serves at once."""
    if options.n_slots is not None:
        return options.n_slots
    n_slots = N_SLOTS_GPU if on_gpu else N_SLOTS_CPU
    if any(layer.state_bytes for layer in shape.layers):
        n_slots = N_SLOTS_RECURRENT * (2 if on_gpu else 1)
    if options.n_ctx is not None:
        n_slots = min(n_slots, max(1, options.n_ctx // 256))
    return n_slots


def default_contexts(shape: ModelShape, options: PlanOptions, n_slots: int) -> list[int]:
    """Return the contexts to try, best first; one alone where the user named one."""
    # No more than every slot at the model's limit can ever be used.
    limit = max(1, shape.n_ctx_train or N_CTX_TEXT) * n_slots
    if options.n_ctx is not None:
        return [min(options.n_ctx, limit)]
    train = shape.n_ctx_train or N_CTX_TEXT
    if is_encoder(shape):
        usual = min(max(train, N_UBATCH_EMBEDDING), N_UBATCH_EMBEDDING_MOST)
        return _halvings(usual, min(usual, train, N_UBATCH_EMBEDDING))
    usual = max(min(train, N_CTX_TEXT), N_CTX_PER_SLOT * n_slots)
    usual = min(usual, limit)
    return _halvings(usual, min(usual, N_CTX_LEAST))


def kv_types(shape: ModelShape, options: PlanOptions) -> tuple[KvType, ...]:
    """Return the types of the KV cache that a placement on a GPU may have, best first."""
    if options.kv_type is not None:
        return (options.kv_type,)
    can_shrink = (
        options.flash_attn is not False
        and shape.n_embd_head in _SMALL_KV_HEADS
        and not (shape.is_mla or shape.is_embedding)
        and not any(layer.state_bytes for layer in shape.layers)
        and any(layer.n_embd_k for layer in shape.layers)
    )
    return (KV_TYPE, KV_TYPE_SMALL) if can_shrink else (KV_TYPE,)


def longer_contexts(
    shape: ModelShape, usual: int, kv_type: KvType, n_slots: int, free_bytes: int
) -> list[int]:
    """Return contexts beyond the usual one that the free VRAM has plenty of room for."""
    found: list[int] = []
    n_ctx = usual * 2
    while n_ctx <= min(N_CTX_MOST, shape.n_ctx_train):
        context = Context(n_ctx=n_ctx, n_slots=n_slots, n_ubatch=N_UBATCH, kv_type=kv_type)
        if sum(kv_layer_bytes(shape, context)) * KV_SHARE > free_bytes:
            break
        found.insert(0, n_ctx)
        n_ctx *= 2
    return found


def default_ubatch(
    shape: ModelShape, options: PlanOptions, n_ctx: int, streaming: Streaming
) -> int:
    """Return the micro-batch for a context."""
    if is_encoder(shape):
        return max(options.n_ubatch or 0, n_ctx)
    return min(n_ctx, options.n_ubatch or streaming.n_ubatch)


def is_encoder(shape: ModelShape) -> bool:
    """Whether the model computes a whole text at once and keeps no cache (BERT and its kin)."""
    return shape.is_embedding and not any(
        layer.n_embd_k or layer.state_bytes for layer in shape.layers
    )


def _halvings(first: int, last: int) -> list[int]:
    """Return `first` and its halves, down to `last`, which is among them."""
    found = [first]
    while found[-1] // 2 > last:
        found.append(found[-1] // 2)
    return found if found[-1] <= last else [*found, last]
