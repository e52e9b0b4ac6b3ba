"""Embeddings: whole texts in, one pooled vector each out, many texts a batch."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from shimpy.engine.llama.batch import Batch
from shimpy.engine.llama.context import common_params, new_context
from shimpy.engine.llama.failures import refused
from shimpy.engine.llama.library import LL, Pointer, bind
from shimpy.engine.llama.loader import Model
from shimpy.engine.llama.log import LOG
from shimpy.engine.llama.memory import read_memory
from shimpy.errors import ContextExceededError, WorkerError
from shimpy.protocol.messages import BufferUse, Load

Vectors = npt.NDArray[np.float32]

# llama.h, enum llama_pooling_type.
_NONE, _MEAN, _LAST, _RANK = 0, 1, 3, 4

# Texts in one batch. llama.cpp has room for 256, but its buffers grow with them.
_MAX_TEXTS = 64
# Each token in a batch costs a row of logits in llama.cpp's output buffer, wanted or not: short
# texts are gathered up to this many tokens, a longer one comes alone.
_GATHERED_TOKENS = 512

_embeddings_of = bind("llama_get_embeddings_seq", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32)


class Embedder:
    """A context that pools each sequence's hidden states to one vector."""

    def __init__(self, model: Model, load: Load) -> None:
        """Allocate it.

        Raises:
            LoadError: not enough memory for it.
        """
        self.handle = new_context(model, load, _params(model, load))
        self._memory: Pointer | None = LL.llama_get_memory(self.handle)
        self._is_rank = LL.llama_pooling_type(self.handle) == _RANK
        # A ranking model's output is its scores.
        self.n_embd = model.n_cls_out if self._is_rank else model.n_embd_out
        self.n_batch: int = LL.llama_n_ubatch(self.handle)
        # A text is pooled within one micro-batch; over n_ctx_train an encoder has no positions.
        self.n_ctx = min(LL.llama_n_ctx(self.handle), self.n_batch)
        if not self._memory:
            self.n_ctx = min(self.n_ctx, model.n_ctx_train)
        self._batch = Batch(self.n_batch)

    def embed(self, inputs: Sequence[Sequence[int]], *, normalize: bool) -> Vectors:
        """Return `(len(inputs), n_embd)` float32; of length 1 each where `normalize`.

        Raises:
            ContextExceededError: an input is empty or longer than `n_ctx`.
            WorkerError: llama.cpp refused a batch, or the model computes NaN.
        """
        for ids in inputs:
            self._check(ids)
        vectors = np.empty((len(inputs), self.n_embd), np.float32)
        for first, group in self._groups(inputs):
            vectors[first : first + len(group)] = self._embed_group(group)
        if not np.isfinite(vectors).all():
            raise WorkerError("the model computes NaN instead of embeddings: its file is damaged")
        if normalize and not self._is_rank:
            return normalized(vectors)
        return vectors

    def set_threads(self, n_threads: int) -> None:
        """Use this many threads from the next batch on."""
        LL.llama_set_n_threads(self.handle, n_threads, n_threads)

    def memory(self) -> list[BufferUse]:
        """Return what llama.cpp really holds, per device."""
        return read_memory(self.handle)

    def close(self) -> None:
        """Free the computation."""
        if self.handle:
            LL.llama_free(self.handle)
            self.handle = 0

    def _check(self, ids: Sequence[int]) -> None:
        if not ids:
            raise ContextExceededError("an input to embed has no tokens", n_ctx=self.n_ctx)
        if len(ids) > self.n_ctx:
            raise ContextExceededError(
                f"an input to embed has {len(ids)} tokens; the context is {self.n_ctx}",
                n_prompt=len(ids),
                n_ctx=self.n_ctx,
            )

    def _groups(
        self, inputs: Sequence[Sequence[int]]
    ) -> Iterator[tuple[int, Sequence[Sequence[int]]]]:
        """Yield the inputs in groups that one batch takes, with the index of their first."""
        limit = min(_GATHERED_TOKENS, self.n_batch)
        first = n_tokens = 0
        for i, ids in enumerate(inputs):
            if i > first and (n_tokens + len(ids) > limit or i - first == _MAX_TEXTS):
                yield first, inputs[first:i]
                first, n_tokens = i, 0
            n_tokens += len(ids)
        if inputs:
            yield first, inputs[first:]

    def _embed_group(self, group: Sequence[Sequence[int]]) -> Vectors:
        self._batch.fill_whole(group)
        if self._memory:
            LL.llama_memory_clear(self._memory, False)  # noqa: FBT003 (C has no names)
        status: int = LL.llama_decode(self.handle, self._batch.struct)
        if status:
            raise refused(f"{len(group)} texts to embed ({status})", LOG.errors(3))
        return np.stack([self._vector(slot) for slot in range(len(group))])

    def _vector(self, slot: int) -> Vectors:
        address: int | None = _embeddings_of(self.handle, slot)
        if not address:
            raise WorkerError(f"llama.cpp gave no embedding of text {slot} in a batch")
        row = (ctypes.c_float * self.n_embd).from_address(address)
        return np.ctypeslib.as_array(row).copy()


def normalized(vectors: Vectors) -> Vectors:
    """Return the rows scaled to length 1."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    scaled: Vectors = vectors / np.maximum(lengths, np.finfo(np.float32).tiny)
    return scaled


def _params(model: Model, load: Load) -> Any:
    params = common_params(model, load)
    params.embeddings = True
    params.pooling_type = _pooling(model)
    # No text may be parted: pooling works within a micro-batch, and encoders abort otherwise.
    n_batch = min(max(load.n_batch, load.n_ubatch), params.n_ctx)
    # The graph of a pooling model is reserved for as many tokens of each text, or aborts.
    params.n_batch = params.n_ubatch = -(-n_batch // _MAX_TEXTS) * _MAX_TEXTS
    params.n_seq_max = _MAX_TEXTS
    return params


def _pooling(model: Model) -> int:
    """Return the file's pooling; without one, the last token's state for text generators."""
    said = model.metadata("{arch}.pooling_type")
    if said is not None and said.isdecimal() and int(said) != _NONE:
        return int(said)
    is_causal = model.metadata("{arch}.attention.causal") != "false"
    return _LAST if is_causal and model.has_decoder and not model.has_encoder else _MEAN
