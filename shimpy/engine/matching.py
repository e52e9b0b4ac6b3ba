"""In which slot most of a prompt's prefix is: there now, or computed there soon. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Tokens

from shimpy.engine.sequence import Match, Sequence, Slot

# A running sequence is waited for when it saves at least this many tokens of prefill.
MIN_FOLLOW = 64
# Fewer tokens are not shared: a start token that all have would keep its cell for ever, and
# attention that looks at all cells goes up to the last one that is kept, however few are.
MIN_SHARED = 16
# Where each slot has cells of its own, a part of another's is shared by a copy of all of it:
# that may have so many times the tokens.
MAX_COPIED = 16
# Tokens that are compared at first.
_FEW = 8


def best_match(
    sequence: Sequence, slots: Iterable[Slot], *, can_split: bool, kv_unified: bool
) -> Match:
    """Return where most of the sequence's prefix is; its last token never counts.

    That token must be computed in any case, for its logits. `can_split`: a part of what a slot
    holds can be used. `kv_unified`: the slots share their cells.
    """
    best, best_score = Match(), 0
    if not sequence.reuse:
        return best
    for slot in slots:
        if slot is sequence.slot:
            continue
        match = _match(sequence, slot, can_split=can_split, kv_unified=kv_unified)
        score = max(match.n_now, match.n_soon - MIN_FOLLOW)
        # A tie goes to the idle slot: it may be taken over without a copy.
        if score > best_score or (score == best_score > 0 and slot.sequence is None):
            best, best_score = match, score
    if best.n_soon - MIN_FOLLOW > best.n_now:
        return best
    return Match(best.source, best.n_now, best.n_now)


def _match(sequence: Sequence, slot: Slot, *, can_split: bool, kv_unified: bool) -> Match:
    owner = slot.sequence
    known = slot.tokens if owner is None else owner.tokens
    n_kv = n_held(slot)
    n_least = MIN_SHARED if can_split and is_part(MIN_SHARED - 1, n_kv) else 0
    if known[:n_least] != sequence.tokens[:n_least]:
        # Fewer are of no use, as below, and most prompts differ within these.
        return Match()
    n_common = common_prefix(known, sequence.tokens)
    n_common = min(n_common, len(sequence.tokens) - 1, slot.n_exact)
    if n_common < slot.n_whole:
        return Match()
    if not can_split:
        n_now = n_kv if n_common >= n_kv else 0
        return Match(slot, n_now, n_now)
    n_now = min(n_common, n_kv)
    is_shared = owner is not None or is_part(n_now, n_kv)
    if is_shared and n_common < MIN_SHARED:
        return Match()
    if is_shared and not kv_unified and n_kv > MAX_COPIED * n_common:
        return Match()
    # Only an older one is waited for: no two can wait for each other.
    is_older = owner is not None and owner.order < sequence.order
    return Match(slot, n_now, n_common if is_older else n_now)


def n_held(slot: Slot) -> int:
    """Return how many tokens of a slot are in the KV cache."""
    return len(slot.tokens) if slot.sequence is None else slot.sequence.n_kv


def is_part(n: int, n_idle: int) -> bool:
    """Whether `n` tokens are too few of what idles in a slot to take that slot for them."""
    return 2 * n < n_idle


def common_prefix(a: Tokens[int], b: Tokens[int]) -> int:
    """Return the length of the longest common prefix, comparing longer and longer slices."""
    low, n, size = 0, min(len(a), len(b)), _FEW
    while a[low : (high := min(low + size, n))] == b[low:high]:
        if high == n:
            return n
        low, size = high, 2 * size
    # Equal up to low, not equal up to high.
    while high - low > 1:
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low
