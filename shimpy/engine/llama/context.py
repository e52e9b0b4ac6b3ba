"""A llama_context: the KV cache of all slots, batches in, rows of logits out."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shimpy.engine.backend import Chunk, DecodeStatus
from shimpy.engine.llama.batch import Batch
from shimpy.engine.llama.failures import load_error, refused
from shimpy.engine.llama.lazy import lazily_cleared
from shimpy.engine.llama.library import LL, Pointer, bind
from shimpy.engine.llama.loader import Model
from shimpy.engine.llama.log import LOG
from shimpy.engine.llama.memory import read_memory
from shimpy.errors import LoadError, UnsupportedError, WorkerError
from shimpy.protocol.context import n_cells, pad_context
from shimpy.protocol.messages import BufferUse, KvType, Load

Row = npt.NDArray[np.float32]
Rows = npt.NDArray[np.float32]
State = npt.NDArray[np.uint8]

# ggml.h, enum ggml_type.
_KV_TYPES: dict[KvType, int] = {
    "f32": 0,
    "f16": 1,
    "bf16": 30,
    "q8_0": 8,
    "q5_1": 7,
    "q5_0": 6,
    "q4_1": 3,
    "q4_0": 2,
}
_FLASH = {"auto": -1, "off": 0, "on": 1}
# What a file of a state has more than the state that llama.cpp tells the size of.
_STATE_FILE_BYTES = 16
# llama.h, enum llama_pooling_type.
_NO_POOLING = 0

# The bindings' version makes a pointer object of it at each call.
_get_logits = bind("llama_get_logits", ctypes.c_void_p, ctypes.c_void_p)
_embeddings_of = bind("llama_get_embeddings_ith", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32)


class Context:
    """The KV cache and the computation of a model that generates."""

    def __init__(self, model: Model, load: Load) -> None:
        """Allocate it.

        Raises:
            LoadError: not enough memory, or the model generates no text.
        """
        with lazily_cleared() as clearing:
            self.handle = new_context(model, load, _params(model, load))
        # Of the KV cache, what takes RAM only once it is used.
        self.untouched_bytes = clearing.untouched_bytes
        self._memory: Pointer = LL.llama_get_memory(self.handle)
        if not self._memory or model.has_encoder:
            self.close()
            raise LoadError(
                f"{Path(load.path).name} has no memory of a text to go on from (encoders, "
                "diffusion models): it can be loaded for embeddings only"
            )
        self.n_slots = load.n_slots
        self._kv_unified = load.kv_unified
        # Cells may be a few more.
        self.n_ctx = pad_context(load.n_ctx)
        self.n_batch: int = LL.llama_n_batch(self.handle)
        # Recurrent state is one vector: its parts can't be dropped, copied or moved.
        self.can_split = not (model.is_recurrent or model.is_hybrid)
        self.can_shift: bool = self.can_split and LL.llama_memory_can_shift(self._memory)
        self._n_embd = model.n_embd_out
        self._n_vocab: int = LL.llama_vocab_n_tokens(model.vocab_handle)
        self._batch = Batch(self.n_batch)
        self._n_outputs = 0
        # Of each output there may be; to make such a view takes longer than to look it up.
        self._rows: list[Row] = []
        self._logits_at = 0

    def decode(self, chunks: Sequence[Chunk]) -> int:
        """Run the model over a batch; return a DecodeStatus.

        Raises:
            WorkerError: the batch is one that llama.cpp refuses or would abort on.
        """
        batch = self._batch
        self._n_outputs = 0
        n_outputs = batch.fill(chunks, n_slots=self.n_slots, n_outputs_max=self.n_slots)
        status = self._compute(n_outputs)
        # A step of streams, which comes most often, has none.
        if status == DecodeStatus.OK and batch.struct.n_tokens > len(chunks):
            self._drop_padding(chunks)
        return status

    def decode_next(self, tokens: Sequence[int]) -> int:
        """Run the last decode's batch again, each slot's next token in place of its only one.

        Raises:
            WorkerError: that was no batch of so many tokens with logits for each, or llama.cpp
                refuses this one.
        """
        n_outputs, self._n_outputs = self._n_outputs, 0
        if not len(tokens) == n_outputs == self._batch.struct.n_tokens:
            raise WorkerError(
                f"{len(tokens)} tokens can't come next after a batch of "
                f"{self._batch.struct.n_tokens} with {n_outputs} outputs"
            )
        self._batch.fill_next(tokens)
        return self._compute(n_outputs)

    def _compute(self, n_outputs: int) -> int:
        struct = self._batch.struct
        status: int = LL.llama_decode(self.handle, struct)
        if status == DecodeStatus.OK:
            self._take_logits(n_outputs)
        elif status < 0:
            raise refused(f"a batch of {struct.n_tokens} tokens ({status})", LOG.errors(3))
        return status

    def _drop_padding(self, chunks: Sequence[Chunk]) -> None:
        for chunk in chunks:
            if chunk.n_padding and not self.remove(chunk.slot, chunk.start + len(chunk.tokens), -1):
                raise WorkerError(
                    f"llama.cpp does not give back {chunk.n_padding} cells of padding in slot "
                    f"{chunk.slot}; report a bug with the model's name"
                )

    def row(self, index: int) -> Row:
        """Return the logits of an output of the last decode, `(n_vocab,)`; a view, writable.

        Raises:
            WorkerError: there is no such output; llama.cpp would abort.
        """
        if not 0 <= index < self._n_outputs:
            raise WorkerError(
                f"logits of output {index} were asked for; the last decode gave {self._n_outputs}"
            )
        return self._rows[index]

    def states(self, chunks: Sequence[Chunk]) -> Rows:
        """Decode a token of each of some slots; return `(len(chunks), n_embd)`, the last states.

        Before the output layer and after its norm. The logits of the last decode are gone.

        Raises:
            WorkerError: llama.cpp refuses the batch or would abort on it, or the model computes
                NaN.
        """
        batch = self._batch
        self._n_outputs = 0
        batch.fill(chunks, n_slots=self.n_slots, n_outputs_max=self.n_slots)
        if batch.struct.n_tokens != len(chunks):
            raise WorkerError("states are taken after single tokens")
        # While this is on, every token of a batch is an output.
        LL.llama_set_embeddings(self.handle, True)  # noqa: FBT003 (C has no names)
        try:
            status: int = LL.llama_decode(self.handle, batch.struct)
            if status:
                reason = "; ".join(LOG.errors(2))
                raise WorkerError(
                    f"llama.cpp refused a batch of {len(chunks)} last tokens ({status}): {reason}"
                )
            states = np.stack([self._state(row) for row in range(len(chunks))])
        finally:
            LL.llama_set_embeddings(self.handle, False)  # noqa: FBT003
        if not np.isfinite(states).all():
            raise WorkerError("the model computes NaN instead of embeddings: its file is damaged")
        return states

    def remove(self, slot: int, start: int, end: int) -> bool:
        """Drop the positions [start, end) of a slot; end -1: to its end. False: it can't."""
        self._check_slot(slot)
        return bool(LL.llama_memory_seq_rm(self._memory, slot, start, end))

    def copy(self, source: int, target: int, n: int) -> bool:
        """Let `target` have the first `n` positions of `source`, and no others; False: it can't.

        In a unified cache they are the same cells; all of a model that can't be split. Else all
        that `source` holds is copied by way of a buffer: llama.cpp itself copies whole streams,
        used or not (llama_kv_cache::seq_cp), and aborts over a part of one.
        """
        self._check_slot(source)
        self._check_slot(target)
        if source == target:
            return True
        if not self._kv_unified:
            return self._write(target, self._read(source)) and self.remove(target, n, -1)
        end = n if self.can_split else -1
        # Two cells of one position in a slot would both be attended to.
        LL.llama_memory_seq_rm(self._memory, target, -1, -1)
        LL.llama_memory_seq_cp(self._memory, source, target, 0 if self.can_split else -1, end)
        return True

    def exchange(self, first: int, second: int) -> bool:
        """Let two slots with cells of their own exchange what they hold; False: it can't."""
        self._check_slot(first)
        self._check_slot(second)
        of_first, of_second = self._read(first), self._read(second)
        return self._write(first, of_second) and self._write(second, of_first)

    def _read(self, slot: int) -> State:
        """Return a slot's state, as bytes."""
        state = np.empty(LL.llama_state_seq_get_size(self.handle, slot), np.uint8)
        n = LL.llama_state_seq_get_data(self.handle, _bytes_of(state), len(state), slot)
        return state[:n]

    def _write(self, slot: int, state: State) -> bool:
        """Put a state into a slot instead of its own; False: llama.cpp did not take it."""
        LL.llama_memory_seq_rm(self._memory, slot, -1, -1)
        n: int = LL.llama_state_seq_set_data(self.handle, _bytes_of(state), len(state), slot)
        return n > 0

    def shift(self, slot: int, start: int, end: int, delta: int) -> None:
        """Move the positions [start, end) of a slot by `delta`.

        Raises:
            UnsupportedError: the model's positions can't be moved; llama.cpp would abort.
        """
        self._check_slot(slot)
        if not self.can_shift:
            raise UnsupportedError("the positions of this model's KV cache can't be moved")
        LL.llama_memory_seq_add(self._memory, slot, start, end, delta)

    def state_bytes(self, slot: int) -> int:
        """Return how many bytes `save_state` writes at most."""
        self._check_slot(slot)
        n_bytes: int = LL.llama_state_seq_get_size(self.handle, slot)
        return n_bytes + _STATE_FILE_BYTES

    def save_state(self, slot: int, path: str) -> int:
        """Write a slot's cells to a file, a layer at a time; return its bytes, 0: it failed."""
        self._check_slot(slot)
        # The tokens are the caller's to keep.
        n_bytes: int = LL.llama_state_seq_save_file(self.handle, os.fsencode(path), slot, None, 0)
        return n_bytes

    def load_state(self, slot: int, path: str, n_tokens: int) -> bool:
        """Read into an empty slot what `save_state` wrote; False: not taken, it is empty then.

        The file has to be just as it was written, though more may follow in it.
        """
        self._check_slot(slot)
        # Room for the tokens that are not in the file.
        tokens, n_read = (ctypes.c_int32 * 1)(), ctypes.c_size_t()
        n_bytes: int = LL.llama_state_seq_load_file(
            self.handle, os.fsencode(path), slot, tokens, 0, ctypes.byref(n_read)
        )
        if n_bytes and LL.llama_memory_seq_pos_max(self._memory, slot) == n_tokens - 1:
            return True
        LL.llama_memory_seq_rm(self._memory, slot, -1, -1)
        return False

    def set_threads(self, n_threads: int) -> None:
        """Use this many threads from the next decode on."""
        LL.llama_set_n_threads(self.handle, n_threads, n_threads)

    def memory(self) -> list[BufferUse]:
        """Return what llama.cpp really holds, per device."""
        return read_memory(self.handle)

    def close(self) -> None:
        """Free the KV cache and the computation."""
        if self.handle:
            LL.llama_free(self.handle)
            self.handle = 0

    def _state(self, row: int) -> Row:
        address: int | None = _embeddings_of(self.handle, row)
        if not address:
            raise WorkerError(f"llama.cpp gave no state of token {row} in a batch")
        return np.ctypeslib.as_array((ctypes.c_float * self._n_embd).from_address(address)).copy()

    def _take_logits(self, n_outputs: int) -> None:
        # Waits for a GPU, also where no row is wanted: decode's time is the computation's.
        if not n_outputs:
            LL.llama_synchronize(self.handle)
            return
        address: int = _get_logits(self.handle)
        if address != self._logits_at:
            self._rows = list(_matrix(address, self.n_slots, self._n_vocab))
            self._logits_at = address
        self._n_outputs = n_outputs

    def _check_slot(self, slot: int) -> None:
        if not 0 <= slot < self.n_slots:
            raise WorkerError(f"there is no slot {slot}: the context has {self.n_slots}")


