"""Repetition penalties and logit bias: edits of a few logits, in place, undone afterwards.

llama.cpp's own penalties hash the whole vocabulary for each token (0.1 to 0.5 ms); here only
the ids that are concerned are touched. The rules are its own (llama-sampler.cpp,
llama_sampler_penalties_apply).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from shimpy.errors import InvalidOptionError
from shimpy.protocol.messages import Sampling

Row = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]


class Penalties:
    """Lowers the logits of the tokens among the last `repeat_last_n`, the prompt's included."""

    def __init__(self, sampling: Sampling, history: Sequence[int], *, n_ctx: int) -> None:
        """Take the prompt; `repeat_last_n` -1 means the whole context."""
        self._repeat = np.float32(sampling.repeat_penalty)
        self._presence = np.float32(sampling.presence_penalty)
        self._frequency = np.float32(sampling.frequency_penalty)
        n_last = n_ctx if sampling.repeat_last_n < 0 else sampling.repeat_last_n
        is_idle = self._repeat == 1 and self._presence == 0 and self._frequency == 0
        self.is_active = n_last > 0 and not is_idle
        self._n_last = n_last
        self._recent: deque[int] = deque()
        self._counts: dict[int, int] = {}
        if self.is_active:
            for token in history[-n_last:]:
                self.accept(token)

    def accept(self, token: int) -> None:
        """Remember a token that was chosen."""
        if not self.is_active:
            return
        counts = self._counts
        if len(self._recent) == self._n_last:
            oldest = self._recent.popleft()
            counts[oldest] -= 1
            if not counts[oldest]:
                del counts[oldest]
        self._recent.append(token)
        counts[token] = counts.get(token, 0) + 1

    def apply(self, logits: Row) -> tuple[Ids, Row] | None:
        """Lower the logits in place; return what restores them: ids and their old values."""
        n = len(self._counts)
        if not self.is_active or not n:
            return None
        ids = np.fromiter(self._counts.keys(), np.int64, n)
        counts = np.fromiter(self._counts.values(), np.float32, n)
        old: Row = logits[ids]
        # Dividing alone would make a token of negative logit likelier.
        new = np.where(old <= 0, old * self._repeat, old / self._repeat)
        logits[ids] = new - (counts * self._frequency + self._presence)
        return ids, old


class Bias:
    """Adds to the logits of chosen tokens; -inf bans one."""

    def __init__(self, biases: Mapping[int, float], *, n_vocab: int) -> None:
        """Take the amounts by token id.

        Raises:
            InvalidOptionError: there is no such token.
        """
        for token, amount in biases.items():
            if not 0 <= token < n_vocab:
                raise InvalidOptionError(
                    f"logit_bias names token {token}; the model has {n_vocab}", option="logit_bias"
                )
            if np.isnan(amount):
                raise InvalidOptionError(
                    f"logit_bias of token {token} is not a number", option="logit_bias"
                )
        self._ids = np.fromiter(biases.keys(), np.int64, len(biases))
        self._amounts = np.fromiter(biases.values(), np.float32, len(biases))
        self.is_active = bool(biases)

    def apply(self, logits: Row) -> tuple[Ids, Row]:
        """Add the amounts in place; return what restores the logits: ids and old values."""
        old: Row = logits[self._ids]
        logits[self._ids] = old + self._amounts
        return self._ids, old
