"""Decides which tokens run in the next decode: continuous batching over slots.

A sequence waits in a queue (`admission`), runs in a slot, and leaves. While it runs it has tokens
that are not in the KV cache yet: many during prefill, one (the last sampled) from then on. Each
batch holds that one token of every sequence that generates, and as many prefill tokens beside
them as keep the batch short.

The running sequences are in order of arrival.
"""

from __future__ import annotations

import msgspec

from shimpy.engine.admission import Admission, Restore
from shimpy.engine.backend import Chunk
from shimpy.engine.halving import Halving, Part
from shimpy.engine.pace import Pace
from shimpy.engine.parker import Park, Parker
from shimpy.engine.prefixes import Save, SavedPrefixes
from shimpy.engine.sequence import KvOp, Match, Sequence, slot_of
from shimpy.engine.shares import Shares, share_alone, share_out
from shimpy.engine.slots import Slots
from shimpy.engine.turns import Turns


class Batch(msgspec.Struct, frozen=True):
    """One decode call: first the KV operations, then the chunks, one for each sequence."""

    ops: list[KvOp]
    chunks: list[Chunk]
    sequences: list[Sequence]
    # Tokens of those that do not generate yet, with their padding.
    n_prefill: int
    # Tokens that their attention goes over beside their own.
    depth: int
    # Of a step without any: whether it is all of it, and how many streams that has.
    part: Part = "whole"
    n_streams: int = 0


