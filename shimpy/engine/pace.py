"""How many prefill tokens go into a batch beside running streams.

Those streams stand still while the batch is computed, so it is kept short: 128 tokens on two
cores (measured with a 200M model: 0.17 s where a prompt begins, 0.34 s behind 1,400 tokens of
it; with 256 0.38 and 0.60 s, and the prompt's first token comes no sooner). Where that is too
long it shrinks, as long as that costs little: 96 tokens take 0.25 s behind 1,400 and the whole
prompt 2 % longer, 64 0.19 s and 12 % longer, 32 0.11 s and 33 %. (On one thread 64 take 0.35 s
and 48 0.24 s there, and the whole prompt as long; without AVX512 48 take 0.25 s and 32 0.17, each
token 1.04 times as long.) But beside eight streams with
256 tokens each, 64 take 25 % more of the processor's time: where several prompts wait, what is lost
is lost to all of them, and it is not shortened. It grows where batches are
quick, and where a longer one saves much time: with experts in RAM most of a batch's time goes
into copying them to the GPU, however few its tokens are. What is wanted is a stall of under 0.3 s;
a chunk may take half of that, as a busy machine takes longer, and a step of the streams comes too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Final

import msgspec
from msgspec.structs import replace

MIN_CHUNK: Final = 128
# It is shortened to these where it would take longer than this, unless each token would take so
# many times as long then.
_SHORTER: Final = (96, 64, 48, 32)
LEAST_CHUNK: Final = _SHORTER[-1]
LONG_S: Final = 0.16
_MAX_LOSS: Final = 1.3
# A longer batch may take this long...
STALL_S: Final = 0.1
# ...or hold more tokens as long as twice as many take no more than this times as long.
MAX_GROWTH: Final = 1.5
# A longer one takes at most so many times as long as as many tokens in shorter ones.
_MAX_EXCESS: Final = 1.5
# Batches whose sizes differ by less are taken for one size.
_NEAR: Final = 32
# Shorter batches tell nothing: with experts in RAM they are computed where those are (fewer than
# 32 tokens; ggml-cuda.cu, ggml_backend_cuda_device_offload_op).
_LEAST: Final = LEAST_CHUNK
# A busy machine only ever makes a batch slower: the best rate of a size counts. It falls with each
# slower batch, and is forgotten after this many batches of other sizes.
_FALLING: Final = 1.05
_KEPT: Final = 200
# A batch says something of those that are at most so many times as deep, or as shallow; so many
# tokens make little difference.
_ALIKE: Final = 1.5
_SHALLOW: Final = 128


class _Known(msgspec.Struct, frozen=True):
    """The quickest of the batches of about one size."""

    n_tokens: int
    seconds: float
    # Of the batch that it was.
    depth: int
    # The number of the last batch of that size.
    last: int


class Pace:
    """Learns from each batch how long those of its size take."""

    def __init__(self, n_most: int, *, uses_gpu: bool = False) -> None:
        """No batch has more than `n_most` tokens.

        `uses_gpu`: where one size is all that is known, longer batches are taken to be as quick,
        as with experts in RAM, and so they are tried; on a CPU to take as long for each token. And
        where nothing else is known of batches as deep, what others took says something, too: depth
        costs a GPU little.
        """
        self._n_most = n_most
        self._uses_gpu = uses_gpu
        # By the power of two that is nearest to their number of tokens.
        self._known: dict[int, _Known] = {}
        # Of them, in order, what says something of batches as deep as the last one.
        self._alike: list[_Known] = []
        self._n_batches = 0
        self.chunk = self._wanted = min(MIN_CHUNK, n_most)

    def chunk_for(self, n_prompts: int) -> int:
        """Return how many tokens of so many prompts the next batch may hold beside streams."""
        return self.chunk if n_prompts <= 1 else max(self.chunk, min(MIN_CHUNK, self._n_most))

    def on_batch(self, n_prefill: int, elapsed_s: float, *, depth: int = 0) -> None:
        """Learn how long a batch with this many prefill tokens took.

        `depth`: how many tokens its attention went over beside its own.
        """
        if n_prefill < _LEAST:
            return
        self._n_batches += 1
        size = round(math.log2(n_prefill))
        old = self._known.get(size)
        new = _Known(n_prefill, elapsed_s, depth, self._n_batches)
        if (
            old is not None
            and abs(depth - old.depth) <= _SHALLOW
            and abs(n_prefill - old.n_tokens) < _NEAR
            and elapsed_s * old.n_tokens > _FALLING * old.seconds * n_prefill
        ):
            new = replace(old, seconds=_FALLING * old.seconds, last=self._n_batches)
        self._known[size] = new
        oldest = self._n_batches - _KEPT
        self._known = {n: known for n, known in sorted(self._known.items()) if known.last > oldest}
        self._alike = _alike(self._known.values(), depth)
        if self._uses_gpu and len(self._alike) == 1:
            self._alike = list(self._known.values())
        before, self._wanted = self._wanted, min(self._choose(), self._n_most)
        is_long = self._expected_s(self._wanted) > LONG_S
        # One slow batch makes long ones look good, until the next.
        self.chunk = min(self._wanted, max(before, self.chunk)) if is_long else self._wanted

    def _choose(self) -> int:
        """Return the largest size that is quick enough, or worth its time.

        How long one takes that is far longer than any that was seen is a guess, for which all
        streams would wait: it is at most twice as long.
        """
        longest = self._alike[-1].n_tokens
        size = MIN_CHUNK
        while size < min(self._n_most, longest + _NEAR):
            longer_s = self._expected_s(2 * size)
            if longer_s > STALL_S and longer_s > MAX_GROWTH * self._expected_s(size):
                break
            size *= 2
        if size > MIN_CHUNK:
            return size
        return self._shorten([n for n in (MIN_CHUNK, *_SHORTER) if n <= 2 * longest])

    def _shorten(self, sizes: Sequence[int]) -> int:
        """Return the first of some falling sizes that is not too long, or can't be helped."""
        size = sizes[0]
        most_s = _MAX_LOSS * self._expected_s(size) / size
        for shorter in sizes[1:]:
            if self._expected_s(size) <= LONG_S:
                break
            if self._expected_s(shorter) > most_s * shorter:
                break
            size = shorter
        return size

    def _expected_s(self, n_tokens: int) -> float:
        """Return how long a batch should take: on the line between what is known around it."""
        known = self._alike
        if len(known) == 1:
            # Nothing tells what a batch costs by itself.
            n_times = 1.0 if self._uses_gpu else n_tokens / known[0].n_tokens
            return known[0].seconds * n_times
        above = next((i for i, k in enumerate(known) if k.n_tokens >= n_tokens), len(known) - 1)
        low, high = known[max(0, above - 1)], known[max(1, above)]
        slope = (high.seconds - low.seconds) / (high.n_tokens - low.n_tokens)
        return max(0.0, low.seconds + slope * (n_tokens - low.n_tokens))


def _alike(known: Iterable[_Known], depth: int) -> list[_Known]:
    """Return those of some rising sizes that say something of batches of a depth.

    Attention takes the longer the deeper: what a batch took near the beginning of a prompt says
    nothing deep inside of one, nor what it took beside many others of a lone one. And a long one
    takes little longer than as many tokens in short ones: where it did, something else took the
    time.
    """
    least, most = depth / _ALIKE - _SHALLOW, depth * _ALIKE + _SHALLOW
    alike = [one for one in known if least <= one.depth <= most]
    token_s = itertools.accumulate((one.seconds / one.n_tokens for one in alike), min)
    return [
        replace(one, seconds=min(one.seconds, _MAX_EXCESS * one.n_tokens * seconds))
        for one, seconds in zip(alike, token_s, strict=True)
    ]
