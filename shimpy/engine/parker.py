"""Chooses which idle slot's cache is copied to RAM next, and which may leave the KV cache.

`parking` says when; here is what: by what the slots hold, what is saved already, and who waits.
"""

from __future__ import annotations

from collections.abc import Sequence as Sequences
from typing import Final

import msgspec

from shimpy.engine.parking import Parking, without_strewn
from shimpy.engine.prefixes import MIN_PARKED_GAIN, SavedPrefix, SavedPrefixes
from shimpy.engine.sequence import ATTENDED_CELLS, IdleCache, KvOp, Sequence
from shimpy.engine.slots import Slots

# Sequences that get their slots so soon after each other came at once.
_AT_ONCE_S: Final = 0.1


class Park(msgspec.Struct, frozen=True):
    """Instead of a batch: copy to RAM what an idle slot holds, after the KV operations.

    These are its tokens then; `covers` are parked prefixes that the copy makes needless.
    """

    ops: list[KvOp]
    slot: int
    tokens: list[int]
    covers: list[SavedPrefix]


class Parker:
    """Looks after the idle slots; `soon` are always the sequences that get a slot next."""

    def __init__(self, slots: Slots, saved: SavedPrefixes, *, attends_idle: bool) -> None:
        """`attends_idle`: what idle slots hold slows down those that are busy."""
        self._slots = slots
        self._saved = saved
        self._attends_idle = attends_idle
        self._parking = Parking()
        # Streams get a batch between two copies.
        self._may_copy = True
        # Sequences that came at once, and when the last one got its slot.
        self._n_came = 0
        self._placed_s = 0.0
        # What may come next: as many as before that, or of more that came earlier one fewer each
        # time.
        self._n_soon = 0

    @property
    def quiet_s(self) -> float | None:
        """For how long nothing has to run before the next copy; None: there is none to make."""
        caches = self._unsettled()
        return self._parking.quiet_s(len(caches[0].tokens)) if caches else None

    @property
    def is_costly(self) -> bool:
        """Whether idle slots hold what slows down the others, and may leave the KV cache."""
        return self._attends_idle and self._slots.is_unsettled

    def next_in_quiet(self) -> Park | None:
        """Return what to copy while nothing runs; None: nothing that has to be, or may be.

        What would have to be cut for it stays whole, for whoever goes on from its end.
        """
        self._parking.on_quiet()
        return self._choose(self._unsettled(), may_cut=False)

    def next_beside(self, running: Sequences[Sequence], soon: Sequences[Sequence]) -> Park | None:
        """Return what to copy before the next batch where `is_costly`; None: nothing now."""
        if not (running or soon) or not self._is_due(running, soon, fills_up=True):
            return None
        if not self._may_copy and any(one.n_generated for one in running):
            return None
        self._may_copy = False
        return self._choose(self._slots.unsettled(but=self._wanted(soon)), may_cut=True)

    def next_emptied(
        self, slot_id: int | None, running: Sequences[Sequence], soon: Sequences[Sequence]
    ) -> Park | None:
        """Return the copy to make of what a slot holds that is about to be emptied; None: none."""
        caches = self._slots.unsettled_of([] if slot_id is None else [slot_id])
        if not self._is_due(running, soon):
            caches = [without_strewn(cache) for cache in caches]
        return self._choose(caches, may_cut=True)

    def drop_spare(self, soon: Sequences[Sequence]) -> None:
        """Let idle slots cost what runs nothing, or little."""
        self._slots.drop_spare(but=self._wanted(soon))

    # --- events ---

    def on_placed(self, now: float) -> None:
        """Note that a sequence has got a slot."""
        if now > self._placed_s + _AT_ONCE_S:
            self._n_soon = max(self._n_soon - 1, self._n_came)
            self._n_came = 0
        self._n_came += 1
        self._placed_s = now

    def on_next_batch(self) -> None:
        """Note that a batch comes next."""
        self._may_copy = True

    def on_batch(self, elapsed_s: float, n_prefill: int) -> None:
        """Note how long a batch took, and how many of its tokens were of prompts."""
        self._parking.on_batch(elapsed_s, n_prefill)

    def on_copied(
        self, park: Park, elapsed_s: float, *, is_kept: bool, is_waited_for: bool
    ) -> None:
        """Note whether a cache was copied, how long it took, and whether somebody waited."""
        self._slots.settle(park.slot, is_spare=is_kept)
        if is_waited_for:
            self._parking.on_copy(elapsed_s)
        if is_kept:
            self._parking.on_kept(len(park.tokens), elapsed_s)

    # --- which ---

    def _unsettled(self) -> list[IdleCache]:
        """Return what idles and may have to leave the KV cache for the next that comes.

        Where it costs the others nothing, that is what as many slots hold as sequences came last:
        as many may come next, and the last of them would wait for all copies. What the first of
        them empties comes first.
        """
        if self._attends_idle:
            return self._slots.unsettled()
        n_soon = max(self._n_soon, self._n_came)
        return self._slots.unsettled_of(self._slots.first_emptied(n_soon))[::-1]

    def _wanted(self, soon: Sequences[Sequence]) -> set[int]:
        """Return the slots whose caches the next in the queue go on from."""
        return {
            match.source.id
            for match in map(self._slots.best_match, soon)
            if match.source is not None and match.n_now >= MIN_PARKED_GAIN
        }

    def _is_due(
        self, running: Sequences[Sequence], soon: Sequences[Sequence], *, fills_up: bool = False
    ) -> bool:
        """Whether what runs and waits can bear that a cache is copied now.

        With `fills_up` not where somebody would only wait longer for a first token: where idle
        caches lie in cells that the prompts attend to in any case.
        """
        n_prefill = sum(one.n_pending for one in running if not one.n_generated)
        n_prefill += sum(len(one.tokens) for one in soon)
        if not n_prefill:
            return self._parking.is_due(0, 0)
        n_busy = self._slots.n_cells_busy()
        n_idle = self._slots.cells.n_used - n_busy
        if fills_up and n_idle <= -(n_busy + n_prefill) % ATTENDED_CELLS:
            return False
        return self._parking.is_due(n_prefill, n_idle)

    def _choose(self, caches: list[IdleCache], *, may_cut: bool) -> Park | None:
        for cache in caches:
            tokens = self._saved.worth_parking(cache)
            if not tokens:
                self._slots.settle(cache.slot, is_spare=True)
            elif may_cut or len(tokens) == len(cache.tokens):
                self._slots.cut(cache.slot, len(tokens))
                covers = self._saved.covered(tokens)
                return Park(self._slots.take_ops(), cache.slot, tokens, covers)
        return None
