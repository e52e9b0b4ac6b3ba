"""Who gets a slot next, and what has to happen before: the queue of a worker. Pure.

First come, first served. A prefix that is saved of a prompt is restored first where that is more
than any slot holds of it, and what a slot holds is copied to RAM before it is emptied.
"""

from __future__ import annotations

from collections import deque
from itertools import islice

import msgspec

from shimpy.engine.parker import Park, Parker
from shimpy.engine.prefixes import SavedPrefix, SavedPrefixes
from shimpy.engine.sequence import KvOp, Match, Sequence
from shimpy.engine.slots import Slots

# Room for this many new tokens is wanted before a sequence is admitted.
MARGIN = 64


class Restore(msgspec.Struct, frozen=True):
    """Instead of a batch: restore a saved prefix into an empty slot, after the KV operations."""

    ops: list[KvOp]
    slot: int
    prefix: SavedPrefix


class Admission:
    """The sequences that wait; `running` are always those that have a slot."""

    def __init__(
        self,
        slots: Slots,
        saved: SavedPrefixes,
        parker: Parker | None,
        *,
        n_ctx: int,
        n_ctx_seq: int,
        attends_idle: bool,
    ) -> None:
        """Start with an empty queue.

        `n_ctx`: the cells of all slots together, `n_ctx_seq`: those that one sequence may take.
        `parker`: copies to RAM what idle slots hold; None: nothing may be copied. `attends_idle`:
        what they hold slows down those that are busy.
        """
        self._slots = slots
        self._saved = saved
        self._parker = parker
        self._n_ctx = n_ctx
        self._n_ctx_seq = n_ctx_seq
        self._attends_idle = attends_idle
        self._waiting: deque[Sequence] = deque()
        # The head of the queue did not fit; nothing has left since.
        self._is_blocked = False
        # Streams get a batch between two.
        self._may_restore = True

    def __len__(self) -> int:
        """Return how many wait."""
        return len(self._waiting)

    @property
    def soon(self) -> list[Sequence]:
        """Those that get a slot next, as far as there are slots."""
        return list(islice(self._waiting, self._slots.n))

    # --- events ---

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait behind the others."""
        self._waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget one that waits."""
        self._is_blocked = False
        self._waiting.remove(sequence)

    def put_back(self, sequence: Sequence) -> None:
        """Let one wait at the head that had to give up its slot: until another leaves."""
        self._is_blocked = True
        self._waiting.appendleft(sequence)

    def on_left(self) -> None:
        """Note that a sequence has left its slot."""
        self._is_blocked = False

    def on_next_batch(self) -> None:
        """Note that a batch comes next."""
        self._may_restore = True

    # --- the next ones ---

    def admit(self, running: list[Sequence], now: float) -> Restore | Park | None:
        """Give slots to those that wait, who run then, as long as there is room.

        Returns what is to be done before the next one gets its slot: a prefix of it restored, or
        what the slot holds copied.
        """
        while self._waiting and not self._is_blocked and self._slots.has_idle:
            sequence = self._waiting[0]
            match = self._slots.best_match(sequence)
            prefix = self._find_saved(sequence, match, running)
            if prefix is not None:
                if running and not self._may_restore:
                    return None
                park = self._copy_emptied(match, running, for_restore=True)
                return park or self._plan_restore(sequence, match, prefix)
            if not self._fits(sequence, match, running):
                self._is_blocked = True
                return None
            if (park := self._copy_emptied(match, running)) is not None:
                return park
            self._waiting.popleft()
            self._slots.place(sequence, match)
            running.append(sequence)
            if self._parker is not None:
                self._parker.on_placed(now)
            if self._attends_idle and (self._parker is None or self._slots.has_refused):
                self._slots.thin_idle()
            if sequence.admitted_s is None:
                sequence.admitted_s = now
        return None

    def _copy_emptied(
        self, match: Match, running: list[Sequence], *, for_restore: bool = False
    ) -> Park | None:
        """Return the copy to make of what the slot holds that the next in the queue will get."""
        if self._parker is None:
            return None
        emptied = self._slots.next_emptied(match, for_restore=for_restore)
        return self._parker.next_emptied(emptied, running, self.soon)

    def _find_saved(
        self, sequence: Sequence, match: Match, running: list[Sequence]
    ) -> SavedPrefix | None:
        """Look among what is saved for more of a prompt than any slot holds, or will hold.

        Once for each sequence: what can't be restored then is computed.
        """
        if sequence.is_sought or not sequence.reuse or not self._saved:
            return None
        best = self._saved.best(sequence.tokens, max(match.n_now, match.n_soon))
        if best is None:
            return None
        prefix, _ = best
        # It is held whole until the sequence has taken its part; the rest gives way then.
        n_most = min(self._n_ctx_seq, self._n_ctx - self._slots.n_cells_busy())
        has_room = len(prefix.tokens) <= n_most
        return prefix if has_room and self._fits(sequence, Match(), running) else None

    def _plan_restore(self, sequence: Sequence, match: Match, prefix: SavedPrefix) -> Restore:
        sequence.is_sought = True
        self._may_restore = False
        slot = self._slots.make_way(match, len(prefix.tokens))
        return Restore(self._slots.take_ops(), slot, prefix)

    def _fits(self, sequence: Sequence, match: Match, running: list[Sequence]) -> bool:
        """Whether a sequence's prompt and a margin fit beside all that runs.

        Idle caches do not count: they give way. Alone, or with cells of its own, a sequence
        always fits.
        """
        if not running or not self._slots.kv_unified:
            return True
        n_left = sequence.n_predict - sequence.n_generated
        n_need = len(sequence.tokens) - match.n_from_busy + min(MARGIN, n_left)
        n_promised = sum(s.n_pending - (s.n_shared if s.leader else 0) for s in running)
        return self._slots.n_cells_busy() + n_promised + n_need <= self._n_ctx
