"""What plain attention costs: how long a prompt's token takes, by the cells in use. Pure.

Without flash attention a token is compared with all cells up to the last one in use, whoever
holds them. Several long prompts side by side make each other slow: four of 2,000 tokens take
2.3 times as long together as one after the other (dense 200M, one thread).
"""

from __future__ import annotations

from typing import Final

from shimpy.engine.pace import LEAST_CHUNK

# What an older batch counts, beside the next.
_FADING: Final = 0.95
# Batches whose depths differ by less on average tell nothing of what depth costs.
_LEAST_SPREAD: Final = 200.0


class Attention:
    """A line through the times of batches: seconds a token = base + slope * depth."""

    def __init__(self) -> None:
        self._weight = 0.0
        self._depth = self._token_s = 0.0
        self._depth_var = self._covar = 0.0

    def on_batch(self, n_tokens: int, elapsed_s: float, *, depth: int) -> None:
        """Learn from a batch of so many tokens behind `depth` others.

        Means, variance and covariance with fading weights; Welford's method, as West (1979) has it.
        """
        if n_tokens < LEAST_CHUNK:
            return
        self._weight = _FADING * self._weight + 1
        share = 1 / self._weight
        from_depth = depth + n_tokens / 2 - self._depth
        from_token_s = elapsed_s / n_tokens - self._token_s
        self._depth += share * from_depth
        self._token_s += share * from_token_s
        self._depth_var = (1 - share) * (self._depth_var + share * from_depth**2)
        self._covar = (1 - share) * (self._covar + share * from_depth * from_token_s)

    @property
    def _slope(self) -> float:
        """Seconds that a cell adds to each token; 0 as long as nothing tells."""
        if self._depth_var < _LEAST_SPREAD**2:
            return 0.0
        return max(0.0, self._covar / self._depth_var)

    def loss_s(self, n_tokens: int, n_cells: int) -> float:
        """Return how much longer so many tokens take beside so many cells more."""
        return n_tokens * n_cells * self._slope

    def alone_s(self, n_tokens: int, n_before: int = 0) -> float:
        """Return how long so many tokens behind `n_before` of their own take beside no others."""
        base = max(0.0, self._token_s - self._depth * self._slope)
        return n_tokens * (base + self._slope * (n_before + n_tokens / 2))
