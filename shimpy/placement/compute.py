"""How large llama.cpp's compute buffers get: the most that is alive at once in one micro-batch.

llama.cpp reserves, once per context, what the largest graph needs: a micro-batch of prompt
with the KV cache full (`llama_context::sched_reserve` in src/llama-context.cpp). The graph
allocator frees a tensor after its last use (ggml/src/ggml-alloc.c), so the buffer is the
largest sum of tensors alive at one point. In a transformer few points can be it: the gated
feed-forward, the experts' products, the attention and the logits. This module sums each of
them and takes the largest. Names of the parts, in bytes, for T tokens of one micro-batch:

    e     = 4 T n_embd                  the residual stream, a layer's input and its output
    q     = 4 T n_head n_embd_head      queries; as much again comes out of the attention
    f     = 4 T n_ff                    one of gate, up and their product
    fx    = 4 T n_expert_used n_ff_exp  the same of the experts chosen for each token
    x     = 4 T n_expert_used n_embd    the experts' outputs before they are summed
    mask  = 2 T n_kv                    float16; float32 without flash attention

Checked against llama.cpp's own no_alloc reservation: tests/placement/test_memory.py and
docs/placement.md.
"""

from __future__ import annotations

from typing import Final

import msgspec

from shimpy.gguf.arch import LayerShape, ModelShape

# ggml_backend_sched_new with pipeline parallelism: GGML_SCHED_MAX_COPIES in CMakeLists.txt.
N_PIPELINE_COPIES: Final = 4
_F32: Final = 4
_F16: Final = 2
# MLA: the queries before and after they are folded into the latent, and its way back.
_MLA_QUERIES: Final = 3.5
# Scan, convolution and gates of a recurrent layer, in widths of e (src/models/mamba-base.cpp).
_RECURRENT_WIDTHS: Final = 12


class Reservation(msgspec.Struct, frozen=True, kw_only=True):
    """The sizes of a context that its compute buffers depend on."""

    # Tokens of one micro-batch, never more than the context has.
    n_tokens: int
    # Cells of the KV cache that one token may attend to; of windowed layers, where they differ.
    n_kv: int
    n_kv_swa: int
    n_outputs: int
    n_slots: int
    flash_attn: bool
    # The KV cache is neither F16 nor read as it is: flash attention makes a copy in F16.
    kv_is_f16: bool


class Duty(msgspec.Struct, frozen=True, kw_only=True):
    """What one device computes; of equal layers one is enough."""

    # Layers that are wholly its own.
    layers: tuple[LayerShape, ...] = ()
    # Layers of which it has all but the experts, which are in host memory.
    dense_only: tuple[LayerShape, ...] = ()
    # Layers in host memory, whose tensors and KV cache pass through this device in prefill.
    visiting: tuple[LayerShape, ...] = ()
    n_visiting: int = 0
    # KV cache of the largest of those, in bytes.
    visiting_kv_bytes: int = 0
    # Layers anywhere whose experts are in host memory and pass through this device in prefill.
    visiting_experts: tuple[LayerShape, ...] = ()
    has_output: bool = False
    # Copies of each input for pipeline parallelism; 1: none.
    n_copies: int = 1
    # The layers' input comes from another GPU.
    follows: bool = False
    # There are other GPUs: the scheduler then keeps two visiting tensors at a time.
    has_peers: bool = False


def device_compute_bytes(shape: ModelShape, duty: Duty, sizes: Reservation) -> int:
    """Return the compute buffer of a GPU."""
    attending = duty.layers + duty.dense_only + duty.visiting
    if not attending and not duty.has_output:
        return 0
    e = _F32 * sizes.n_tokens * shape.n_embd
    masks = _mask_bytes(shape, attending, sizes)
    # The residual, a layer's normalised input, and a hole where the first layer's input was.
    base = 3 * e + masks
    if duty.n_copies > 1:
        n_inputs = _n_inputs(duty)
        base += (duty.n_copies - 1) * masks + duty.n_copies * e * n_inputs
    peaks = [_attention_peak(shape, attending, sizes) + duty.visiting_kv_bytes]
    peaks += [_layer_peak(shape, layer, sizes) for layer in duty.layers]
    peaks += [_visiting_dense_peak(shape, layer, sizes) for layer in duty.visiting]
    peaks += [_visiting_expert_peak(shape, layer, duty, sizes) for layer in duty.visiting_experts]
    peak = base + max(peaks)
    if duty.n_visiting > 1 or (duty.visiting and duty.visiting_experts):
        # The hole that one layer's cache leaves is filled before the next layer's comes.
        peak = max(peak, base + 2 * e + duty.visiting_kv_bytes + max(peaks[1:], default=0))
    if duty.has_output:
        # The masks are gone by then, but for those of a pipeline.
        kept = base if duty.n_copies > 1 else 3 * e
        peak = max(peak, _logits_bytes(shape, sizes) + kept)
    return int(peak)


def host_compute_bytes(
    shape: ModelShape, layers: tuple[LayerShape, ...], sizes: Reservation, *, n_copies: int = 1
) -> int:
    """Return the compute buffer in host memory; `layers` are computed by the CPU alone.

    Where GPUs take part it holds the inputs: the token embeddings twice, since the graph has
    an input for embeddings too, and the masks (llm_graph_context::build_inp_embd).
    """
    e = _F32 * sizes.n_tokens * shape.n_embd
    masks = _mask_bytes(shape, layers or shape.layers, sizes)
    if not layers:
        if not sizes.flash_attn:
            masks = masks * 3 // 2  # in float32, and cast to float16
        return (2 if n_copies == 1 else n_copies + 1) * e + masks * n_copies
    peaks = [_attention_peak(shape, layers, sizes, copies_kv=False)]
    peaks += [_layer_peak(shape, layer, sizes) for layer in layers]
    return int(max(4 * e + masks + max(peaks), _logits_bytes(shape, sizes) + 3 * e))


