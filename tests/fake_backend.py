"""A model in memory that takes nothing amiss silently: the engine's loop is tested on it.

The next token is a hash of every token in the slot's KV cache with its position, and of the
sampler's own history. A wrong position, a stale prefix, a wrong slot, a removal that was
missed or a sampler that was lost thus changes the text. What would make llama.cpp abort, or
spoil another slot, is a Misuse, which no request boundary swallows.
"""

from __future__ import annotations

import hashlib
import re
import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from shimpy.engine.backend import Chunk, DecodeStatus, FimRole
from shimpy.errors import InvalidOptionError, WorkerError
from shimpy.protocol.messages import BufferUse, Sampling, TokenLogprob

BOS, EOS, CONTROL, FIM_PREFIX, FIM_SUFFIX, FIM_MIDDLE = range(256, 262)
CONTROL_TEXTS = {
    BOS: "<s>",
    EOS: "</s>",
    CONTROL: "<ctl>",
    FIM_PREFIX: "<pre>",
    FIM_SUFFIX: "<suf>",
    FIM_MIDDLE: "<mid>",
}
WORDS = [
    *(f" {word}".encode() for word in ("the", "fox", "a", "an", "and", "end", "ab", "abc", "b")),
    b"\n",
    # Halves of characters, and bytes that are none.
    "日".encode()[:1],
    "日".encode()[1:],
    "🙂".encode()[:2],
    "🙂".encode()[2:],
    "é".encode(),
    b"\xff",
]
FIRST_WORD = 262
N_VOCAB = FIRST_WORD + len(WORDS)
# What it answers with.
ANSWER = [CONTROL, *range(FIRST_WORD, N_VOCAB)]
# One sampled token in so many ends the text.
EOS_EVERY = 40

_SPECIAL = re.compile("(" + "|".join(map(re.escape, CONTROL_TEXTS.values())) + ")")
_IDS = {text: token for token, text in CONTROL_TEXTS.items()}


class Misuse(BaseException):
    """The engine did what llama.cpp would not survive."""


@dataclass(eq=False)
class _Cell:
    token: int
    holders: set[int] = field(default_factory=set)


