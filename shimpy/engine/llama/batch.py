"""A llama_batch over numpy arrays: filled by slices, without a ctypes write a token."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from shimpy.engine.backend import Chunk
from shimpy.engine.llama.library import LL
from shimpy.errors import WorkerError

_POINTER_BYTES = ctypes.sizeof(ctypes.c_void_p)


class Batch:
    """Room for `n_max` tokens; one object is filled anew for each step."""

    def __init__(self, n_max: int) -> None:
        self.n_max = n_max
        self._token = np.zeros(n_max, np.int32)
        self._pos = np.zeros(n_max, np.int32)
        self._seq = np.zeros(n_max, np.int32)
        self._wanted = np.zeros(n_max, np.int8)
        self._n_seq = np.ones(n_max, np.int32)
        # Single items are written three times as fast through these.
        self._items = (
            self._token.data,
            self._pos.data,
            self._seq.data,
            self._wanted.data,
        )
        # seq_id[i] points to the one sequence of token i.
        start = self._seq.ctypes.data
        self._seq_at = start + self._seq.itemsize * np.arange(n_max, dtype=np.uint64)
        self._steps = np.arange(n_max, dtype=np.int32)
        # The arrays have to live as long as this struct.
        self.struct = LL.llama_batch(
            n_tokens=0,
            token=_as(ctypes.c_int32, self._token),
            pos=_as(ctypes.c_int32, self._pos),
            n_seq_id=_as(ctypes.c_int32, self._n_seq),
            seq_id=_as(ctypes.POINTER(ctypes.c_int32), self._seq_at),
            logits=_as(ctypes.c_int8, self._wanted),
        )

    def fill(self, chunks: Sequence[Chunk], *, n_slots: int, n_outputs_max: int) -> int:
        """Take the chunks; return how many of them want logits.

        Raises:
            WorkerError: llama.cpp would abort on the batch.
        """
        token, pos, seq, wanted = self._items
        n_max = self.n_max
        n_outputs = 0
        at = 0
        for chunk in chunks:
            tokens, slot = chunk.tokens, chunk.slot
            n = len(tokens)
            end = at + n + chunk.n_padding
            if not n or end > n_max or not 0 <= slot < n_slots:
                raise self._refusal(chunks, n_slots)
            if end - at == 1:
                token[at] = tokens[0]
                pos[at] = chunk.start
                seq[at] = slot
                wanted[at] = chunk.wants_logits
            else:
                self._fill_run(at, end, chunk)
            n_outputs += chunk.wants_logits
            at = end
        if not at:
            raise self._refusal(chunks, n_slots)
        if n_outputs > n_outputs_max:
            raise WorkerError(
                f"a batch wants logits of {n_outputs} tokens; the context has room for "
                f"{n_outputs_max}"
            )
        self.struct.n_tokens = at
        return n_outputs

    def fill_next(self, tokens: Sequence[int]) -> None:
        """Take the tokens that come next in the slots of a batch of as many single ones."""
        token, pos, *_ = self._items
        for at, one in enumerate(tokens):
            token[at] = one
            pos[at] += 1

    def _fill_run(self, at: int, end: int, chunk: Chunk) -> None:
        told = at + len(chunk.tokens)
        self._token[at:told] = chunk.tokens
        # Like the token before it, so that a mixture's experts are those of that one.
        self._token[told:end] = chunk.tokens[-1]
        self._pos[at:end] = self._steps[: end - at] + chunk.start
        self._seq[at:end] = chunk.slot
        self._wanted[at:end] = 0
        self._wanted[told - 1] = chunk.wants_logits

    def fill_whole(self, inputs: Sequence[Sequence[int]]) -> None:
        """Take whole texts, each a sequence of its own, all of whose tokens give output."""
        at = 0
        for slot, ids in enumerate(inputs):
            n = len(ids)
            self._token[at : at + n] = ids
            self._pos[at : at + n] = self._steps[:n]
            self._seq[at : at + n] = slot
            at += n
        self._wanted[:at] = 1
        self.struct.n_tokens = at

    def _refusal(self, chunks: Sequence[Chunk], n_slots: int) -> WorkerError:
        sizes = [len(chunk.tokens) + chunk.n_padding for chunk in chunks]
        slots = [chunk.slot for chunk in chunks]
        return WorkerError(
            f"a batch of {sum(sizes)} tokens in chunks of {sizes} for slots {slots}; it takes 1 to "
            f"{self.n_max} tokens, one a chunk at least, for slots 0 to {n_slots - 1}"
        )


def _as(kind: Any, array: npt.NDArray[Any]) -> Any:
    return ctypes.cast(array.ctypes.data, ctypes.POINTER(kind))
