"""How a token is drawn from logits: the likeliest, or llama.cpp's chain of samplers."""

from __future__ import annotations

import ctypes
import os
from typing import Protocol

import numpy as np
import numpy.typing as npt

from shimpy.engine.llama.candidates import Candidates
from shimpy.engine.llama.context import Context
from shimpy.engine.llama.library import LL, Pointer, bind
from shimpy.errors import WorkerError
from shimpy.protocol.messages import Sampling

Row = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int32]

# Without a first cut top_p sorts the whole vocabulary for each token (1 to 13 ms, measured).
# What lies behind the 1,024 likeliest has no weight to speak of.
CANDIDATES_MAX = 1024
# llama.h, LLAMA_DEFAULT_SEED: "draw one".
_RANDOM_SEED = 0xFFFFFFFF
# Of Mirostat 1, as in its paper (Basu et al. 2020, section 4).
_MIROSTAT_M = 100

_sample = bind(
    "llama_sampler_sample", ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32
)


class Chooser(Protocol):
    """Draws tokens; `n_best` is how many of the likeliest it ever looks at."""

    n_best: int

    def choose(self, context: Context, row: int, logits: Row) -> int:
        """Return a token drawn from an output's logits."""

    def choose_among(self, ids: Ids, logits: Row) -> int:
        """Return a token drawn from `ids`, whose logits are in the same order."""

    def close(self) -> None:
        """Free what llama.cpp holds for it."""


class Likeliest:
    """The token of the highest logit: temperature 0, or top_k 1."""

    n_best = 1

    def choose(self, context: Context, row: int, logits: Row) -> int:
        """Return the likeliest token."""
        del context, row
        token = int(logits.argmax())
        # argmax finds a NaN where there is one.
        if logits[token] != logits[token]:
            raise nan_error()
        return token

    def choose_among(self, ids: Ids, logits: Row) -> int:
        """Return the likeliest of some tokens."""
        return int(ids[logits.argmax()])

    def close(self) -> None:
        """Nothing is held."""


class Chain:
    """llama.cpp's samplers in Ollama's order: top_k, typical_p, top_p, min_p, temperature."""

    def __init__(self, sampling: Sampling, *, n_vocab: int) -> None:
        self.n_best = min(sampling.top_k if sampling.top_k > 0 else CANDIDATES_MAX, n_vocab)
        self._is_checked = False
        self._chain: Pointer = LL.llama_sampler_chain_init(LL.llama_sampler_chain_default_params())
        for sampler in _samplers(sampling, n_vocab=n_vocab, n_best=self.n_best):
            LL.llama_sampler_chain_add(self._chain, sampler)

    def choose(self, context: Context, row: int, logits: Row) -> int:
        """Return a token drawn from an output's logits."""
        if not self._is_checked:
            # Once a request: weights that give NaN give it everywhere.
            if np.isnan(logits.max()):
                raise nan_error()
            self._is_checked = True
        token: int = _sample(self._chain, context.handle, context.output_token(row))
        return token

    def choose_among(self, ids: Ids, logits: Row) -> int:
        """Return a token drawn from some tokens."""
        candidates = Candidates(ids, logits)
        candidates.apply(self._chain)
        return candidates.selected

    def close(self) -> None:
        """Free the chain, and with it its samplers."""
        if self._chain:
            LL.llama_sampler_free(self._chain)
            self._chain = 0


def make_chooser(sampling: Sampling, *, n_vocab: int) -> Chooser:
    """Return what draws tokens as `sampling` says."""
    if sampling.temperature <= 0 or (sampling.top_k == 1 and not sampling.mirostat):
        return Likeliest()
    return Chain(sampling, n_vocab=n_vocab)


def nan_error() -> WorkerError:
    """Return the error of a model that computes nothing usable."""
    return WorkerError(
        "the model computes NaN instead of logits: its file is damaged, or its weights are; "
        "load it with check_tensors to see which"
    )


def _samplers(sampling: Sampling, *, n_vocab: int, n_best: int) -> list[Pointer]:
    drawn = int.from_bytes(os.urandom(4), "little") if sampling.seed is None else sampling.seed
    # Clients send negative and long ones, and llama.cpp's own word for "draw one" is a number.
    seed = drawn % _RANDOM_SEED
    temperature = LL.llama_sampler_init_temp(sampling.temperature)
    top_k = LL.llama_sampler_init_top_k(n_best)
    if sampling.mirostat:
        # Mirostat's own cut takes the place of top_k, top_p and the others.
        tau, eta = sampling.mirostat_tau, sampling.mirostat_eta
        if sampling.mirostat == 1:
            mirostat = LL.llama_sampler_init_mirostat(n_vocab, seed, tau, eta, _MIROSTAT_M)
        else:
            mirostat = LL.llama_sampler_init_mirostat_v2(seed, tau, eta)
        return [LL.llama_sampler_init_top_k(CANDIDATES_MAX), temperature, mirostat]
    chain = [top_k]
    if sampling.typical_p < 1:
        chain.append(LL.llama_sampler_init_typical(sampling.typical_p, 1))
    if sampling.top_p < 1:
        chain.append(LL.llama_sampler_init_top_p(sampling.top_p, 1))
    if sampling.min_p > 0:
        chain.append(LL.llama_sampler_init_min_p(sampling.min_p, 1))
    return [*chain, temperature, LL.llama_sampler_init_dist(seed)]
