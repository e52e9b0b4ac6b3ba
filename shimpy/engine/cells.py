"""Which cells of the KV cache each slot holds, counted beside llama.cpp.

A cell keeps one token's keys and values. A slot that shares another's prefix holds the same
cells (llama_memory_seq_cp adds a sequence to a cell and copies nothing), and a cell is free
once no slot holds it. Neighbouring cells with the same holders are counted as one run. Where
each slot has cells of its own, none are shared.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec


class _Run(msgspec.Struct, eq=False):
    n: int
    n_holders: int = 1


class Cells:
    """The KV cache's `n_total` cells; a slot's are in the order of its positions."""

    def __init__(self, n_slots: int, n_total: int) -> None:
        self.n_total = n_total
        self.n_used = 0
        self._runs: list[list[_Run]] = [[] for _ in range(n_slots)]

    @property
    def n_free(self) -> int:
        """Cells that no slot holds."""
        return self.n_total - self.n_used

    def grow(self, slot: int, n: int) -> None:
        """Give a slot `n` new cells at its end."""
        runs = self._runs[slot]
        if runs and runs[-1].n_holders == 1:
            runs[-1].n += n
        else:
            runs.append(_Run(n))
        self.n_used += n

    def share(self, source: int, target: int, n: int) -> None:
        """Let an empty slot hold the first `n` cells of another too."""
        shared = self._runs[source][: self._split(source, n)]
        for run in shared:
            run.n_holders += 1
        self._runs[target] = shared

    def exchange(self, first: int, second: int) -> None:
        """Let two slots have each other's cells."""
        runs = self._runs
        runs[first], runs[second] = runs[second], runs[first]

    def remove(self, slot: int, start: int, end: int | None = None) -> None:
        """Take the cells [start, end) from a slot; end None: to its end."""
        first = self._split(slot, start)
        last = len(self._runs[slot]) if end is None else self._split(slot, end)
        for run in self._runs[slot][first:last]:
            run.n_holders -= 1
            if not run.n_holders:
                self.n_used -= run.n
        del self._runs[slot][first:last]

    def n_held(self, slots: Iterable[int]) -> int:
        """Count the cells that at least one of these slots holds."""
        return sum(run.n for run in {run for slot in slots for run in self._runs[slot]})

    def is_shared(self, slot: int, start: int) -> bool:
        """Whether another slot holds a cell of this one from `start` on."""
        return any(run.n_holders > 1 for run in self._runs[slot][self._split(slot, start) :])

    def _split(self, slot: int, at: int) -> int:
        """Make a run begin at position `at`; return its index."""
        start = 0
        for index, run in enumerate(self._runs[slot]):
            if at == start:
                return index
            if at < start + run.n:
                self._cut_run(run, at - start)
                return index + 1
            start += run.n
        return len(self._runs[slot])

    def _cut_run(self, run: _Run, n: int) -> None:
        rest = _Run(run.n - n, run.n_holders)
        run.n = n
        for runs in self._runs:
            if run in runs:
                runs.insert(runs.index(run) + 1, rest)
