"""The slots and what the KV cache holds for each: placing, eviction, context shift.

Nothing here touches llama.cpp. What is decided is noted as KV operations, in order, for the
loop to carry out before the next decode; the books run ahead of the cache by no more.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from shimpy.engine.cells import Cells
from shimpy.engine.gather import exchanges
from shimpy.engine.matching import best_match, common_prefix, is_part, n_held
from shimpy.engine.sequence import (
    ALL,
    ATTENDED_CELLS,
    IdleCache,
    KvCopy,
    KvExchange,
    KvOp,
    KvRemove,
    KvShift,
    Match,
    Sequence,
    Slot,
)

# Idle caches give way in pieces of this many cells, from their ends.
EVICT_CELLS = 256
# A sequence may generate about so many tokens.
_GROWTH = 64


class Slots:
    """All slots and their cells."""

    def __init__(
        self, n_slots: int, n_cells: int, *, can_split: bool, kv_unified: bool = True
    ) -> None:
        """Start with empty ones; `n_cells` are those of all together.

        `kv_unified`: they share them, and what they share with each other is there once.
        """
        self.cells = Cells(n_slots, n_cells)
        self._slots = [Slot(index) for index in range(n_slots)]
        self._can_split = can_split
        self.kv_unified = kv_unified
        self._ops: list[KvOp] = []
        self._tick = 0
        # Idle slots may hold something that was not looked at yet, or is to be dropped.
        self.is_unsettled = False
        # Batches of more than one sequence, whose cells lie mixed.
        self.n_mixed = 0
        # A slot was taken or left since gather() last looked.
        self._is_stirred = False

    @property
    def n(self) -> int:
        """How many there are."""
        return len(self._slots)

    @property
    def has_idle(self) -> bool:
        """Whether a sequence can be placed."""
        return any(slot.sequence is None for slot in self._slots)

    @property
    def has_refused(self) -> bool:
        """Whether an idle slot holds what there was no room for a copy of."""
        return any(slot.tokens and slot.is_spare is False for slot in self._slots)

    @property
    def has_ops(self) -> bool:
        """Whether operations were noted since they were taken."""
        return bool(self._ops)

    def take_ops(self) -> list[KvOp]:
        """Return the operations noted since the last call."""
        ops, self._ops = self._ops, []
        return ops

    def n_cells_busy(self) -> int:
        """Cells that running sequences hold."""
        return self.cells.n_held(slot.id for slot in self._slots if slot.sequence is not None)

    # --- placing ---

    def best_match(self, sequence: Sequence) -> Match:
        """Return where most of the sequence's prefix is, as `matching.best_match`."""
        return best_match(
            sequence, self._slots, can_split=self._can_split, kv_unified=self.kv_unified
        )

    def next_emptied(self, match: Match, *, for_restore: bool) -> int | None:
        """Return the slot that place() or make_way() would empty; None: it takes one over."""
        spare = self._least_recent(but=match.source)
        if not for_restore and self._is_taken_over(match, spare):
            return None
        return None if spare is None else spare.id

    def first_emptied(self, n: int) -> list[int]:
        """Return the idle slots that the next `n` sequences would empty if they match nothing."""
        idle = [slot for slot in self._slots if slot.sequence is None]
        return [slot.id for slot in sorted(idle, key=_emptied_order)[:n]]

    def place(self, sequence: Sequence, match: Match) -> None:
        """Give a sequence an idle slot and the prefix that was found for it.

        1. An idle slot holds the prefix and not much else, or is the only one: take it over.
        2. Another slot holds it: share it with the slot that was idle longest.
        3. A running sequence is about to compute it: wait for that in such a slot.
        4. Nothing to reuse: such a slot, emptied but for the start that both have.
        """
        source = match.source
        spare = self._least_recent(but=source)
        if source is not None and self._is_taken_over(match, spare):
            self._cut(source, match.n_now)
            self._occupy(source, sequence)
            self._count_reused(sequence, match.n_now)
            return
        assert spare is not None, "place() needs an idle slot"
        n_start = 0 if source is not None else self._n_start(spare, sequence)
        self._cut(spare, n_start)
        self._occupy(spare, sequence)
        self._count_reused(sequence, n_start)
        self.reuse(sequence, match)

    def reuse(self, sequence: Sequence, match: Match) -> None:
        """Share a prefix with a placed sequence that has none yet, or let it wait for one."""
        sequence.leader = None
        source = match.source
        if source is None:
            return
        if match.n_soon > match.n_now:
            sequence.leader = source.sequence
            sequence.n_shared = match.n_soon
            return
        assert sequence.slot is not None
        self._ops.append(KvCopy(source.id, sequence.slot.id, match.n_now))
        if self.kv_unified:
            self.cells.share(source.id, sequence.slot.id, match.n_now)
        else:
            self.cells.grow(sequence.slot.id, match.n_now)
        sequence.slot.n_whole = source.n_whole
        self._count_reused(sequence, match.n_now)

    def release(self, sequence: Sequence) -> None:
        """Take the slot from a sequence; its KV stays for a later prompt."""
        slot = sequence.slot
        assert slot is not None
        self._tick += 1
        slot.sequence = None
        self._is_stirred = True
        slot.tokens = sequence.tokens[: sequence.n_kv]
        slot.n_prompt = min(sequence.n_prompt, sequence.n_kv)
        slot.last_used = self._tick
        slot.n_strewn += self.n_mixed - slot.n_mixed_before
        slot.is_spare = None
        self.is_unsettled = True
        sequence.slot = sequence.leader = None
        sequence.n_kv = 0

    def drop(self, sequence: Sequence) -> None:
        """Take the slot from a sequence and forget its KV."""
        slot = sequence.slot
        assert slot is not None
        self.release(sequence)
        # Noted even where the books hold nothing: a failed decode may have left some.
        self._ops.append(KvRemove(slot.id, 0))
        self.cells.remove(slot.id, 0)
        self._forget(slot)

    def drop_all(self) -> None:
        """Forget the whole KV cache; running sequences keep their slots."""
        self._ops = [KvRemove(slot.id, 0) for slot in self._slots]
        self.cells = Cells(len(self._slots), self.cells.n_total)
        for slot in self._slots:
            self._forget(slot)
            if slot.sequence is not None:
                slot.sequence.n_kv = 0

    def gather(self) -> None:
        """Let slots that run be neighbours; for those with cells of their own.

        Not right behind a shift, which llama.cpp carries out with the next batch: what is moved
        before would never be shifted.
        """
        if not self._is_stirred or any(isinstance(op, KvShift) for op in self._ops):
            return
        self._is_stirred = False
        running = [slot.id for slot in self._slots if slot.sequence is not None]
        n_tokens = [n_held(slot) for slot in self._slots]
        for first, second in exchanges(n_tokens, running):
            self._exchange(self._slots[first], self._slots[second])

    def _exchange(self, first: Slot, second: Slot) -> None:
        if n_held(first) or n_held(second):
            self._ops.append(KvExchange(first.id, second.id))
        self.cells.exchange(first.id, second.id)
        first.id, second.id = second.id, first.id
        self._slots[first.id], self._slots[second.id] = first, second

    # --- what is saved, parked and restored ---

    def idle_caches(self) -> list[IdleCache]:
        """Return what the idle slots hold that another prompt can use, the last used first."""
        return self._caches_of(self._slots)

    def unsettled(self, but: Collection[int] = ()) -> list[IdleCache]:
        """Return those of the idle caches that were not looked at; not of the slots `but`."""
        slots = [slot for slot in self._slots if slot.is_spare is None and slot.id not in but]
        return self._caches_of(slots)

    def unsettled_of(self, slot_ids: Iterable[int]) -> list[IdleCache]:
        """Return those of some slots, the last used first."""
        slots = [self._slots[slot_id] for slot_id in slot_ids]
        return self._caches_of([slot for slot in slots if slot.is_spare is None])

    def settle(self, slot_id: int, *, is_spare: bool) -> None:
        """Note whether what an idle slot holds may leave the KV cache."""
        self._slots[slot_id].is_spare = is_spare
        self.is_unsettled = True

    def drop_spare(self, but: Collection[int] = ()) -> None:
        """Empty the idle slots whose caches may go, but for those of the slots `but`.

        What only this one prompt could use may go too.
        """
        kept = {cache.slot for cache in self.unsettled()}.union(but)
        self.is_unsettled = False
        for slot in self._slots:
            if not slot.tokens or slot.is_spare is False:
                continue
            if slot.id in kept:
                self.is_unsettled = True
            else:
                self._cut(slot, 0)

    def _caches_of(self, slots: list[Slot]) -> list[IdleCache]:
        return [
            IdleCache(
                slot.id,
                slot.tokens[: slot.n_exact],
                # What was restored whole is not cut for a prompt that did not go on from it.
                max(min(slot.n_prompt, slot.n_exact), slot.n_whole + 1),
                slot.n_strewn,
            )
            for slot in sorted(slots, key=lambda slot: slot.last_used, reverse=True)
            if slot.tokens and min(len(slot.tokens), slot.n_exact) >= slot.n_whole
        ]

    def cut(self, slot_id: int, n: int) -> None:
        """Keep the first `n` tokens of an idle slot."""
        self._cut(self._slots[slot_id], n)

    def make_way(self, match: Match, n: int) -> int:
        """Empty an idle slot and free `n` cells, for what is restored for a sequence to come.

        Idle caches have to hold, or leave, as many. `match`: the best of the sequence.
        """
        slot = self._least_recent(but=match.source) or match.source
        assert slot is not None, "make_way() needs an idle slot"
        self._cut(slot, 0)
        while (n_missing := n - self.cells.n_free) > 0 and self.evict(n_missing):
            pass
        return slot.id

    def on_restored(self, slot_id: int, tokens: list[int], *, whole: bool) -> None:
        """Note that an empty idle slot holds these tokens now; `whole`: all or nothing of them."""
        slot = self._slots[slot_id]
        self._tick += 1
        slot.tokens = tokens
        slot.n_prompt = len(tokens)
        slot.n_whole = len(tokens) if whole else 0
        slot.last_used = self._tick
        slot.n_strewn = 0
        slot.is_spare = None
        self.is_unsettled = True
        self.cells.grow(slot_id, len(tokens))

    # --- room ---

    def evict(self, n: int) -> bool:
        """Free about `n` cells of the idle slot that was used least recently; copied ones first.

        It frees fewer where they are shared. Returns False when no idle slot holds any.
        """
        slot = min(
            (slot for slot in self._slots if slot.tokens),
            key=lambda slot: (not slot.is_spare, slot.last_used),
            default=None,
        )
        if slot is None:
            return False
        n_left = max(0, len(slot.tokens) - max(n, EVICT_CELLS)) if self._can_split else 0
        self._cut(slot, n_left if n_left >= slot.n_whole else 0)
        return True

    def thin_idle(self) -> None:
        """Drop idle caches that cost more than they are likely to save, for want of a copy.

        Where attention is computed over all cells in use, whoever holds them, an idle cell costs
        1.7 us for each token of a prompt and 5 us for each step, and saves 2 ms if a prompt
        goes on from it (measured, 200M model, one thread). So the newest stays whole, and all
        together are no longer than that one or than the sequences that run, or fill up the
        cells that are attended to anyway.
        """
        busy = [slot.sequence for slot in self._slots if slot.sequence is not None]
        newest = max(self._slots, key=lambda slot: (bool(slot.tokens), slot.last_used))
        n_running = sum(len(one.tokens) for one in busy)
        n_padding = -(n_running + _GROWTH * len(busy)) % ATTENDED_CELLS
        n_most = max(n_running, len(newest.tokens), n_padding)
        n_busy = self.n_cells_busy()
        while (n_over := self.cells.n_used - n_busy - n_most) > 0 and self.evict(n_over):
            pass

    def shift(self, sequence: Sequence, n_keep: int) -> None:
        """Drop the older half of a sequence's tokens after the first `n_keep`.

        Its later cells move down. Cells that another slot holds can't move for one of them
        alone, nor those that stand for others which were not restored: then they are dropped
        and computed again.
        """
        slot = sequence.slot
        assert slot is not None
        n_drop = (len(sequence.tokens) - n_keep) // 2
        n_kv = sequence.n_kv
        del sequence.tokens[n_keep : n_keep + n_drop]
        is_fixed = slot.n_whole > n_keep or self.cells.is_shared(slot.id, n_keep)
        if is_fixed or n_kv < n_keep + n_drop:
            sequence.n_kv = min(n_kv, n_keep)
            if sequence.n_kv < slot.n_whole:
                sequence.n_kv = slot.n_whole = 0
            self._ops.append(KvRemove(slot.id, sequence.n_kv))
            self.cells.remove(slot.id, sequence.n_kv)
            return
        self._ops.append(KvRemove(slot.id, n_keep, n_keep + n_drop))
        self._ops.append(KvShift(slot.id, n_keep + n_drop, n_kv, -n_drop))
        self.cells.remove(slot.id, n_keep, n_keep + n_drop)
        sequence.n_kv = n_kv - n_drop
        slot.n_exact = min(slot.n_exact, n_keep)

    # --- parts ---

    def _is_taken_over(self, match: Match, spare: Slot | None) -> bool:
        source = match.source
        if source is None or source.sequence is not None:
            return False
        return spare is None or not is_part(match.n_now, len(source.tokens))

    def _n_start(self, spare: Slot, sequence: Sequence) -> int:
        """Return how many tokens, few as they are, a sequence may take over with its slot.

        Mostly the start token. A CPU may compute 33 tokens in the time of 48, and 32 in that of 32.
        In shared cells it would stay where it lies, however far from the others.
        """
        if self.kv_unified or not self._can_split or not sequence.reuse:
            return 0
        n_same = min(common_prefix(spare.tokens, sequence.tokens[:-1]), spare.n_exact)
        return n_same if n_same >= spare.n_whole else 0

    def _least_recent(self, but: Slot | None) -> Slot | None:
        return min(
            (slot for slot in self._slots if slot.sequence is None and slot is not but),
            key=_emptied_order,
            default=None,
        )

    def _occupy(self, slot: Slot, sequence: Sequence) -> None:
        slot.sequence = sequence
        self._is_stirred = True
        slot.tokens = []
        sequence.slot = slot
        slot.n_mixed_before = self.n_mixed

    def _cut(self, slot: Slot, n: int) -> None:
        """Keep the first `n` tokens of an idle slot."""
        if n < len(slot.tokens):
            self._ops.append(KvRemove(slot.id, n))
            self.cells.remove(slot.id, n)
            del slot.tokens[n:]
        if n <= slot.n_exact:
            slot.n_exact = ALL
        if not n:
            slot.n_whole = slot.n_strewn = 0

    def _forget(self, slot: Slot) -> None:
        slot.tokens = []
        slot.n_exact = ALL
        slot.n_whole = slot.n_strewn = 0

    def _count_reused(self, sequence: Sequence, n: int) -> None:
        sequence.n_kv = n
        if not sequence.n_preempted:
            sequence.n_cached = n


def _emptied_order(slot: Slot) -> tuple[bool, bool, int]:
    """Return what is less of the slot that the next sequence gets: one that loses nothing."""
    return bool(slot.tokens), not slot.is_spare, slot.last_used