class Batcher:
    """The queue, the running sequences and their slots."""

    def __init__(
        self,
        *,
        n_slots: int,
        n_ctx: int,
        n_ctx_seq: int,
        n_batch: int,
        can_split: bool,
        can_shift: bool,
        kv_unified: bool = True,
        saved: SavedPrefixes | None = None,
        attends_idle: bool = False,
        can_park: bool = False,
        uses_gpu: bool = False,
    ) -> None:
        """Start with empty slots.

        `n_ctx`: the cells of all slots together, which they share if `kv_unified`. `saved`: the
        prefixes that can be restored; the caller adds and discards them. `attends_idle`: what
        idle slots hold slows down those that are busy. `can_park`: it can be copied to RAM, for
        which the batcher then asks. `uses_gpu`: the time of a batch may be its own, however few
        its tokens; on a CPU two of half of the streams may be quicker than one.
        """
        self._n_ctx = n_ctx
        # Of these cells, those that one sequence may take.
        self._n_ctx_seq = n_ctx_seq
        self._n_batch = n_batch
        self._can_split = can_split
        self._can_shift = can_shift
        self._attends_idle = attends_idle
        self._saved = SavedPrefixes(whole=True) if saved is None else saved
        self._pace = Pace(n_batch, uses_gpu=uses_gpu)
        self._turns = Turns() if attends_idle else None
        self._halving = None if uses_gpu else Halving()
        # A batch has room for one token of each sequence.
        n_slots = min(n_slots, n_batch)
        self._slots = Slots(n_slots, n_ctx, can_split=can_split, kv_unified=kv_unified)
        # Slots whose cells nothing has used yet: the first batch of each takes longer, as the
        # system hands out their RAM then.
        self._unused = set() if kv_unified else set(range(n_slots))
        self._parker = None
        if can_park:
            self._parker = Parker(self._slots, self._saved, attends_idle=attends_idle)
        self._admission = Admission(
            self._slots,
            self._saved,
            self._parker,
            n_ctx=n_ctx,
            n_ctx_seq=n_ctx_seq,
            attends_idle=attends_idle,
        )
        self._running: list[Sequence] = []
        self._full: list[Sequence] = []
        # The last step, if it was a whole one of all that run, without prompts.
        self._step: Batch | None = None
        self._n_submitted = 0
        # Prompts and streams have batches in turn, and of prompts the oldest and the shortest.
        self._is_prompts_turn = self._is_oldests_turn = False

    @property
    def n_running(self) -> int:
        """Sequences that have a slot."""
        return len(self._running)

    @property
    def n_waiting(self) -> int:
        """Sequences in the queue."""
        return len(self._admission)

    @property
    def n_kv_used(self) -> int:
        """Cells of the KV cache that are taken, by idle slots too."""
        return self._slots.cells.n_used

    # --- events ---

    def submit(self, sequence: Sequence) -> None:
        """Put a sequence into the queue; its prompt is shorter than the context."""
        assert 0 < len(sequence.tokens) < self._n_ctx_seq
        self._n_submitted += 1
        sequence.order = self._n_submitted
        if not self._can_shift:
            sequence.n_keep = None
        if sequence.n_keep is not None:
            n_keep = sequence.n_prompt if sequence.n_keep < 0 else sequence.n_keep
            sequence.n_keep = min(n_keep, self._n_ctx_seq // 2)
        self._admission.add(sequence)

    def on_decoded(self, batch: Batch, n_times: int = 1) -> None:
        """Note that a batch is in the KV cache, and as many after it as were like it."""
        grow = self._slots.cells.grow
        for sequence, chunk in zip(batch.sequences, batch.chunks, strict=True):
            n = n_times * len(chunk.tokens)
            sequence.n_kv += n
            grow(chunk.slot, n)
        if self._slots.kv_unified and len(batch.chunks) > 1:
            self._slots.n_mixed += n_times

    def on_repeated(
        self, batch: Batch, drawn: list[list[int]], n_times: int, elapsed_s: float
    ) -> None:
        """Note that a step was decoded `n_times` more, in `elapsed_s`; see `n_repeats`.

        `drawn`: the tokens that each of its sequences was given.
        """
        if not n_times:
            return
        self.on_decoded(batch, n_times)
        for sequence, tokens in zip(batch.sequences, drawn, strict=True):
            sequence.tokens += tokens
            sequence.n_generated += len(tokens)
        self.on_timed(batch, elapsed_s, n_times)

    def on_timed(self, batch: Batch, elapsed_s: float, n_times: int = 1) -> None:
        """Learn from how long a batch took, or `n_times` like it together.

        Who waits for its tokens need not wait for this.
        """
        if batch.n_prefill and not self._note_use(batch):
            self._pace.on_batch(batch.n_prefill, elapsed_s, depth=batch.depth)
            if self._turns is not None:
                n_tokens = sum(len(chunk.tokens) for chunk in batch.chunks)
                self._turns.attention.on_batch(n_tokens, elapsed_s, depth=batch.depth)
        if self._parker is not None:
            self._parker.on_batch(elapsed_s, batch.n_prefill)
        if self._halving is not None and batch.n_streams:
            self._halving.on_batch(batch.n_streams, batch.part, elapsed_s, n_times)

    def _note_use(self, batch: Batch) -> bool:
        """Note which slots a batch used; return whether one of them for the first time."""
        if not self._unused:
            return False
        first = self._unused.intersection(chunk.slot for chunk in batch.chunks)
        self._unused -= first
        return bool(first)

    def on_token(self, sequence: Sequence, token: int) -> bool:
        """Append a sampled token; return whether the sequence may go on after it."""
        sequence.tokens.append(token)
        sequence.n_generated += 1
        if sequence.n_generated >= sequence.n_predict:
            return False
        if len(sequence.tokens) < self._n_ctx_seq:
            return True
        if sequence.n_keep is None:
            return False
        self._full.append(sequence)
        return True

    def on_kv_full(self) -> Sequence | None:
        """Make room after llama.cpp found none for a batch that should have fitted.

        Returns the only running sequence when there is nothing left to give up.
        """
        if self._slots.evict(self._n_ctx):
            return None
        if len(self._running) == 1:
            return self._running[0]
        self._preempt()
        return None

    def on_kv_refused(self) -> None:
        """Start from an empty KV cache after llama.cpp refused to remove a part."""
        self._slots.drop_all()

    def on_restored(self, restore: Restore) -> None:
        """Note that a prefix is in its slot; one that can't be restored is not mentioned."""
        tokens = restore.prefix.tokens.tolist()
        self._slots.on_restored(restore.slot, tokens, whole=self._saved.whole)

    def on_parked(self, park: Park, elapsed_s: float, *, is_kept: bool) -> None:
        """Note whether a cache was copied, and how long that took."""
        assert self._parker is not None, "nothing may be copied"
        is_waited_for = bool(self._running or self._admission)
        self._parker.on_copied(park, elapsed_s, is_kept=is_kept, is_waited_for=is_waited_for)

    def finish(self, sequence: Sequence, *, keep_kv: bool = True) -> None:
        """Take a sequence out, wherever it is; its KV stays for later prompts."""
        if sequence.slot is None:
            self._admission.remove(sequence)
            return
        self._admission.on_left()
        self._running.remove(sequence)
        if sequence in self._full:
            self._full.remove(sequence)
        if keep_kv:
            self._slots.release(sequence)
        else:
            self._slots.drop(sequence)

    def plan_saves(self) -> tuple[list[KvOp], list[Save]]:
        """Return what to save now that nothing runs, and the KV operations to come before.

        The slots are cut to what is saved of them.
        """
        assert not self._running
        saves = self._saved.choose_saves(self._slots.idle_caches())
        for save in saves:
            if save.slot is not None:
                self._slots.cut(save.slot, len(save.tokens))
        return self._slots.take_ops(), saves

    # --- in quiet moments ---

    @property
    def quiet_s(self) -> float | None:
        """For how long nothing has to run before `next_copy`.

        None: something runs, or there is nothing to copy to RAM.
        """
        if self._running or self._admission or self._parker is None:
            return None
        return self._parker.quiet_s

    def next_copy(self) -> Park | None:
        """Return what to copy to RAM after `quiet_s`; None: nothing that has to be, or may be."""
        assert self._parker is not None, "nothing may be copied"
        return self._parker.next_in_quiet()

    # --- the next batch ---

    def next_batch(self, now: float) -> Batch | Restore | Park | None:
        """Return what to decode next, or to do before; None: nothing runs, nothing waits.

        The same batch may be asked for again after on_kv_full or on_kv_refused.
        """
        if (step := self._step) is not None and self._comes_again(step):
            self._step = _next_of(step)
            return self._step
        # Who begins to run in a look that ends without a batch is not in it.
        self._step = None
        # In this order: a leader's tokens must not move before its followers share them.
        self._attach_followers()
        self._shift_full()
        before = self._copy_beside() or self._admission.admit(self._running, now)
        if before is not None:
            return before
        if self._parker is not None and self._running and self._parker.is_costly:
            self._parker.drop_spare(self._admission.soon)
        while self._running:
            generating, prefilling = self._ready()
            if prefilling and self._turns is not None:
                n_busy, is_alone = self._slots.n_cells_busy(), not generating
                prefilling = self._turns.without_held(prefilling, n_busy, now, is_alone=is_alone)
            n_prefill = self._make_room(generating, prefilling)
            if n_prefill is not None:
                return self._compose(generating, prefilling, n_prefill, now)
            self._preempt()
        return None

    def n_repeats(self, batch: Batch) -> int:
        """Return how often a step may be decoded again before `next_batch` has to be asked.

        Each time with the next token of each stream, none of which then comes to its limit; less
        often where a stream ends, or something arrives.
        """
        if batch is not self._step or not self._comes_again(batch):
            return 0
        sequences = batch.sequences
        n = min(one.n_predict - one.n_generated for one in sequences) - 1
        n = min(n, self._n_ctx_seq - 1 - max(len(one.tokens) for one in sequences))
        if self._slots.kv_unified:
            n = min(n, self._slots.cells.n_free // len(sequences))
        if self._halving is not None:
            n = min(n, self._halving.n_whole(batch.n_streams))
        return n

    def _comes_again(self, step: Batch) -> bool:
        """Whether nothing has happened since a step but that each has got its next token.

        All of them still run if they are as many: others begin to run only in a look at who waits.
        """
        n = len(step.sequences)
        if n != len(self._running) or self._admission or self._full:
            return False
        if self._slots.has_ops or (self._slots.kv_unified and self._slots.cells.n_free < n):
            return False
        if self._halving is not None and self._halving.divides(n):
            return False
        return self._parker is None or not self._parker.is_costly

    def _copy_beside(self) -> Park | None:
        if self._parker is None or not self._parker.is_costly:
            return None
        return self._parker.next_beside(self._running, self._admission.soon)

    def _attach_followers(self) -> None:
        for sequence in self._running:
            leader = sequence.leader
            if leader is None:
                continue
            # It has gone, or has since begun with more of a restored prefix than is to be shared,
            # which is of use as a whole only.
            if leader.slot is None or leader.slot.n_whole > sequence.n_shared:
                self._slots.reuse(sequence, self._slots.best_match(sequence))
            elif leader.n_kv >= sequence.n_shared:
                n = sequence.n_shared
                self._slots.reuse(sequence, Match(leader.slot, n, n))

    def _shift_full(self) -> None:
        for sequence in self._full:
            assert sequence.n_keep is not None
            self._slots.shift(sequence, sequence.n_keep)
        self._full.clear()

    def _ready(self) -> tuple[list[Sequence], list[Sequence]]:
        """Return the sequences with one pending token, and those with more that may go on."""
        generating, prefilling = [], []
        for sequence in self._running:
            if len(sequence.tokens) - sequence.n_kv == 1:
                generating.append(sequence)
            elif sequence.leader is None:
                prefilling.append(sequence)
        return generating, prefilling

    def _make_room(self, generating: list[Sequence], prefilling: list[Sequence]) -> int | None:
        """Evict idle caches for the batch; return its prefill tokens, None: no room at all."""
        n_decode = len(generating)
        n_prefill = self._n_batch - n_decode
        if n_decode:
            n_prefill = min(n_prefill, self._pace.chunk_for(len(prefilling)))
        if not self._slots.kv_unified:
            # Each has its room, which shorter ones may be padded into.
            return n_prefill if prefilling else 0
        n_prefill = min(n_prefill, sum(s.n_pending for s in prefilling))
        cells = self._slots.cells
        while (n_missing := n_decode + n_prefill - cells.n_free) > 0:
            if not self._slots.evict(n_missing):
                break
        if cells.n_free < max(1, n_decode):
            return None
        return min(n_prefill, cells.n_free - n_decode)

    def _preempt(self) -> None:
        """Send the youngest sequence back to the head of the queue."""
        youngest = self._running.pop()
        self._slots.release(youngest)
        youngest.n_preempted += 1
        self._admission.put_back(youngest)

    def _compose(
        self,
        generating: list[Sequence],
        prefilling: list[Sequence],
        n_prefill: int,
        now: float,
    ) -> Batch:
        self._admission.on_next_batch()
        if self._parker is not None:
            self._parker.on_next_batch()
        if self._halving is not None and self._halving.is_halfway(generating):
            n_prefill = 0
        elif not self._slots.kv_unified and generating and n_prefill:
            # One batch would be two passes over the weights all the same, and a worse cut.
            self._is_prompts_turn = not self._is_prompts_turn
            if self._is_prompts_turn:
                generating = []
            else:
                n_prefill = 0
        sequences = [*generating]
        if not self._slots.kv_unified:
            self._slots.gather()
            # Only so llama.cpp computes those together that are in neighbouring slots.
            sequences.sort(key=slot_of)
        part: Part = "whole"
        n_streams = 0
        if self._halving is not None and not n_prefill:
            sequences, n_streams, part = self._halving.next_part(sequences)
        chunks = [_chunk(sequence, 1) for sequence in sequences]
        if n_prefill:
            prompts = self._share_out(prefilling, n_prefill, now)
            sequences += [sequence for sequence, _ in prompts]
            chunks += [_chunk(sequence, n) for sequence, n in prompts]
            n_prefill = sum(n for _, n in prompts)
        depth = self._depth(chunks) if n_prefill else 0
        ops = self._slots.take_ops()
        # Behind a shift slots have not been gathered yet.
        is_plain = part == "whole" and not n_prefill and not ops
        batch = Batch(ops, chunks, sequences, n_prefill, depth, part, n_streams)
        self._step = batch if is_plain and len(sequences) == len(self._running) else None
        return batch

    def _share_out(self, prefilling: list[Sequence], n_tokens: int, now: float) -> Shares:
        if not self._slots.kv_unified:
            self._is_oldests_turn = not self._is_oldests_turn
            return share_alone(
                prefilling,
                n_tokens,
                is_oldests_turn=self._is_oldests_turn,
                n_cells=self._n_ctx_seq,
                can_pad=self._can_split,
            )
        shares = share_out(prefilling, n_tokens)
        if self._turns is not None:
            for sequence, _ in shares:
                self._turns.on_next(sequence, now)
        return shares

    def _depth(self, chunks: list[Chunk]) -> int:
        """Return how many tokens the attention of a batch's prompts goes over before their own."""
        if self._attends_idle:
            return self._slots.cells.n_used
        return max((chunk.start for chunk in chunks if len(chunk.tokens) > 1), default=0)


def _chunk(sequence: Sequence, n: int) -> Chunk:
    """Return the sequence's next `n` tokens, padded to `n`; the last known one gives logits."""
    assert sequence.slot is not None
    start = sequence.n_kv
    tokens = sequence.tokens[start : start + n]
    is_last = start + n >= len(sequence.tokens)
    return Chunk(sequence.slot.id, start, tokens, is_last, n - len(tokens))


def _next_of(step: Batch) -> Batch:
    """Return the step after one without prompts or operations: the next token of each."""
    sequences = step.sequences
    pairs = zip(step.chunks, sequences, strict=True)
    chunks = [
        Chunk(chunk.slot, one.n_kv, one.tokens[-1:], chunk.wants_logits) for chunk, one in pairs
    ]
    return Batch([], chunks, sequences, 0, 0, n_streams=step.n_streams)
