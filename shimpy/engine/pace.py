"""How many prefill tokens go into a batch beside running streams.

Those streams stand still while the batch is computed, so it is kept short: 128 tokens on two
cores (measured with a 200M model: streams stall for 0.25 s; with 256 for 0.44 s, and the
prompt's first token comes no sooner). It grows where batches are quick, and where a longer one
saves much time: with experts in RAM most of a batch's time goes into copying them to the GPU,
however few its tokens are.
"""

from __future__ import annotations

import math
from typing import Final

MIN_CHUNK: Final = 128
# A batch may take this long...
STALL_S: Final = 0.1
# ...or hold more tokens as long as twice as many take no more than this times as long.
MAX_GROWTH: Final = 1.6
# A batch counts for its size when it is nearly as large.
_FULL: Final = 0.9
# A busy machine only ever makes a batch slower: the shortest time of a size counts. It rises with
# each longer one, and is forgotten after this many batches of other sizes.
_RISING: Final = 1.05
_KEPT: Final = 200


class Pace:
    """Learns from each batch how long those of its size take: powers of two."""

    def __init__(self, n_most: int) -> None:
        self._n_most = n_most
        # By size: the shortest time, and the number of the last batch of that size.
        self._known: dict[int, tuple[float, int]] = {}
        self._n_batches = 0
        self.chunk = min(MIN_CHUNK, n_most)

    def on_batch(self, n_prefill: int, elapsed_s: float) -> None:
        """Learn how long a batch with this many prefill tokens took."""
        size = MIN_CHUNK // 2
        while size < n_prefill:
            size *= 2
        if n_prefill < _FULL * size:
            return
        self._n_batches += 1
        shortest_s, _ = self._known.get(size, (math.inf, 0))
        self._known[size] = min(elapsed_s, _RISING * shortest_s), self._n_batches
        oldest = self._n_batches - _KEPT
        self._known = {n: known for n, known in sorted(self._known.items()) if known[1] > oldest}
        self.chunk = min(self._choose(), self._n_most)

    def _choose(self) -> int:
        """Return the largest size that is quick enough, or worth its time."""
        size = MIN_CHUNK
        while size < self._n_most:
            longer_s = self._expected_s(2 * size)
            if longer_s > STALL_S and longer_s > MAX_GROWTH * self._expected_s(size):
                break
            size *= 2
        return size

    def _expected_s(self, size: int) -> float:
        """Return how long a batch should take: on the line between what is known around it."""
        sizes = list(self._known)
        if len(sizes) == 1:
            # Nothing tells what a batch costs by itself.
            return self._known[sizes[0]][0] * size / sizes[0]
        above = next((i for i, n in enumerate(sizes) if n >= size), len(sizes) - 1)
        low, high = sizes[max(0, above - 1)], sizes[max(1, above)]
        low_s, high_s = self._known[low][0], self._known[high][0]
        return max(0.0, low_s + (high_s - low_s) * (size - low) / (high - low))
