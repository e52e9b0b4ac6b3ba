"""Long prompts take turns where attention is computed over all cells in use. Pure.

Beside others that run, a long prompt would take much longer, and make them slower. So it waits
for them, but no longer than PATIENCE times what it would lose, from when the last long prompt
began.
"""

from __future__ import annotations

import math
from typing import Final

from shimpy.engine.attention import Attention
from shimpy.engine.sequence import Sequence

# Prompts of fewer tokens never wait.
LONG: Final = 512
# Such a part of its own time is much to lose.
MUCH_LOST: Final = 0.5
PATIENCE: Final = 2.0


class Turns:
    """Decides which of the prompts that are next had better begin later."""

    def __init__(self) -> None:
        self.attention = Attention()
        # When the last long prompt began.
        self._begun_s = -math.inf

    def on_next(self, sequence: Sequence, now: float) -> None:
        """Note that some of a prompt is computed next."""
        if not sequence.is_begun and sequence.n_pending >= LONG:
            self._begun_s = now
        sequence.is_begun = True

    def without_held(
        self, prefilling: list[Sequence], n_busy: int, now: float, *, is_alone: bool
    ) -> list[Sequence]:
        """Leave out those that had better wait; one goes on in any case.

        `n_busy`: cells that running sequences hold. `is_alone`: none of them generates.
        """
        n_cells = n_busy + sum(sequence.n_pending for sequence in prefilling if sequence.is_begun)
        found: list[Sequence] = []
        for sequence in prefilling:
            if not sequence.is_begun:
                has_others = found or not is_alone
                if has_others and self._had_better_wait(sequence, n_cells, now):
                    continue
                n_cells += sequence.n_pending
            found.append(sequence)
        return found

    def _had_better_wait(self, sequence: Sequence, n_cells: int, now: float) -> bool:
        """Whether a prompt should wait; `n_cells` will be in use, its own prefix's among them."""
        n, n_own = sequence.n_pending, sequence.n_kv
        if n < LONG:
            return False
        loss_s = self.attention.loss_s(n, n_cells - n_own)
        is_much = loss_s > MUCH_LOST * self.attention.alone_s(n, n_own)
        return is_much and now - self._begun_s < PATIENCE * loss_s
