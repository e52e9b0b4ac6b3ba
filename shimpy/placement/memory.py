"""What a model takes on each device: weights, KV cache and compute buffers.

All formulas restate llama.cpp as llama-cpp-python 0.3.36 carries it; each function names the
place. The compute buffers, the only part that is no plain sum, are in `compute`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import accumulate
from typing import Final

import msgspec

from shimpy.gguf.arch import LayerShape, ModelShape
from shimpy.placement.compute import (
    N_PIPELINE_COPIES,
    Duty,
    Reservation,
    device_compute_bytes,
    host_compute_bytes,
)
from shimpy.protocol.context import n_cells, pad_context
from shimpy.protocol.messages import KvType

# Elements and bytes of a block; ggml/src/ggml-common.h.
KV_BLOCKS: Final[dict[KvType, tuple[int, int]]] = {
    "f32": (1, 4),
    "f16": (1, 2),
    "bf16": (1, 2),
    "q8_0": (32, 34),
    "q5_1": (32, 24),
    "q5_0": (32, 22),
    "q4_1": (32, 20),
    "q4_0": (32, 18),
}


class Context(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of a llama_context that cost memory."""

    # Tokens that all slots share where the KV cache is unified; else those of each slot.
    n_ctx: int
    n_slots: int
    kv_unified: bool = True
    n_ubatch: int
    kv_type: KvType = "f16"
    # Rows of logits per micro-batch (n_outputs_max); None: one per slot, as the engine asks for.
    n_outputs: int | None = None
    flash_attn: bool = True
    # Windowed layers keep the whole context, so that a prefix can be used again.
    swa_full: bool = True


class Layout(msgspec.Struct, frozen=True, kw_only=True):
    """Which layers and experts are on which GPU, in llama.cpp's terms."""

    # Counts the output layer as one and fills from the back; 0: nothing is on a GPU.
    n_gpu_layers: int = 0
    # Experts of the layers before this one are in host memory.
    n_cpu_moe: int = 0
    # Share of the offloaded layers per GPU (tensor_split); its length is the number of GPUs.
    split: tuple[float, ...] = ()