def _n_inputs(duty: Duty) -> int:
    """Return how many tensors like the residual reach a GPU from outside, per copy."""
    if not duty.follows:
        return 1
    return 6 if any(layer.state_bytes for layer in duty.layers) else 2


def _layer_peak(shape: ModelShape, layer: LayerShape, sizes: Reservation) -> float:
    """Return the most that a layer's feed-forward, or its recurrence, adds to the base."""
    e = _F32 * sizes.n_tokens * shape.n_embd
    peak = 0.0
    if layer.state_bytes:
        peak = (_RECURRENT_WIDTHS - 3) * e + 1.2 * sizes.n_slots * layer.state_bytes
    if layer.n_expert_tensors:
        _, fx, x = _expert_widths(shape, sizes)
        return max(peak, 3 * fx, fx + x, 2 * x + 2 * e)
    return max(peak, 3 * _F32 * sizes.n_tokens * shape.n_ff)


def _visiting_dense_peak(shape: ModelShape, layer: LayerShape, sizes: Reservation) -> float:
    """Return what a layer in host memory adds to the GPU: one of its tensors at a time."""
    if layer.n_expert_tensors:
        return layer.largest_dense_bytes
    f = _F32 * sizes.n_tokens * shape.n_ff
    return max(_layer_peak(shape, layer, sizes), 2 * f + layer.largest_dense_bytes)


def _visiting_expert_peak(
    shape: ModelShape, layer: LayerShape, duty: Duty, sizes: Reservation
) -> float:
    """Return what a layer's experts in host memory add to the GPU: a tensor at a time.

    Source: llm_graph_context::build_moe_ffn in src/llama-graph.cpp, and
    ggml_backend_sched_split_graph (ggml/src/ggml-backend.cpp), which gives each visiting
    weight a split of its own so that the next one can take its place. It goes to the first
    GPU, whichever has the layer.
    """
    _, fx, x = _expert_widths(shape, sizes)
    down = layer.largest_expert_bytes or layer.expert_bytes
    up = _up_bytes(layer, down)
    peak = max(_layer_peak(shape, layer, sizes), up + 2 * fx, down + fx + x)
    return max(peak, down + up + fx) if duty.has_peers and duty.dense_only else peak


def _expert_widths(shape: ModelShape, sizes: Reservation) -> tuple[int, int, int]:
    """Return e, fx and x of the module's table."""
    n_chosen = sizes.n_tokens * max(1, shape.n_expert_used)
    e = _F32 * sizes.n_tokens * shape.n_embd
    return e, _F32 * n_chosen * (shape.n_expert_ff or shape.n_ff), _F32 * n_chosen * shape.n_embd


def _up_bytes(layer: LayerShape, down: int) -> int:
    """Return the bytes of the gate or the up tensor; `down` is the largest of the three.

    llama-quantize never gives the down projection fewer bits than the other two, and all
    three have as many weights. With fewer than three tensors the gate is fused with up.
    """
    if layer.n_expert_tensors < 3:  # noqa: PLR2004 -- gate, up and down
        return down
    return min(down, (layer.expert_bytes - down) // 2)


def _attention_peak(
    shape: ModelShape,
    layers: tuple[LayerShape, ...],
    sizes: Reservation,
    *,
    copies_kv: bool = True,
) -> float:
    """Return the most that any layer's attention adds to the base."""
    n_tokens = sizes.n_tokens
    q = _F32 * n_tokens * shape.n_head * shape.n_embd_head
    worst = 0.0
    for layer in layers:
        if not layer.n_embd_k and not shape.is_embedding:
            continue
        n_kv = _n_kv(layer, sizes)
        kv = _F32 * n_tokens * (layer.n_embd_k + layer.n_embd_v)
        peak = (_MLA_QUERIES if shape.is_mla else 2) * q + kv
        if not sizes.flash_attn:
            # The scores, which their softmax overwrites, and V once more, transposed.
            peak += _F32 * n_kv * n_tokens * shape.n_head + kv
        elif copies_kv and not sizes.kv_is_f16:
            # ggml_cuda_flash_attn_ext_get_alloc_size (ggml/src/ggml-cuda/fattn.cu).
            peak += _F16 * n_kv * (layer.n_embd_k + layer.n_embd_v)
        worst = max(worst, peak)
    # One e of the base, the layer's normalised input, is gone by then.
    return max(0.0, worst - _F32 * n_tokens * shape.n_embd)


def _mask_bytes(shape: ModelShape, layers: tuple[LayerShape, ...], sizes: Reservation) -> int:
    """Return the bytes of the attention masks: one for full and one for windowed attention."""
    width = _F16 if sizes.flash_attn else _F32
    if shape.is_embedding and not any(layer.n_embd_k for layer in layers):
        return width * sizes.n_tokens * sizes.n_tokens
    kinds = {layer.is_swa for layer in layers if layer.n_embd_k}
    spans = {False: sizes.n_kv, True: sizes.n_kv_swa}
    return sum(width * sizes.n_tokens * spans[kind] for kind in kinds)


def _logits_bytes(shape: ModelShape, sizes: Reservation) -> int:
    """Return the logits of all outputs; an embedding model has none."""
    width = shape.n_embd if shape.is_embedding else shape.n_vocab
    return _F32 * min(sizes.n_tokens, sizes.n_outputs) * width


def _n_kv(layer: LayerShape, sizes: Reservation) -> int:
    if not layer.n_embd_k:
        return sizes.n_tokens
    return sizes.n_kv_swa if layer.is_swa else sizes.n_kv