class FakeBackend:
    """Implements shimpy.engine.backend.Backend without a model."""

    n_ctx_train = 4096
    n_vocab = N_VOCAB
    n_embd = 4
    add_bos = True
    bos_id = BOS
    eos_id = EOS
    has_fim = True
    n_overridden = 0
    untouched_bytes = 0
    is_mapped = True
    state_key = "fake"

    def __init__(
        self,
        *,
        n_ctx: int = 256,
        n_slots: int = 4,
        n_batch: int = 64,
        can_split: bool = True,
        can_shift: bool = True,
        has_encoder: bool = False,
        has_window: bool = False,
        kv_unified: bool = True,
        n_cells: int | None = None,
        script: Sequence[int] | None = None,
    ) -> None:
        self.n_ctx = n_ctx
        self.n_slots = n_slots
        self.kv_unified = kv_unified
        self.n_batch = n_batch
        self.can_split = can_split
        self.can_shift = can_shift
        self.state_is_whole = has_window or not can_split
        self.has_encoder = has_encoder
        # What every request is answered, in place of the hash's choice.
        self.script = script
        self.end_ids = [EOS] if has_encoder else []
        self.between_ids = [EOS] if has_encoder else []
        self.n_all = n_ctx if kv_unified else n_ctx * n_slots
        # Fewer than all: a cache that is full sooner than the batcher can know.
        self._n_cells = self.n_all if n_cells is None else n_cells
        self._kv: list[dict[int, _Cell]] = [{} for _ in range(n_slots)]
        # Tokens of each slot that came from a file without what had left the window.
        self._n_whole = [0] * n_slots
        # Moved positions, whose keys are turned with the next batch.
        self._is_shifted = [False] * n_slots
        self._rows: list[int] = []
        # The last batch, if decode_next may go on from it, and how often it did.
        self._single: list[Chunk] | None = None
        self.n_repeats = 0
        self.n_used = 0
        self.most_used = 0
        # Every batch, as (slot, start, tokens).
        self.batches: list[list[tuple[int, int, list[int]]]] = []
        # How often the weights were passed over: once a batch, but for slots that lie apart.
        self.n_passes = 0
        self.n_exchanges = 0
        self.embedded: list[list[list[int]]] = []
        self.threads: list[int] = []
        self.n_open_samplers = 0
        self.is_closed = False
        # Calls of decode, counted from 0, that fail; and removals that are refused.
        self.failing_decodes: set[int] = set()
        self.aborting_decodes: set[int] = set()
        self.fails_to_save = False
        self.fails_to_load = False
        self.refused_removals: set[int] = set()
        self._n_removals = 0

    # --- the vocabulary ---

    def tokenize(self, text: str, *, parse_special: bool) -> list[int]:
        if not parse_special:
            return list(text.encode())
        return [
            token
            for part in _SPECIAL.split(text)
            for token in ([_IDS[part]] if part in _IDS else part.encode())
        ]

    def piece(self, token: int, *, special: bool) -> bytes:
        if token < BOS:
            return bytes([token])
        if token < FIRST_WORD:
            return CONTROL_TEXTS[token].encode() if special else b""
        return WORDS[token - FIRST_WORD]

    def is_eog(self, token: int) -> bool:
        return token == EOS

    def fim_token(self, role: FimRole) -> int:
        known = {"prefix": FIM_PREFIX, "suffix": FIM_SUFFIX, "middle": FIM_MIDDLE}
        return known.get(role, -1)

    # --- the model ---

    def decode(self, chunks: Sequence[Chunk]) -> int:
        n_tokens = sum(len(chunk.tokens) + chunk.n_padding for chunk in chunks)
        slots = [chunk.slot for chunk in chunks]
        _demand(0 < n_tokens <= self.n_batch, f"a batch of {n_tokens} tokens")
        _demand(len(set(slots)) == len(slots), f"a slot is in two sequences: {slots}")
        for chunk in chunks:
            self._check(chunk)
        self._is_shifted = [False] * self.n_slots
        index = len(self.batches)
        self.batches.append([(c.slot, c.start, list(c.tokens)) for c in chunks])
        self._single = None
        if index in self.failing_decodes:
            # It leaves some of the batch behind, as an aborted decode does.
            self._add(chunks[0].slot, chunks[0].start, chunks[0].tokens[:1])
            raise WorkerError("llama.cpp refused the batch")
        if index in self.aborting_decodes:
            return DecodeStatus.ABORTED
        if self.n_used + n_tokens > self._n_cells:
            _demand(self._n_cells < self.n_all, "the KV cache is over its budget")
            return DecodeStatus.KV_FULL
        self._rows = []
        self.n_passes += self._passes_over(chunks)
        for chunk in chunks:
            self._add(chunk.slot, chunk.start, chunk.tokens)
            if chunk.wants_logits:
                self._rows.append(self._state(chunk.slot))
        if n_tokens == len(self._rows):
            self._single = list(chunks)
        return DecodeStatus.OK

    def decode_next(self, tokens: Sequence[int]) -> int:
        single = self._single
        _demand(single is not None, "the last batch was none of single tokens")
        assert single is not None
        pairs = zip(single, tokens, strict=True)
        self.n_repeats += 1
        return self.decode([Chunk(one.slot, one.start + 1, [token], True) for one, token in pairs])

    def _passes_over(self, chunks: Sequence[Chunk]) -> int:
        if self.kv_unified:
            return 1
        n_passes = 0
        lengths = [len(chunk.tokens) + chunk.n_padding for chunk in chunks]
        while any(lengths):
            # As many tokens of each slot of a run, as llama.cpp's split_equal has it.
            start = next(index for index, n in enumerate(lengths) if n)
            end = start + 1
            while (
                end < len(chunks) and lengths[end] and chunks[end].slot == chunks[end - 1].slot + 1
            ):
                end += 1
            n = min(lengths[start:end])
            lengths[start:end] = [length - n for length in lengths[start:end]]
            n_passes += 1
        return n_passes

    def _check(self, chunk: Chunk) -> None:
        _demand(0 <= chunk.slot < self.n_slots, f"slot {chunk.slot}")
        _demand(len(chunk.tokens) > 0, "an empty chunk")
        _demand(all(0 <= token < N_VOCAB for token in chunk.tokens), "a bad token id")
        kv = self._kv[chunk.slot]
        _demand(chunk.start == len(kv), f"position {chunk.start} after {len(kv)} tokens")
        _demand(chunk.start >= self._n_whole[chunk.slot], "a window was not restored")
        n_tokens = len(chunk.tokens) + chunk.n_padding
        _demand(chunk.start + n_tokens <= self.n_ctx, "a sequence over the context")
        _demand(not chunk.n_padding or self.can_split, "padding that can't be dropped")

    def _add(self, slot: int, start: int, tokens: Sequence[int]) -> None:
        for position, token in enumerate(tokens, start):
            self._kv[slot][position] = _Cell(token, {slot})
        self.n_used += len(tokens)
        self.most_used = max(self.most_used, self.n_used)

    def _state(self, slot: int) -> int:
        kv = self._kv[slot]
        _demand(max(kv) == len(kv) - 1, f"slot {slot} has gaps")
        return hash(tuple((position, kv[position].token) for position in range(len(kv))))

    def see(self, tokens: Sequence[int]) -> None:
        """Make row 0 what it is after a decode of these tokens."""
        self._rows = [hash(tuple(enumerate(tokens)))]

    def content(self, slot: int) -> list[int]:
        """The tokens that a slot's KV holds."""
        return [cell.token for _, cell in sorted(self._kv[slot].items())]

    def make_sampler(self, sampling: Sampling, history: Sequence[int]) -> FakeSampler:
        if sampling.grammar == "bad":
            raise InvalidOptionError("the grammar does not parse", option="grammar")
        self.n_open_samplers += 1
        return FakeSampler(self, sampling, history)

    def row(self, index: int) -> int:
        _demand(0 <= index < len(self._rows), f"row {index} of {len(self._rows)}")
        return self._rows[index]

    # --- the KV cache ---

    def kv_remove(self, slot: int, start: int, end: int) -> bool:
        self._single = None
        kv = self._kv[slot]
        end = max(kv, default=-1) + 1 if end < 0 else end
        self._n_removals += 1
        if self._n_removals - 1 in self.refused_removals and start > 0:
            return False
        if not self.can_split and (start > 0 or end < len(kv)):
            return False
        for position in range(start, end):
            self._let_go(kv.pop(position), slot)
        if not kv:
            self._n_whole[slot] = 0
        return True

    def _let_go(self, cell: _Cell, slot: int) -> None:
        cell.holders.remove(slot)
        if not cell.holders:
            self.n_used -= 1

    def kv_copy(self, source: int, target: int, n: int) -> bool:
        self._single = None
        _demand(source != target, "a copy onto itself")
        _demand(not self._kv[target], f"slot {target} is not empty")
        _demand(self.can_split or n == len(self._kv[source]), "a part of a recurrent state")
        for position in range(n):
            _demand(position in self._kv[source], f"slot {source} has no position {position}")
            cell = self._kv[source][position]
            if self.kv_unified:
                cell.holders.add(target)
                self._kv[target][position] = cell
            else:
                self._add(target, position, [cell.token])
        self._n_whole[target] = self._n_whole[source]
        return True

    def kv_exchange(self, first: int, second: int) -> bool:
        self._single = None
        _demand(not self.kv_unified, "the slots have the same cells")
        _demand(not (self._is_shifted[first] or self._is_shifted[second]), "a shift is lost")
        self.n_exchanges += 1
        for of in (self._kv, self._n_whole):
            of[first], of[second] = of[second], of[first]
        for slot in (first, second):
            for cell in self._kv[slot].values():
                cell.holders = {slot}
        return True

    def kv_shift(self, slot: int, start: int, end: int, delta: int) -> None:
        self._single = None
        _demand(self.can_shift, "the model can't shift")
        self._is_shifted[slot] = True
        kv = self._kv[slot]
        moved = {position: kv.pop(position) for position in range(start, end)}
        for position, cell in moved.items():
            _demand(cell.holders == {slot}, "a cell of another slot is moved")
            _demand(position + delta not in kv, "a position is taken")
            kv[position + delta] = cell

    def state_bytes(self, slot: int) -> int:
        return 4 * len(self._kv[slot])

    def save_state(self, slot: int, path: str) -> int:
        _demand(len(self._kv[slot]) >= self._n_whole[slot], "a window was not restored")
        state = array("i", self.content(slot)).tobytes()
        if self.fails_to_save:
            Path(path).write_bytes(state[:-1])
            return 0
        return Path(path).write_bytes(state)

    def load_state(self, slot: int, path: str, n_tokens: int) -> bool:
        self._single = None
        _demand(not self._kv[slot], f"slot {slot} is not empty")
        _demand(self.n_used + n_tokens <= self.n_all, "the KV cache is over its budget")
        _demand(n_tokens <= self.n_ctx, "a prefix over the context")
        if self.fails_to_load:
            return False
        tokens = array("i", Path(path).read_bytes()[: 4 * n_tokens])
        self._add(slot, 0, tokens)
        self._n_whole[slot] = n_tokens if self.state_is_whole else 0
        return True

    # --- the rest ---

    def embed(self, inputs: Sequence[Sequence[int]], *, normalize: bool) -> bytes:
        _demand(len(inputs) > 0, "nothing to embed")
        _demand(all(0 < len(ids) <= self.n_ctx for ids in inputs), "an input's length")
        self.embedded.append([list(ids) for ids in inputs])
        return b"".join(vector(ids, normalize=normalize) for ids in inputs)

    def embed_last(self, chunks: Sequence[Chunk], *, normalize: bool) -> bytes:
        self._single = None
        _demand(0 < len(chunks) <= self.n_slots, f"the states of {len(chunks)} slots")
        _demand(not self.has_encoder, "states of an encoder")
        for chunk in chunks:
            self._check(chunk)
            _demand(len(chunk.tokens) == 1, "a state after several tokens")
            self._add(chunk.slot, chunk.start, chunk.tokens)
        self._rows = []
        texts = [self.content(chunk.slot) for chunk in chunks]
        self.embedded.append(texts)
        return b"".join(vector(ids, normalize=normalize) for ids in texts)

    def set_threads(self, n_threads: int) -> None:
        self.threads.append(n_threads)

    def memory(self) -> list[BufferUse]:
        return [BufferUse("CPU", 1000, 200, 30)]

    def close(self) -> None:
        _demand(self.n_open_samplers == 0, "samplers are left")
        self.is_closed = True


