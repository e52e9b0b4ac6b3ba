"""Whose prompts a batch computes, and how much of each. Pure.

In a unified KV cache llama.cpp computes all of a batch together, however it is made up. Where each
slot has cells of its own, sequences go together as far as each has as many tokens and their slots
follow each other; what is over of one is another pass over the weights
(llama_batch_allocr::split_equal). So there a batch is one sequence's, or of short ones in
neighbouring slots, padded to one length. It ends where the cells do that it attends to: 257 tokens
take 0.58 s in one batch and 0.49 s in two (dense 200M, one thread).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from shimpy.engine.sequence import ATTENDED_CELLS, Sequence, slot_of

Shares = list[tuple[Sequence, int]]
# Sequences of consecutive slots, in their order.
Group = list[Sequence]

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
    short = {slot_of(one): one for one in prefilling if one.n_pending <= SHORT}
    most_padding = PASS if can_pad else 0

    def does_fit(group: Group) -> bool:
        n = _length(group)
        return n * len(group) <= n_tokens and all(one.n_kv + n <= n_cells for one in group)

    group = [first]
    # Neighbours come in as long as that takes less padding than a pass of their own.
    while True:
        wider = min(_widened(group, short), key=_n_padding, default=None)
        if wider is None or not does_fit(wider):
            break
        if _n_padding(wider) - _n_padding(group) > most_padding:
            break
        group = wider
    n = min(_length(group), n_tokens)
    return [(sequence, n) for sequence in group]


def _widened(group: Group, short: Mapping[int, Sequence]) -> Iterator[Group]:
    """Yield the group with the neighbour before it, and with the one behind it."""
    if (before := short.get(slot_of(group[0]) - 1)) is not None:
        yield [before, *group]
    if (behind := short.get(slot_of(group[-1]) + 1)) is not None:
        yield [*group, behind]


def _length(group: Group) -> int:
    return max(one.n_pending for one in group)


def _n_padding(group: Group) -> int:
    return len(group) * _length(group) - sum(one.n_pending for one in group)