def new_context(model: Model, load: Load, params: Any) -> Pointer:
    """Return a new llama_context.

    Raises:
        LoadError: llama.cpp's own reason, as its log has it.
    """
    handle: Pointer | None = LL.llama_init_from_model(model.handle, params)
    if not handle:
        raise load_error(
            f"llama.cpp could not make a context of {params.n_ctx} tokens for "
            f"{Path(load.path).name}",
            LOG.errors(),
        )
    return handle


def common_params(model: Model, load: Load) -> Any:
    """Return the parameters that all contexts of a model share."""
    params = LL.llama_context_default_params()
    params.n_threads = params.n_threads_batch = load.n_threads
    params.flash_attn_type = _FLASH[load.flash_attn]
    params.type_k = params.type_v = _KV_TYPES[load.kv_type]
    # If all slots share the cells, a long text may take what short ones leave.
    params.kv_unified = load.kv_unified
    # As llama.cpp rounds it, but before it bounds the batch by it.
    params.n_ctx = n_cells(
        load.n_ctx,
        flash_attn=load.flash_attn != "off",
        n_ctx_original=model.n_ctx_original,
    )
    if not load.kv_unified:
        params.n_ctx *= load.n_slots
    return params


def _params(model: Model, load: Load) -> Any:
    params = common_params(model, load)
    params.n_batch = max(load.n_batch, load.n_slots)
    params.n_ubatch = load.n_ubatch
    params.n_seq_max = load.n_slots
    # Logits are computed for one token of each slot: no room for a whole micro-batch of rows.
    params.n_outputs_max = load.n_slots
    # States are taken as they are, whatever pooling the file names.
    params.pooling_type = _NO_POOLING
    # Sliding-window layers keep all cells too: any prefix of a slot can be used again.
    params.swa_full = True
    return params


def _bytes_of(state: State) -> Any:
    return ctypes.cast(state.ctypes.data, ctypes.POINTER(ctypes.c_uint8))


def _matrix(address: int, n_rows: int, n_columns: int) -> Row:
    # llama.cpp's output buffer has a row for each slot at least.
    buffer = (ctypes.c_float * (n_rows * n_columns)).from_address(address)
    return np.ctypeslib.as_array(buffer).reshape(n_rows, n_columns)
