"""How many prefill tokens go into a batch beside running streams.

Those streams stand still while the batch is computed, so it is kept short: 128 tokens on two
cores (measured with a 200M model: streams stall for 0.25 s; with 256 for 0.44 s, and the
prompt's first token comes no sooner). Where batches are fast, on a GPU, or where a longer one
takes hardly more time, as with experts in RAM that are copied over for each batch, it grows.
"""

from __future__ import annotations

import math
from typing import Final

MIN_CHUNK: Final = 128
# A batch may take this long...
STALL_S: Final = 0.1
# ...or this much longer than one of MIN_CHUNK, if that is more.
MAX_SLOWDOWN: Final = 1.5
# A batch counts for its size when it is nearly as large.
_FULL: Final = 0.9
# Weight of a new measurement in the running mean.
_NEWEST: Final = 0.3
# What was too slow once is tried again some day: its mean fades with each batch.
_FADING: Final = 0.99


class Pace:
    """Learns from each batch how long those of its size take: MIN_CHUNK times powers of two."""

    def __init__(self, n_most: int) -> None:
        self._n_most = n_most
        self._mean_s: dict[int, float] = {}
        self.chunk = min(MIN_CHUNK, n_most)

    def on_batch(self, n_prefill: int, elapsed_s: float) -> None:
        """Learn how long a batch with this many prefill tokens took."""
        size = MIN_CHUNK
        while size < n_prefill:
            size *= 2
        if n_prefill < _FULL * size:
            return
        mean_s = self._mean_s.get(size, elapsed_s)
        self._mean_s[size] = mean_s + _NEWEST * (elapsed_s - mean_s)
        self.chunk = min(self._choose(), self._n_most)

    def _choose(self) -> int:
        """Return the largest size that is quick enough, as far as is known."""
        limit_s = max(STALL_S, MAX_SLOWDOWN * self._mean_s.get(MIN_CHUNK, 0.0))
        for size, mean_s in self._mean_s.items():
            if mean_s > limit_s:
                self._mean_s[size] = _FADING * mean_s
        best = size = MIN_CHUNK
        while size < self._n_most:
            size *= 2
            if self._expected_s(size) <= limit_s:
                best = size
        return best

    def _expected_s(self, size: int) -> float:
        """Return how long a batch should take: measured, or else on a line through what was.

        A batch costs something by itself (experts are copied to the GPU for each) and something
        for each token, so two sizes tell the line; one tells at most that it is in proportion.
        """
        known = sorted(self._mean_s)
        above = next((n for n in known if n >= size), None)
        below = [n for n in known if n <= size][-2:]
        if above == size:
            return self._mean_s[size]
        if not below:
            return math.inf if above is None else self._mean_s[above]
        if above is not None:
            below = [below[-1], above]
        if len(below) == 1:
            return self._mean_s[below[0]] * size / below[0]
        first, second = below
        per_token_s = (self._mean_s[second] - self._mean_s[first]) / (second - first)
        return self._mean_s[second] + max(0.0, per_token_s) * (size - second)
