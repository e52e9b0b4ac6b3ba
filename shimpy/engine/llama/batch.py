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

    def fill(self, chunks: Sequence[Chunk], *, n_slots: int, n_outputs_max: int) -> list[int]:
        """Take the chunks; return the batch index of each that wants logits, in order.

        Raises:
            WorkerError: llama.cpp would abort on the batch.
        """
        token, pos, seq, wanted = self._token, self._pos, self._seq, self._wanted
        n_tokens = sum(len(chunk.tokens) for chunk in chunks)
        self._check(n_tokens, [chunk.slot for chunk in chunks], n_slots)
        wanted[:n_tokens] = 0
        outputs = []
        at = 0
        for chunk in chunks:
            tokens = chunk.tokens
            n = len(tokens)
            if n == 1:
                token[at] = tokens[0]
                pos[at] = chunk.start
                seq[at] = chunk.slot
            else:
                token[at : at + n] = tokens
                pos[at : at + n] = self._steps[:n] + chunk.start
                seq[at : at + n] = chunk.slot
            at += n
            if chunk.wants_logits:
                wanted[at - 1] = 1
                outputs.append(at - 1)
        if len(outputs) > n_outputs_max:
            raise WorkerError(
                f"a batch wants logits of {len(outputs)} tokens; the context has room for "
                f"{n_outputs_max}"
            )
        self.struct.n_tokens = n_tokens
        return outputs

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

    def _check(self, n_tokens: int, slots: list[int], n_slots: int) -> None:
        if not 0 < n_tokens <= self.n_max:
            raise WorkerError(f"a batch of {n_tokens} tokens; it takes 1 to {self.n_max}")
        if min(slots) < 0 or max(slots) >= n_slots:
            raise WorkerError(f"a batch for slots {slots}; there are {n_slots}")


def _as(kind: Any, array: npt.NDArray[Any]) -> Any:
    return ctypes.cast(array.ctypes.data, ctypes.POINTER(kind))
