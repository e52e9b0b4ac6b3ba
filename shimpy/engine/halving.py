"""Whether a step of several streams is one batch, or two of half of them. Pure.

On a CPU llama.cpp computes a few tokens one by one and from 8 on by a kernel that takes as long
for 8 as for 16. A step of 8 streams took 100 ms in one batch and 78 in two, of 7 66 and 70, of 10
110 and 101, of 12 117 and 119, of 16 116 and 203 (dense 200M, one thread, AVX2); with two
threads a step of 8 58 and 53. Another processor has other kernels: so both are tried, a few steps
of each, and halves are taken where they are clearly quicker, until the other is tried again.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Collection
from typing import Final, Literal

from shimpy.engine.sequence import Sequence

# Halves that fall below 8 tokens.
LEAST: Final = 8
MOST: Final = 14
# Steps that are compared.
_N_COMPARED: Final = 3
# Before the first trial: a model's first steps take longer than those to come, which would make
# halves look quicker.
_N_BEFORE: Final = 16
# Between two trials: twice as many after each that changed nothing.
_FIRST_WAIT: Final = 32
_LONGEST_WAIT: Final = 2048
# Halves have to be so much quicker, as a second batch costs more than its time; and where they are
# as long as the whole, noise would choose them half of the time (simulated with 12 % of it).
_WORTH: Final = 0.92

Part = Literal["whole", "first", "second"]


class _Choice:
    """What is known of steps of one number of streams."""

    def __init__(self) -> None:
        self.is_halved = False
        self._latest: deque[float] = deque(maxlen=_N_COMPARED)
        self._tried: list[float] = []
        self._wait = _FIRST_WAIT
        # Steps before the next trial.
        self.n_left = _N_BEFORE

    @property
    def tries_other(self) -> bool:
        return self.n_left <= 0

    def on_steps(self, elapsed_s: float, n_steps: int, *, was_halved: bool) -> None:
        if was_halved == self.is_halved:
            self._latest.extend([elapsed_s] * min(n_steps, _N_COMPARED))
            self.n_left -= n_steps
            return
        self._tried.append(elapsed_s)
        if len(self._tried) == _N_COMPARED:
            self._conclude()

    def _conclude(self) -> None:
        tried, self._tried = self._tried, []
        worth = 1.0 if self.is_halved else _WORTH
        if statistics.median(tried) < worth * statistics.median(self._latest):
            self.is_halved = not self.is_halved
            self._latest = deque(tried, maxlen=_N_COMPARED)
            self._wait = _FIRST_WAIT
        else:
            self._wait = min(2 * self._wait, _LONGEST_WAIT)
        self.n_left = self._wait


class Halving:
    """Divides steps, and learns from each which is quicker, for each number of streams."""

    def __init__(self) -> None:
        self._choices: dict[int, _Choice] = {}
        # The other half of the step that was begun, and how many streams that step has.
        self._rest: list[Sequence] = []
        self._n_streams = 0
        # The streams of the step whose first half was computed last, and its seconds.
        self._first: tuple[int, float] = (0, 0.0)

    def is_halfway(self, generating: Collection[Sequence]) -> bool:
        """Whether the second half of a step comes next, before anything else."""
        return any(sequence in generating for sequence in self._rest)

    def next_part(self, generating: list[Sequence]) -> tuple[list[Sequence], int, Part]:
        """Return whose tokens come next, of how many streams a step is, and what part of it."""
        rest, self._rest = [one for one in self._rest if one in generating], []
        if rest:
            return rest, self._n_streams, "second"
        n = self._n_streams = len(generating)
        if not self.divides(n):
            return generating, n, "whole"
        n_first = (n + 1) // 2
        self._rest = generating[n_first:]
        return generating[:n_first], n, "first"

    def on_batch(self, n_streams: int, part: Part, elapsed_s: float, n_times: int = 1) -> None:
        """Learn how long a batch took: a step of so many streams, or a half of one.

        Or several whole steps together.
        """
        if part == "first":
            self._first = n_streams, elapsed_s
            return
        n_first, first_s = self._first
        self._first = 0, 0.0
        choice = self._choices.get(n_streams)
        if choice is None:
            return
        if part == "whole":
            choice.on_steps(elapsed_s / n_times, n_times, was_halved=False)
        elif n_first == n_streams:
            choice.on_steps(first_s + elapsed_s, 1, was_halved=True)

    def divides(self, n_streams: int) -> bool:
        """Whether the next step of so many streams is one in halves."""
        if not LEAST <= n_streams <= MOST:
            return False
        choice = self._choices.setdefault(n_streams, _Choice())
        return choice.is_halved is not choice.tries_other

    def n_whole(self, n_streams: int) -> int:
        """Return how many steps of so many streams are whole before the next one may be in halves.

        Where the next one is.
        """
        choice = self._choices.get(n_streams)
        return _LONGEST_WAIT if choice is None else choice.n_left