class FakeSampler:
    """Draws from a hash of the row, the seed and all that it chose before."""

    def __init__(self, backend: FakeBackend, sampling: Sampling, history: Sequence[int]) -> None:
        self._backend = backend
        self._sampling = sampling
        self._history = list(history)
        self._n_sampled = 0
        self._is_closed = False

    def sample(self, row: int) -> tuple[int, TokenLogprob | None]:
        _demand(not self._is_closed, "a sampler is used after its end")
        self._n_sampled += 1
        if self._sampling.grammar == "explode" and self._n_sampled == 3:
            raise WorkerError("no token is left")
        script = self._backend.script
        key = (self._backend.row(row), self._sampling.seed or 0, tuple(self._history))
        draw = _digest(hash(key))
        token = EOS if draw % EOS_EVERY == 0 else ANSWER[draw // EOS_EVERY % len(ANSWER)]
        if script is not None:
            token = script[self._n_sampled - 1]
        self._history.append(token)
        if self._sampling.n_logprobs is None:
            return token, None
        return token, TokenLogprob(token, "", -1.0, self._backend.piece(token, special=False))

    def close(self) -> None:
        _demand(not self._is_closed, "a sampler is closed twice")
        self._is_closed = True
        self._backend.n_open_samplers -= 1


def vector(ids: Sequence[int], *, normalize: bool) -> bytes:
    """The vector that stands for an input."""
    return struct.pack("<4f", len(ids), ids[0], ids[-1], normalize)


def _digest(value: int) -> int:
    data = (value % 2**64).to_bytes(8, "little")
    return int.from_bytes(hashlib.blake2b(data, digest_size=6).digest(), "little")


def _demand(holds: bool, what: str) -> None:
    if not holds:
        raise Misuse(what)
