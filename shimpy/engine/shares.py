"""Whose prompts a batch computes, and how much of each. Pure.

In a unified KV cache llama.cpp computes all of a batch together, however it is made up. Where each
slot has cells of its own, sequences go together as far as each has as many tokens; what is over of
one is another pass over the weights (llama_batch_allocr::split_equal). So there a batch is one
sequence's, or of short ones, and ends where the cells do that it attends to: 257 tokens take
0.58 s in one batch and 0.49 s in two (dense 200M, one thread).
"""

from __future__ import annotations

from typing import Final

from shimpy.engine.sequence import ATTENDED_CELLS, Sequence

Shares = list[tuple[Sequence, int]]

# Prompts of no more tokens are worth a pass together.
SHORT: Final = 64


def share_out(prefilling: list[Sequence], n_tokens: int) -> Shares:
    """Divide the prefill tokens of a batch; sequences that get none are left out.

    The oldest gets at least half, so that a stream of short prompts can't starve it. The rest
    goes to those that are soonest done: the mean time to the first token is shortest so.
    """
    shares = dict.fromkeys(prefilling, 0)
    oldest = prefilling[0]
    shares[oldest] = min(oldest.n_pending, (n_tokens + 1) // 2)
    n_tokens -= shares[oldest]
    for sequence in sorted(prefilling, key=lambda s: s.n_pending - shares[s]):
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
        # All of a batch attend up to the cell that its last token's is rounded up to.
        n_most = ATTENDED_CELLS - first.n_kv % ATTENDED_CELLS
        return [(first, min(first.n_pending, n_tokens, n_most))]
    short = [one for one in prefilling if one.n_pending <= SHORT and one is not first]
    together = [first, *sorted(short, key=_n_pending)]
    # As many of each: one pass. What is over comes next, beside streams where it is one token.
    n = min(n_tokens, *map(_n_pending, together))
    return [(sequence, n) for sequence in together[: n_tokens // n]]


def _n_pending(sequence: Sequence) -> int:
    return sequence.n_pending
