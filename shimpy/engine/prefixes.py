"""Which prefixes are saved as a model is unloaded, which one comes back, which files go. Pure.

A saved prefix is the state of one slot: the keys and values of its first tokens, and the tokens.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from shimpy.engine.sequence import IdleCache
from shimpy.engine.slots import common_prefix

# Fewer tokens are computed again in no time.
MIN_SAVED: Final = 256
# A prefix is restored when it saves at least this many tokens of prefill...
MIN_GAIN: Final = 128
# ...and has at most this many times as many: all of it is read. Reading a token's state was
# measured at 1/100 of its prefill on two cores; a card computes faster by far than it is fed.
MAX_EXCESS: Final = 8


@dataclass(frozen=True, slots=True, eq=False)
class SavedPrefix:
    """A prefix in a file of that name."""

    name: str
    # int32, as they are in the file.
    tokens: array[int]
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Save:
    """Save a slot's first tokens, all others dropped; `covers` are files that it makes needless."""

    slot: int
    tokens: list[int]
    covers: tuple[str, ...] = ()


class SavedPrefixes:
    """The prefixes of one model that are on disk, by name."""

    def __init__(
        self, prefixes: Iterable[SavedPrefix] = (), *, whole: bool, can_cut: bool = True
    ) -> None:
        """`whole`: a saved state goes on from its end or is no use.

        `can_cut`: a slot's last tokens can be dropped before it is saved.
        """
        self.whole = whole
        self._can_cut = can_cut
        self._prefixes = {prefix.name: prefix for prefix in prefixes}

    def __len__(self) -> int:
        return len(self._prefixes)

    def __iter__(self) -> Iterator[SavedPrefix]:
        return iter(self._prefixes.values())

    def add(self, prefix: SavedPrefix) -> None:
        """Know of one more."""
        self._prefixes[prefix.name] = prefix

    def discard(self, name: str) -> None:
        """Forget one."""
        self._prefixes.pop(name, None)

    def best(self, tokens: Sequence[int], n_resident: int) -> tuple[SavedPrefix, int] | None:
        """Return the prefix that is worth restoring for a prompt, and how much of it counts.

        `n_resident` tokens are in the KV cache already, and the prompt's last one has to be
        computed in any case. Of those that share as much the shortest is read.
        """
        wanted = array("i", tokens[:-1])
        best: tuple[SavedPrefix, int] | None = None
        for prefix in self._prefixes.values():
            # Most share nothing: they are told apart at once, however long.
            if prefix.tokens[:MIN_GAIN] != wanted[:MIN_GAIN]:
                continue
            n_known = len(prefix.tokens)
            n_common = common_prefix(prefix.tokens, wanted)
            gain = n_common - n_resident
            if (
                gain < MIN_GAIN
                or n_known > MAX_EXCESS * gain
                or (self.whole and n_common < n_known)
            ):
                continue
            if best is None or (n_common, -n_known) > (best[1], -len(best[0].tokens)):
                best = prefix, n_common
        return best

    def choose_saves(self, caches: Iterable[IdleCache]) -> list[Save]:
        """Return which of the idle caches to save, in their order.

        1. Too short, or on disk but for some last tokens: not saved.
        2. The beginning of a longer one, but for such: not saved either, where it can be cut
           from that.
        3. Anything else is, and covers the files of its own beginnings.

        A state that goes on from its end alone is saved at the end of the prompt, less its last
        token, which is computed in any case: there the same prompt again and the next one of a
        conversation go on.
        """
        saves = [Save(cache.slot, self._worth_saving(cache)) for cache in caches]
        known: list[Sequence[int]] = [prefix.tokens for prefix in self]
        chosen: list[Save] = []
        for save in sorted(saves, key=lambda save: len(save.tokens), reverse=True):
            tokens = array("i", save.tokens)
            if len(tokens) < MIN_SAVED or any(self._contains(one, tokens) for one in known):
                continue
            covers = [one.name for one in self if self._contains(tokens, one.tokens)]
            chosen.append(replace(save, covers=tuple(covers)))
            known.append(tokens)
        return sorted(chosen, key=lambda save: [one.slot for one in saves].index(save.slot))

    def _worth_saving(self, cache: IdleCache) -> list[int]:
        if self.whole and self._can_cut:
            return cache.tokens[: max(0, cache.n_prompt - 1)]
        return cache.tokens

    def _contains(self, state: Sequence[int], tokens: Sequence[int]) -> bool:
        """Whether a state serves for these tokens, or is cut to nearly all of them."""
        if self.whole:
            return state == tokens
        return len(tokens) - common_prefix(state, tokens) < MIN_GAIN


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of any model's saved prefixes."""

    path: str
    n_bytes: int
    # Seconds since the epoch: when it was saved or last restored.
    used_s: float


def plan_room(
    files: Iterable[StoredFile], *, n_new: int, limit: int, n_free: int, reserve: int
) -> list[StoredFile] | None:
    """Return the files to remove for `n_new` more bytes, the least recently used first.

    All files together may take `limit` bytes, and of the disk's `n_free` bytes `reserve` are
    left. None: there is no room, whatever is removed.
    """
    kept = sorted(files, key=lambda file: file.used_s, reverse=True)
    n_excess = max(sum(file.n_bytes for file in kept) + n_new - limit, n_new + reserve - n_free)
    removed: list[StoredFile] = []
    while n_excess > 0:
        if not kept:
            return None
        removed.append(kept.pop())
        n_excess -= removed[-1].n_bytes
    return removed
