"""Whose prompts a batch computes, and how much of each. Pure.

In a unified KV cache llama.cpp computes all of a batch together, however it is made up. Where each
slot has cells of its own, sequences go together as far as each has as many tokens and their slots
follow each other; what is over of one is another pass over the weights
(llama_batch_allocr::split_equal). So there a batch is one sequence's, or of short ones in
neighbouring slots, padded to one length. It ends where the cells do that it attends to: 257 tokens
take 0.58 s in one batch and 0.49 s in two (dense 200M, one thread).
"""

from __future__ import annotations

from collections import deque
from typing import Final

from shimpy.engine.sequence import ATTENDED_CELLS, Sequence

Shares = list[tuple[Sequence, int]]

# Prompts of no more tokens are worth a pass together.
SHORT: Final = 64
# A pass over the weights takes as long as so many tokens more in another one: 5 to 8 on AVX2, 9 on
# AVX512 (dense 200M, one thread).
PASS: Final = 8


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


def share_alone(
    prefilling: list[Sequence],
    n_tokens: int,
    *,
    is_oldests_turn: bool,
    n_cells: int,
    can_pad: bool = True,
) -> Shares:
    """Give the prefill tokens of a batch to one sequence, or to several short ones.

    The oldest has every second batch, the one that is soonest done the others. A share of more
    than a sequence has is to be padded. `n_cells`: of each slot, which padding has to fit into.
    """
    if not n_tokens or not prefilling:
        return []
    first = prefilling[0]
    if not is_oldests_turn:
        # A few tokens make no difference: of alike ones the oldest.
        shortest = min(one.n_pending for one in prefilling)
        first = next(one for one in prefilling if one.n_pending < shortest + PASS)
    if first.n_pending > SHORT:
        # All of a batch attend up to the cell that its last token's is rounded up to.
        n_most = ATTENDED_CELLS - first.n_kv % ATTENDED_CELLS
        return [(first, min(first.n_pending, n_tokens, n_most))]
    together = deque([first])
    n = min(first.n_pending, n_tokens)
    short = {slot_of(one): one for one in prefilling if one.n_pending <= SHORT}
    most_padding = PASS if can_pad else 0

    def padding(one: Sequence) -> int:
        longest = max(n, one.n_pending)
        return (longest - n) * len(together) + longest - one.n_pending

    # Neighbours come in as long as that takes less padding than a pass of their own.
    while True:
        beside = slot_of(together[0]) - 1, slot_of(together[-1]) + 1
        other = min((short[slot] for slot in beside if slot in short), key=padding, default=None)
        if other is None or padding(other) > most_padding:
            break
        longest = max(n, other.n_pending)
        if longest * (len(together) + 1) > n_tokens:
            break
        if any(one.n_kv + longest > n_cells for one in (*together, other)):
            break
        n = longest
        if slot_of(other) < slot_of(first):
            together.appendleft(other)
        else:
            together.append(other)
    return [(sequence, n) for sequence in together]


def slot_of(sequence: Sequence) -> int:
    """Return the number of the slot that a running sequence has."""
    assert sequence.slot is not None
    return sequence.slot.id
