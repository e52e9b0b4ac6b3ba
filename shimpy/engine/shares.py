"""Whose prompts a batch computes, and how much of each. Pure.

In a unified KV cache llama.cpp computes all of a batch together, however it is made up. Where each
slot has cells of its own, sequences go together as far as each has as many tokens; what is over of
one is another pass over the weights (llama_batch_allocr::split_equal). So there a batch is one
sequence's, or of short ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from shimpy.engine.sequence import Sequence

Shares = list[tuple[Sequence, int]]

# Prompts of no more tokens are worth a pass together.
SHORT: Final = 64
# The most of one prompt's tokens in a batch: 768 tokens take 7 % less time so than in batches of
# 512 (dense 200M, one thread; a mixture of experts of 300M as long; docs/performance.md).
ALONE: Final = 256


def share_out(prefilling: Iterable[Sequence], n_tokens: int) -> Shares:
    """Divide the prefill tokens of a batch, the oldest first; who gets none is left out.

    The oldest gets at least half, so that a stream of short prompts can't starve it. The rest
    goes to those that are soonest done: the mean time to the first token is shortest so.
    """
    shares = dict.fromkeys(prefilling, 0)
    if not n_tokens or not shares:
        return []
    oldest = next(iter(shares))
    shares[oldest] = min(oldest.n_pending, (n_tokens + 1) // 2)
    n_tokens -= shares[oldest]
    for sequence in sorted(shares, key=lambda s: s.n_pending - shares[s]):
        n = min(sequence.n_pending - shares[sequence], n_tokens)
        shares[sequence] += n
        n_tokens -= n
    return [(sequence, n) for sequence, n in shares.items() if n]


def share_alone(prefilling: list[Sequence], n_tokens: int, *, is_oldests_turn: bool) -> Shares:
    """Give the prefill tokens of a batch to one sequence, or to several short ones.

    The oldest has every second batch, the one that is soonest done the others.
    """
    if not n_tokens or not prefilling:
        return []
    first = prefilling[0] if is_oldests_turn else min(prefilling, key=_n_pending)
    if first.n_pending > SHORT:
        # Not two batches of which one has next to nothing.
        n = first.n_pending if 2 * first.n_pending <= 3 * ALONE else ALONE
        return [(first, min(n, n_tokens))]
    shares = []
    short = [one for one in prefilling if one.n_pending <= SHORT and one is not first]
    for sequence in [first, *sorted(short, key=_n_pending)]:
        if n := min(sequence.n_pending, n_tokens):
            shares.append((sequence, n))
            n_tokens -= n
    return shares


def _n_pending(sequence: Sequence) -> int:
    return sequence.n_pending
