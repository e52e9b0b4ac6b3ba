"""Repetition penalties and logit bias: edits of a few logits, in place, undone afterwards.

llama.cpp's own penalties hash the whole vocabulary for each token (0.1 to 0.5 ms); here only
the ids that are concerned are touched. The rules are its own (llama-sampler.cpp,
llama_sampler_penalties_apply).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from shimpy.errors import InvalidOptionError
from shimpy.protocol.messages import Sampling

Row = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]


class Penalties:
    """Lowers the logits of the tokens among the last `repeat_last_n`, the prompt's included."""

    def __init__(
        self, sampling: Sampling, history: Sequence[int], *, n_ctx: int, n_vocab: int
    ) -> None:
        """Take the prompt; `repeat_last_n` -1 means the whole context."""
        self._repeat = np.float32(sampling.repeat_penalty)
        self._presence = np.float32(sampling.presence_penalty)
        self._frequency = np.float32(sampling.frequency_penalty)
        n_last = n_ctx if sampling.repeat_last_n < 0 else sampling.repeat_last_n
        self._repeats = self._repeat != 1
        self._subtracts = self._presence != 0 or self._frequency != 0
        self.is_active = n_last > 0 and bool(self._repeats or self._subtracts)
        # Dividing alone would make a token of negative logit likelier: of the product and the
        # quotient it is always the lower one, or with a penalty below 1 the higher.
        self._choose = np.minimum if self._repeat > 1 else np.maximum
        self._n_last = n_last
        self._recent = deque(history[-n_last:] if self.is_active else ())
        counts = Counter(self._recent)
        # Each token among them once, in no order; how often it is there; and its place here.
        n_most = min(n_last, n_vocab) if self.is_active else 0
        self._ids = np.zeros(n_most, np.int64)
        self._counts = np.zeros(n_most, np.float32)
        self._places = {token: place for place, token in enumerate(counts)}
        self._ids[: len(counts)] = list(counts.keys())
        self._counts[: len(counts)] = list(counts.values())

    def accept(self, token: int) -> None:
        """Remember a token that was chosen."""
        if not self.is_active:
            return
        if len(self._recent) == self._n_last:
            self._forget(self._recent.popleft())
        self._recent.append(token)
        place = self._places.get(token)
        if place is None:
            place = self._places[token] = len(self._places)
            self._ids[place] = token
            self._counts[place] = 0
        self._counts[place] += 1

    def _forget(self, token: int) -> None:
        place = self._places[token]
        self._counts[place] -= 1
        if self._counts[place]:
            return
        del self._places[token]
        last = len(self._places)
        if place < last:
            moved = int(self._ids[last])
            self._ids[place], self._counts[place] = moved, self._counts[last]
            self._places[moved] = place

    def apply(self, logits: Row) -> tuple[Ids, Row] | None:
        """Lower the logits in place; return what restores them: ids and their old values.

        The ids are good until the next accept().
        """
        n = len(self._places)
        if not n:
            return None
        ids = self._ids[:n]
        old: Row = logits.take(ids)
        new = old
        if self._repeats:
            new = self._choose(old * self._repeat, old / self._repeat)
        if self._subtracts:
            new = new - (self._counts[:n] * self._frequency + self._presence)
        logits[ids] = new
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
