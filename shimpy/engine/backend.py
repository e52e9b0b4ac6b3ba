"""What the engine's loop needs of a loaded model: the seam between it and llama.cpp.

`shimpy.engine.llama` implements it with llama.cpp, tests/fake_backend.py without. Nothing
here is thread-safe but `tokenize`, `piece`, `is_eog` and `fim_token`, which the reader
thread uses while the loop decodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import msgspec

from shimpy.protocol.messages import BufferUse, Sampling, TokenLogprob

FimRole = Literal["prefix", "suffix", "middle", "repo", "separator"]


class Chunk(msgspec.Struct, frozen=True):
    """Consecutive tokens of one slot in a batch; the last gives logits where `wants_logits`.

    `n_padding` tokens more are computed behind them, and leave the KV cache at once: chunks of one
    length are one pass over the weights.
    """

    slot: int
    start: int
    tokens: Sequence[int]
    wants_logits: bool
    n_padding: int = 0


class DecodeStatus:
    """What `Backend.decode` answers."""

    OK: Literal[0] = 0
    # No room in the KV cache; nothing was changed.
    KV_FULL: Literal[1] = 1
    ABORTED: Literal[2] = 2


class Sampler(Protocol):
    """Chooses the tokens of one request and remembers what it chose."""

    def sample(self, row: int) -> tuple[int, TokenLogprob | None]:
        """Return the token chosen from the logits of output `row` of the last decode.

        The token is accepted into the sampler's own history (penalties, grammar).
        """

    def close(self) -> None:
        """Free what llama.cpp holds for it."""


class Backend(Protocol):
    """A loaded model with one context of `n_slots` sequences."""

    # Tokens that all slots share where the KV cache is unified; else those of each slot.
    n_ctx: int
    kv_unified: bool
    n_ctx_train: int
    n_slots: int
    n_batch: int
    n_vocab: int
    n_embd: int
    # Whole texts start with `bos_id` where `add_bos`; -1: the vocabulary has no such token.
    add_bos: bool
    bos_id: int
    eos_id: int
    # What the model wants behind a whole text to embed: BERT's [SEP]; mostly nothing.
    end_ids: list[int]
    # What it wants between two texts to compare; mostly nothing.
    between_ids: list[int]
    has_fim: bool
    has_encoder: bool
    # Positions of a slot can be moved (context shift).
    can_shift: bool
    # A part of a slot can be dropped or copied; False for recurrent models: whole slots only.
    can_split: bool
    # A slot's state, once saved and restored, is of use from its end on only: a recurrent state,
    # or sliding windows, of which no more is saved than the end needs.
    state_is_whole: bool
    # What a state depends on beside the model's files; those of another key are not restored.
    state_key: str
    # Tensors that llama.cpp said it put elsewhere than the layer: experts kept in host memory.
    n_overridden: int
    # RAM that the KV cache takes only as it is used, and that nothing had used once it was made.
    untouched_bytes: int
    # Its weights in RAM lie in the mapped file, page-locked or not.
    is_mapped: bool

    def tokenize(self, text: str, *, parse_special: bool) -> list[int]:
        """Return the text's tokens, without start or end tokens."""

    def piece(self, token: int, *, special: bool) -> bytes:
        """Return the token's bytes; those of a control token are empty unless `special`."""

    def is_eog(self, token: int) -> bool:
        """Whether the token ends a generation."""

    def fim_token(self, role: FimRole) -> int:
        """Return the model's fill-in-the-middle token for a role; -1: it has none."""

    def decode(self, chunks: Sequence[Chunk]) -> int:
        """Run the model over at most `n_batch` tokens, padding included; return a DecodeStatus.

        The logits of the chunks that want them are rows 0, 1, ... in the chunks' order.

        Raises:
            WorkerError: llama.cpp refused the batch.
        """

    def decode_next(self, tokens: Sequence[int]) -> int:
        """Run the last decode's batch again, each slot's next token in place of its only one.

        After a decode of one token a chunk, all with logits, that was OK; nothing else was done to
        the KV cache since. Returns a DecodeStatus.

        Raises:
            WorkerError: it was none of so many tokens, or llama.cpp refused this batch.
        """

    def make_sampler(self, sampling: Sampling, history: Sequence[int]) -> Sampler:
        """Return a sampler; `history` is the prompt, for the penalties.

        Raises:
            InvalidOptionError: an option or the grammar can't be used.
        """

    def kv_remove(self, slot: int, start: int, end: int) -> bool:
        """Drop the positions [start, end) of a slot; end -1: to its end. False: it can't."""

    def kv_copy(self, source: int, target: int, n: int) -> bool:
        """Let `target`, which is empty, have the first `n` positions of `source` too.

        In a unified cache they are the same cells. False: it can't.
        """

    def kv_exchange(self, first: int, second: int) -> bool:
        """Let two slots with cells of their own exchange all that they hold. False: it can't."""

    def kv_shift(self, slot: int, start: int, end: int, delta: int) -> None:
        """Move the positions [start, end) of a slot by `delta`."""

    def state_bytes(self, slot: int) -> int:
        """Return how many bytes `save_state` writes for a slot at most."""

    def save_state(self, slot: int, path: str) -> int:
        """Write what the KV cache holds for a slot to a file; return its bytes, 0: it failed."""

    def load_state(self, slot: int, path: str, n_tokens: int) -> bool:
        """Read into an empty slot what `save_state` wrote for one of `n_tokens` tokens.

        The file has to be just as it was written, though more may follow in it: llama.cpp
        aborts over others. Returns False where it was not taken; the slot is empty then.
        """

    def embed(self, inputs: Sequence[Sequence[int]], *, normalize: bool) -> bytes:
        """Return one little-endian float32 vector of `n_embd` for each input, in order.

        An input has its start and end tokens (`bos_id`, `end_ids`) and at most `n_ctx` tokens.

        Raises:
            UnsupportedError: the context was not loaded for embeddings.
            ContextExceededError: an input is empty or too long.
            WorkerError: llama.cpp refused the batch.
        """

    def embed_last(self, chunks: Sequence[Chunk], *, normalize: bool) -> bytes:
        """Decode one token of each of some slots; return the model's state after each.

        One little-endian float32 vector of `n_embd` for each chunk, in their order. Not for a
        context that was loaded for embeddings.

        Raises:
            WorkerError: llama.cpp refused the batch.
        """

    def set_threads(self, n_threads: int) -> None:
        """Use this many threads from the next decode on."""

    def memory(self) -> list[BufferUse]:
        """Return what llama.cpp really holds, per device."""

    def close(self) -> None:
        """Free the model."""


def n_ctx_seq(backend: Backend) -> int:
    """Return the tokens that one sequence may have: `n_ctx` may be several such.

    Past the length that a model was trained for it writes nonsense.
    """
    return min(backend.n_ctx, backend.n_ctx_train) if backend.n_ctx_train else backend.n_ctx
