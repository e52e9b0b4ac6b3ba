"""The count of KV cells agrees with a cache that is written out cell by cell."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shimpy.engine.cells import Cells

N_SLOTS = 4
N_CELLS = 10_000
slots = st.integers(0, N_SLOTS - 1)


class AgainstEachCell(RuleBasedStateMachine):
    """The oracle: for each slot the identity of each cell that it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = Cells(N_SLOTS, N_CELLS)
        self.held: list[list[object]] = [[] for _ in range(N_SLOTS)]

    @rule(slot=slots, n=st.integers(1, 9))
    def grow(self, slot: int, n: int) -> None:
        self.cells.grow(slot, n)
        self.held[slot] += [object() for _ in range(n)]

    @rule(slot=slots, data=st.data())
    def remove(self, slot: int, data: st.DataObject) -> None:
        start = data.draw(st.integers(0, len(self.held[slot])))
        end = data.draw(st.none() | st.integers(start, len(self.held[slot])))
        self.cells.remove(slot, start, end)
        del self.held[slot][start:end]

    @precondition(lambda self: any(not held for held in self.held))
    @rule(source=slots, data=st.data())
    def share(self, source: int, data: st.DataObject) -> None:
        empty = [slot for slot in range(N_SLOTS) if not self.held[slot] and slot != source]
        if not empty:
            return
        target = data.draw(st.sampled_from(empty))
        n = data.draw(st.integers(0, len(self.held[source])))
        self.cells.share(source, target, n)
        self.held[target] = self.held[source][:n]

    @rule(slot=slots, data=st.data())
    def ask_whether_shared(self, slot: int, data: st.DataObject) -> None:
        start = data.draw(st.integers(0, len(self.held[slot])))
        others = {cell for other in range(N_SLOTS) if other != slot for cell in self.held[other]}
        is_shared = any(cell in others for cell in self.held[slot][start:])
        assert self.cells.is_shared(slot, start) == is_shared

    @rule(some=st.sets(slots))
    def ask_for_some(self, some: set[int]) -> None:
        assert self.cells.n_held(some) == len({cell for slot in some for cell in self.held[slot]})

    @invariant()
    def the_sums_agree(self) -> None:
        n_used = len({cell for held in self.held for cell in held})
        assert (self.cells.n_used, self.cells.n_free) == (n_used, N_CELLS - n_used)


TestAgainstEachCell = AgainstEachCell.TestCase
TestAgainstEachCell.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
