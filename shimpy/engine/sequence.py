"""A prompt with its completion, the slot that holds it, and what is to be done to the cache.

waiting --admit--> running --finish--> gone
^                  |
'-----preempt------'   its KV goes, its text and sampler stay; computed again later
"""

from __future__ import annotations

import msgspec

# More positions than any context has.
ALL = 1 << 62
# llama.cpp attends to so many cells or a multiple of it (llama_kv_cache::get_n_kv).
ATTENDED_CELLS = 256


class KvRemove(msgspec.Struct, frozen=True):
    """Drop the positions [start, end) of a slot; end -1: to its end."""

    slot: int
    start: int
    end: int = -1


class KvCopy(msgspec.Struct, frozen=True):
    """Let `target`, which is empty, have the first `n` positions of `source` too."""

    source: int
    target: int
    n: int


class KvShift(msgspec.Struct, frozen=True):
    """Move the positions [start, end) of a slot by `delta`."""

    slot: int
    start: int
    end: int
    delta: int


class KvExchange(msgspec.Struct, frozen=True):
    """Let two slots exchange all that they hold."""

    first: int
    second: int


KvOp = KvRemove | KvCopy | KvShift | KvExchange


class Sequence(msgspec.Struct, kw_only=True, eq=False):
    """A prompt with its completion. The batcher owns every field from `order` on."""

    request: int
    # Prompt and completion; the KV cache holds the first n_kv.
    tokens: list[int]
    # Of them the prompt's: as many as there are at first.
    n_prompt: int = 0
    # New tokens at most.
    n_predict: int
    # Tokens at the front that a context shift spares; None: no shift, the full context ends it.
    n_keep: int | None = None
    # Look for the prefix in other slots, and among what is saved.
    reuse: bool = True

    # Rank by arrival.
    order: int = 0
    slot: Slot | None = None
    n_kv: int = 0
    # Of the prompt, what was found in the KV cache.
    n_cached: int = 0
    n_generated: int = 0
    n_preempted: int = 0
    # What is saved was searched for it.
    is_sought: bool = False
    # Some of its prompt was computed.
    is_begun: bool = False
    admitted_s: float | None = None
    # The older sequence that computes our first n_shared tokens just now.
    leader: Sequence | None = None
    n_shared: int = 0

    def __post_init__(self) -> None:
        self.n_prompt = len(self.tokens)

    @property
    def n_pending(self) -> int:
        """Tokens that are known but not in the KV cache."""
        return len(self.tokens) - self.n_kv


class Slot(msgspec.Struct, eq=False):
    """A place in the KV cache: busy with a sequence, or idle with what the last one left."""

    id: int
    sequence: Sequence | None = None
    # What an idle slot's KV holds.
    tokens: list[int] = msgspec.field(default_factory=list)
    # Of these, the prompt of the sequence that left them.
    n_prompt: int = 0
    # Positions from here on were moved by a context shift: no other prompt can use them.
    n_exact: int = ALL
    # Fewer than so many of its first tokens are no use: they were restored without what had
    # left the sliding windows at their end.
    n_whole: int = 0
    last_used: int = 0
    # Batches that it was in together with others: cells that were filled in them lie apart.
    n_strewn: int = 0
    # The number of such batches before its sequence came.
    n_mixed_before: int = 0
    # Whether what an idle slot holds may go from the KV cache and comes back: it was copied, or
    # is not worth a copy. None: not looked at; False: there was no room for a copy.
    is_spare: bool | None = None


class IdleCache(msgspec.Struct, frozen=True):
    """What an idle slot holds that another prompt can use; of it, the last sequence's prompt."""

    slot: int
    tokens: list[int]
    n_prompt: int
    # As Slot.n_strewn.
    n_strewn: int = 0


class Match(msgspec.Struct, frozen=True):
    """The longest prefix of a sequence in any slot: there now, or computed there soon."""

    source: Slot | None = None
    n_now: int = 0
    # Worth waiting for when it is more than n_now.
    n_soon: int = 0

    @property
    def n_from_busy(self) -> int:
        """Tokens that need no cells of their own while their holder runs."""
        if self.source is None or self.source.sequence is None:
            return 0
        return max(self.n_now, self.n_soon)


def slot_of(sequence: Sequence) -> int:
    """Return the number of the slot that a running sequence has."""
    assert sequence.slot is not None
    return sequence.slot.id
