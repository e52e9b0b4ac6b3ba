"""Which slots change places so that those that run are neighbours. Pure.

Where each slot has cells of its own (`kv_unified` off), llama.cpp computes together only
sequences whose numbers follow each other (llama_batch_allocr::split_equal, `sequential`): a gap
costs another pass over the weights, in every step. To move a slot's cache takes a copy out and
one back, 0.03 ms a token with a 200M model, of which one pass takes 13 ms.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final

# In one step, tokens: with a model of 7B they take a second, for which all wait.
MAX_MOVED: Final = 4096


def exchanges(n_tokens: Sequence[int], running: Collection[int]) -> list[tuple[int, int]]:
    """Return the pairs of slots to exchange: those that run are consecutive then.

    `n_tokens`: what each slot holds. As few tokens as can be are moved; none where that is
    more than MAX_MOVED.
    """
    n = len(running)
    if not running or max(running) - min(running) == n - 1:
        return []

    def n_moved(start: int) -> int:
        inside = range(start, start + n)
        away = sum(n_tokens[slot] for slot in running if slot not in inside)
        return away + sum(n_tokens[slot] for slot in inside if slot not in running)

    start = min(range(len(n_tokens) - n + 1), key=n_moved)
    if n_moved(start) > MAX_MOVED:
        return []
    inside = range(start, start + n)
    outside = sorted(slot for slot in running if slot not in inside)
    gaps = [slot for slot in inside if slot not in running]
    return list(zip(outside, gaps, strict=True))