class Use(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes on one device."""

    weights_bytes: int = 0
    kv_bytes: int = 0
    compute_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """All three together."""
        return self.weights_bytes + self.kv_bytes + self.compute_bytes


class MemoryUse(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes on each GPU of a layout, in its order, and in host memory."""

    gpus: tuple[Use, ...]
    host: Use


class _Span(msgspec.Struct, frozen=True):
    """The layers of one GPU, as a half-open range, and whether it has the output."""

    gpu: int
    start: int
    end: int
    has_output: bool


class MemoryModel:
    """Estimates what a model takes in any layout: built once, asked for many.

    Layers of one device are consecutive, so that prefix sums answer for the weights, and most
    models have two or three kinds of layers, so that one of each answers for the buffers.
    """

    def __init__(self, shape: ModelShape) -> None:
        self.shape = shape
        self._dense = _prefix(layer.dense_bytes for layer in shape.layers)
        self._experts = _prefix(layer.expert_bytes for layer in shape.layers)
        kinds: dict[tuple[int, ...], int] = {}
        self._kind_of = [kinds.setdefault(_kind(layer), len(kinds)) for layer in shape.layers]
        self._layer_of_kind = {kind: i for i, kind in reversed(list(enumerate(self._kind_of)))}
        self._caches: dict[Context, tuple[list[int], list[int]]] = {}

    def estimate(self, layout: Layout, context: Context) -> MemoryUse:
        """Return what loading the model this way takes everywhere."""
        spans = _spans(self.shape.n_layer, layout)
        kv, cached = self._kv(context)
        compute = self._compute(layout, context, spans, kv)
        gpus = [Use() for _ in layout.split]
        for span in spans:
            gpus[span.gpu] = Use(
                weights_bytes=self._weights(span, layout.n_cpu_moe),
                kv_bytes=cached[span.end] - cached[span.start],
                compute_bytes=compute[span.gpu],
            )
        shape = self.shape
        total = shape.input_bytes + shape.output_bytes + self._dense[-1] + self._experts[-1]
        host_weights = total - sum(use.weights_bytes for use in gpus)
        host = Use(
            # A tied output is no second copy where both are in host memory.
            weights_bytes=min(host_weights, max(shape.file_bytes, total - shape.output_bytes)),
            kv_bytes=cached[-1] - sum(use.kv_bytes for use in gpus),
            compute_bytes=compute[-1],
        )
        return MemoryUse(gpus=tuple(gpus), host=host)

    def layer_bytes(self, context: Context, n_cpu_moe: int) -> list[int]:
        """Return the weights and cache that each layer, and last the output, takes on a GPU."""
        sizes = [
            layer.dense_bytes + kv + (0 if layer.index < n_cpu_moe else layer.expert_bytes)
            for layer, kv in zip(self.shape.layers, self._kv(context)[0], strict=True)
        ]
        return [*sizes, self.shape.output_bytes]

    def _kv(self, context: Context) -> tuple[list[int], list[int]]:
        """Return the cache of each layer, and the sums of the first 0, 1, 2, ... of them."""
        found = self._caches.get(context)
        if found is None:
            per_layer = list(kv_layer_bytes(self.shape, context))
            found = self._caches[context] = (per_layer, _prefix(per_layer))
        return found

    def _weights(self, span: _Span, n_cpu_moe: int) -> int:
        first_resident = min(max(span.start, n_cpu_moe), span.end)
        return (
            self._dense[span.end]
            - self._dense[span.start]
            + self._experts[span.end]
            - self._experts[first_resident]
            + (self.shape.output_bytes if span.has_output else 0)
        )

    def _compute(
        self, layout: Layout, context: Context, spans: list[_Span], kv: list[int]
    ) -> list[int]:
        """Return the compute buffer of each GPU, then the host's."""
        shape, n_moved = self.shape, min(layout.n_cpu_moe, self.shape.n_layer)
        sizes = reservation(shape, context)
        computed = [0] * len(layout.split)
        if not spans:
            return [*computed, host_compute_bytes(shape, self._kinds(0, shape.n_layer), sizes)]
        n_on_host = spans[0].start
        # llama_context: pipeline parallelism needs every layer on a GPU and no override.
        is_piped = len(layout.split) > 1 and not n_on_host and not layout.n_cpu_moe
        n_copies = N_PIPELINE_COPIES if is_piped else 1
        for span in spans:
            is_first = span is spans[0]
            first_resident = min(max(span.start, n_moved), span.end)
            front = self._kinds(span.start, first_resident)
            whole = tuple(layer for layer in front if not layer.n_expert_tensors)
            duty = Duty(
                layers=whole + self._kinds(first_resident, span.end),
                dense_only=tuple(layer for layer in front if layer.n_expert_tensors),
                visiting=self._kinds(0, n_on_host) if is_first else (),
                n_visiting=n_on_host if is_first else 0,
                visiting_kv_bytes=max(kv[:n_on_host], default=0) if is_first else 0,
                visiting_experts=self._experts_of(max(n_on_host, n_moved)) if is_first else (),
                has_output=span.has_output,
                n_copies=n_copies,
                follows=not is_first,
                has_peers=len(spans) > 1,
            )
            computed[span.gpu] = device_compute_bytes(shape, duty, sizes)
        return [*computed, host_compute_bytes(shape, (), sizes, n_copies=n_copies)]

    def _kinds(self, start: int, end: int) -> tuple[LayerShape, ...]:
        """Return one layer of each kind within a range."""
        layers = self.shape.layers
        return tuple(layers[self._layer_of_kind[kind]] for kind in set(self._kind_of[start:end]))

    def _experts_of(self, end: int) -> tuple[LayerShape, ...]:
        return tuple(layer for layer in self._kinds(0, end) if layer.n_expert_tensors)


def estimate_memory(shape: ModelShape, layout: Layout, context: Context) -> MemoryUse:
    """Return what loading the model this way takes everywhere."""
    return MemoryModel(shape).estimate(layout, context)


def kv_layer_bytes(shape: ModelShape, context: Context) -> tuple[int, ...]:
    """Return the bytes of each layer's KV cache and recurrent state.

    Source: llama_kv_cache and llama_kv_cache_iswa (src/llama-kv-cache*.cpp): one row of K and
    one of V per cell, of each stream where the cache is not unified; llama_memory_recurrent: one
    float32 state per sequence.
    """
    n_all, n_swa = _n_cells(shape, context)
    n_streams = 1 if context.kv_unified else context.n_slots
    return tuple(
        n_streams
        * (n_swa if layer.is_swa else n_all)
        * (_row(layer.n_embd_k, context.kv_type) + _row(layer.n_embd_v, context.kv_type))
        + layer.state_bytes * context.n_slots
        for layer in shape.layers
    )


def reservation(shape: ModelShape, context: Context) -> Reservation:
    """Return the sizes that llama.cpp reserves its compute buffers for."""
    n_all, n_swa = _n_cells(shape, context)
    return Reservation(
        # A micro-batch of several streams has as many scores for each token.
        n_tokens=min(context.n_ctx, context.n_ubatch),
        n_kv=n_all,
        n_kv_swa=n_swa,
        n_outputs=context.n_slots if context.n_outputs is None else context.n_outputs,
        n_slots=context.n_slots,
        flash_attn=context.flash_attn,
        kv_is_f16=context.kv_type == "f16",
    )


def _n_cells(shape: ModelShape, context: Context) -> tuple[int, int]:
    """Return the cells of full and of windowed layers (llama-kv-cache-iswa.cpp, size_swa).

    Of one stream, where the cache is not unified.
    """
    n_all = n_cells(
        context.n_ctx, flash_attn=context.flash_attn, n_ctx_original=shape.n_ctx_original
    )
    if context.swa_full or not shape.n_swa:
        return n_all, n_all
    n_window = shape.n_swa * context.n_slots + context.n_ubatch
    # As the cache itself rounds (llama_kv_cache_iswa).
    return n_all, pad_context(min(n_all, n_window))


def _row(n_embd: int, kv_type: KvType) -> int:
    """Return the bytes of one token's K or V; a head is a whole number of blocks."""
    n_elements, n_bytes = KV_BLOCKS[kv_type]
    return -(-n_embd // n_elements) * n_bytes


def _spans(n_layer: int, layout: Layout) -> list[_Span]:
    """Return the layers of each GPU that gets any.

    Source: get_layer_buft_list in llama_model_base::load_tensors (src/llama-model.cpp): the
    offloaded layers are the last ones, the output counts as one more, and a layer goes to the
    first device whose cumulative share is above the layer's own.
    """
    n_active = min(layout.n_gpu_layers, n_layer + 1)
    if not layout.split or n_active <= 0:
        return []
    first, total = n_layer + 1 - n_active, sum(layout.split)
    spans, start = [], 0
    for gpu, bound in enumerate(accumulate(layout.split)):
        end = min(n_active, math.ceil(bound / total * n_active - 1e-4))
        if end > start:
            has_output = end == n_active
            last = first + end - has_output
            spans.append(_Span(gpu=gpu, start=first + start, end=last, has_output=has_output))
            start = end
    return spans


def _prefix(values: Iterable[int]) -> list[int]:
    """Return the sums of the first 0, 1, 2, ... values."""
    return [0, *accumulate(values)]


def _kind(layer: LayerShape) -> tuple[int, ...]:
    """Return what tells layers apart whose buffers differ."""
    return (
        layer.largest_expert_bytes,
        layer.expert_bytes,
        layer.n_expert_tensors,
        layer.largest_dense_bytes,
        layer.n_embd_k,
        layer.n_embd_v,
        layer.is_swa,
        layer.state_bytes,
    )
