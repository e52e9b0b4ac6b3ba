"""How a token is drawn from logits: the likeliest, or llama.cpp's chain of samplers."""

from __future__ import annotations

import math
import os
from typing import Protocol

import numpy as np

from shimpy.engine.llama.candidates import Candidates, Ids, Row
from shimpy.engine.llama.library import LL, Pointer
from shimpy.engine.llama.vocab import Vocab
from shimpy.errors import WorkerError
from shimpy.protocol.messages import Sampling

# For top_k 0, "all": without a first cut top_p sorts the whole vocabulary for each token (1 to
# 13 ms, measured), and what lies behind the 1,024 likeliest has no weight to speak of.
# Mirostat begins by cutting what is less likely than 2^-10, which leaves no more.
CANDIDATES_MAX = 1024
# llama.h, LLAMA_DEFAULT_SEED: "draw one".
_RANDOM_SEED = 0xFFFFFFFF
# Of Mirostat 1, as in its paper (Basu et al. 2020, section 4).
_MIROSTAT_M = 100
# Below it numpy has too little to do in a row.
_MIN_COLUMNS = 1024


class Chooser(Protocol):
    """Draws tokens; `n_best` is how many of the likeliest it ever looks at."""

    n_best: int

    def choose(self, logits: Row) -> int:
        """Return a token drawn from all of the vocabulary.

        Raises:
            WorkerError: the logits are NaN.
        """

    def choose_among(self, ids: Ids, logits: Row) -> int:
        """Return a token drawn from `ids`, whose logits are in the same order."""

    def close(self) -> None:
        """Free what llama.cpp holds for it."""


class Likeliest:
    """The token of the highest logit: temperature 0, or top_k 1."""

    n_best = 1

    def choose(self, logits: Row) -> int:
        """Return the likeliest token."""
        token = int(logits.argmax())
        # argmax finds a NaN where there is one.
        if math.isnan(logits.item(token)):
            raise _nan_error()
        return token

    def choose_among(self, ids: Ids, logits: Row) -> int:
        """Return the likeliest of some tokens."""
        return int(ids[logits.argmax()])

    def close(self) -> None:
        """Nothing is held."""


class Chain:
    """llama.cpp's samplers in its order: top_k, typical_p, top_p, min_p, xtc, temperature.

    They get no more tokens than top_k can leave them: over the whole vocabulary each costs
    as much as its rows (GPU.md: 6 to 16 % of the time of a model on a GPU).
    """

    def __init__(self, sampling: Sampling, vocab: Vocab) -> None:
        n_vocab = vocab.n_tokens
        self._top_n_sigma = 0.0 if sampling.mirostat else sampling.top_n_sigma
        top_k = sampling.top_k if sampling.top_k > 0 and not sampling.mirostat else CANDIDATES_MAX
        self.n_best = min(top_k, n_vocab)
        self._candidates = Candidates()
        self._chain: Pointer = LL.llama_sampler_chain_init(LL.llama_sampler_chain_default_params())
        for sampler in _samplers(sampling, vocab, n_best=self.n_best):
            LL.llama_sampler_chain_add(self._chain, sampler)

    def choose(self, logits: Row) -> int:
        """Return a token drawn from all of the vocabulary."""
        ids = likeliest(logits, self.n_best)
        if not len(ids):
            raise _nan_error()
        chosen = logits[ids]
        if self._top_n_sigma > 0:
            kept = chosen >= least_within(logits, self._top_n_sigma)
            ids, chosen = ids[kept], chosen[kept]
        return self.choose_among(ids, chosen)

    def choose_among(self, ids: Ids, logits: Row) -> int:
        """Return a token drawn from some tokens."""
        candidates = self._candidates
        candidates.fill(ids, logits)
        candidates.apply(self._chain)
        return candidates.selected

    def close(self) -> None:
        """Free the chain, and with it its samplers."""
        if self._chain:
            LL.llama_sampler_free(self._chain)
            self._chain = 0


def likeliest(logits: Row, n_best: int) -> Ids:
    """Return the ids of the `n_best` highest logits, and few others, in order; NaN: none.

    The highest of each column of a folded row are found at the memory's speed; as many logits
    as there are columns reach the n_best-th of those, so that none below it is wanted. A
    third of the time of a partition of the row.
    """
    n_columns = max(_MIN_COLUMNS, 2 * n_best)
    n_rows = len(logits) // n_columns
    if n_rows <= 1:
        return np.flatnonzero(logits == logits)  # noqa: PLR0124 (all but NaN)
    peaks = logits[: n_rows * n_columns].reshape(n_rows, n_columns).max(axis=0)
    least = np.partition(peaks, n_columns - n_best)[n_columns - n_best]
    return np.flatnonzero(logits >= least)


def least_within(logits: Row, n_sigma: float) -> float:
    """Return what is `n_sigma` standard deviations of all logits below the highest.

    Source: llama-sampler.cpp, llama_sampler_top_n_sigma_apply; there too banned ones don't count.
    """
    finite = logits[np.isfinite(logits)]
    return float(finite.max() - n_sigma * finite.std()) if len(finite) else -np.inf


def make_chooser(sampling: Sampling, vocab: Vocab) -> Chooser:
    """Return what draws tokens as `sampling` says."""
    if sampling.top_k == 1 and not sampling.mirostat:
        return Likeliest()
    if sampling.temperature <= 0 and not sampling.infill:
        return Likeliest()
    return Chain(sampling, vocab)


def _nan_error() -> WorkerError:
    """Return the error of a model that computes nothing usable."""
    return WorkerError(
        "the model computes NaN instead of logits: its file is damaged, or its weights are; "
        "load it with check_tensors to see which"
    )


def _samplers(sampling: Sampling, vocab: Vocab, *, n_best: int) -> list[Pointer]:
    drawn = int.from_bytes(os.urandom(4), "little") if sampling.seed is None else sampling.seed
    # Clients send negative and long ones, and llama.cpp's own word for "draw one" is a number.
    seed = drawn % _RANDOM_SEED
    temperature = LL.llama_sampler_init_temp_ext(
        sampling.temperature, sampling.dynatemp_range, sampling.dynatemp_exponent
    )
    # Also sorts, which spares the others doing it.
    top_k = LL.llama_sampler_init_top_k(n_best)
    if sampling.mirostat:
        # Mirostat's own cut takes the place of top_k, top_p and the others.
        tau, eta = sampling.mirostat_tau, sampling.mirostat_eta
        if sampling.mirostat == 1:
            mirostat = LL.llama_sampler_init_mirostat(vocab.n_tokens, seed, tau, eta, _MIROSTAT_M)
        else:
            mirostat = LL.llama_sampler_init_mirostat_v2(seed, tau, eta)
        return [top_k, temperature, mirostat]
    chain = [top_k]
    if sampling.typical_p < 1:
        chain.append(LL.llama_sampler_init_typical(sampling.typical_p, 1))
    if sampling.top_p < 1:
        chain.append(LL.llama_sampler_init_top_p(sampling.top_p, 1))
    if sampling.min_p > 0:
        chain.append(LL.llama_sampler_init_min_p(sampling.min_p, 1))
    if sampling.xtc_probability > 0:
        probability, threshold = sampling.xtc_probability, sampling.xtc_threshold
        chain.append(LL.llama_sampler_init_xtc(probability, threshold, 1, seed))
    # It chooses an end where there is nothing else, and aborts if the model has none.
    if sampling.infill and vocab.eos_id >= 0:
        chain.append(LL.llama_sampler_init_infill(vocab.handle))
    return [*chain, temperature, LL.llama_sampler_init_dist(seed)]
