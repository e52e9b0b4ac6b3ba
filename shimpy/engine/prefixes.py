"""Which prefixes are kept outside of the KV cache, which one comes back, which ones go. Pure.

A saved prefix is the state of one slot: the keys and values of its first tokens, and the tokens.
It is parked in RAM while the model is loaded, or in a file on disk, also afterwards.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import msgspec
from msgspec.structs import replace

from shimpy.engine.matching import common_prefix
from shimpy.engine.sequence import IdleCache

# Fewer tokens are computed again in no time.
MIN_SAVED: Final = 256
# A prefix is restored when it saves at least this many tokens of prefill...
MIN_GAIN: Final = 128
# ...and has at most this many times as many: all of it is read. Reading a token's state was
# measured at 1/100 of its prefill on two cores; a card computes faster by far than it is fed.
MAX_EXCESS: Final = 8
# The same of what is parked in RAM: to copy a token's state takes 1/60 to 1/200 of its prefill
# there and as long back, nothing is summed, and the rest of a step 0.2 ms (200M, 300M, demo).
MIN_PARKED: Final = 32
MIN_PARKED_GAIN: Final = 16
MAX_PARKED_EXCESS: Final = 16


class SavedPrefix(msgspec.Struct, frozen=True, eq=False):
    """A prefix in a file of that name, or parked under it."""

    name: str
    # int32, as they are in the file.
    tokens: array[int]
    n_bytes: int
    is_parked: bool = False

    @property
    def min_gain(self) -> int:
        """Tokens that it has to save for being restored."""
        return MIN_PARKED_GAIN if self.is_parked else MIN_GAIN

    @property
    def max_excess(self) -> int:
        """How many times as many it may have."""
        return MAX_PARKED_EXCESS if self.is_parked else MAX_EXCESS


class Save(msgspec.Struct, frozen=True):
    """Save a slot's first tokens, all others dropped, or what is parked (slot None).

    `covers` are files that it makes needless.
    """

    slot: int | None
    tokens: list[int]
    covers: tuple[str, ...] = ()
    parked: SavedPrefix | None = None


class SavedPrefixes:
    """The prefixes of one model that are parked or on disk, by name; the last used come last."""

    def __init__(
        self, prefixes: Iterable[SavedPrefix] = (), *, whole: bool, can_cut: bool = True
    ) -> None:
        """`whole`: a saved state goes on from its end or is no use.

        `can_cut`: a slot's last tokens can be dropped before it is saved.
        """
        self.whole = whole
        self._can_cut = can_cut
        self._prefixes: dict[str, SavedPrefix] = {}
        # The same by their first tokens: who shares fewer with one has no use for it.
        self._by_head: dict[bytes, dict[str, SavedPrefix]] = {}
        for prefix in prefixes:
            self.add(prefix)

    def __len__(self) -> int:
        return len(self._prefixes)

    def __iter__(self) -> Iterator[SavedPrefix]:
        return iter(self._prefixes.values())

    def add(self, prefix: SavedPrefix) -> None:
        """Know of one more."""
        self._prefixes[prefix.name] = prefix
        self._by_head.setdefault(_head(prefix.tokens), {})[prefix.name] = prefix

    def discard(self, name: str) -> None:
        """Forget one."""
        prefix = self._prefixes.pop(name, None)
        if prefix is None:
            return
        alike = self._by_head[_head(prefix.tokens)]
        del alike[name]
        if not alike:
            del self._by_head[_head(prefix.tokens)]

    def _alike(self, tokens: array[int]) -> Iterable[SavedPrefix]:
        """Return those that begin as these tokens do."""
        return self._by_head.get(_head(tokens), {}).values()

    def touch(self, prefix: SavedPrefix) -> None:
        """Note that one was used just now."""
        self.discard(prefix.name)
        self.add(prefix)

    def best(self, tokens: Sequence[int], n_resident: int) -> tuple[SavedPrefix, int] | None:
        """Return the prefix that is worth restoring for a prompt, and how much of it counts.

        `n_resident` tokens are in the KV cache already, and the prompt's last one has to be
        computed in any case. Of those that share as much the shortest is read.
        """
        wanted = array("i", tokens[:-1])
        best: tuple[SavedPrefix, int] | None = None
        for prefix in self._alike(wanted):
            n_known = len(prefix.tokens)
            n_common = common_prefix(prefix.tokens, wanted)
            gain = n_common - n_resident
            if (
                gain < prefix.min_gain
                or n_known > prefix.max_excess * gain
                or (self.whole and n_common < n_known)
            ):
                continue
            if best is None or _rank(prefix, n_common) > _rank(*best):
                best = prefix, n_common
        return best

    def worth_parking(self, cache: IdleCache) -> list[int]:
        """Return the tokens of an idle cache whose state to copy; none: it need not be.

        It is too short, or kept already but for some last tokens.
        """
        tokens = self._worth_saving(cache)
        packed = array("i", tokens)
        alike = self._alike(packed)
        if len(tokens) < MIN_PARKED or any(
            self._serves(one, packed, MIN_PARKED_GAIN) for one in alike
        ):
            return []
        return tokens

    def covered(self, tokens: Sequence[int]) -> list[SavedPrefix]:
        """Return what is parked and needless beside a state of these tokens."""
        packed = SavedPrefix("", array("i", tokens), 0, is_parked=True)
        alike = self._alike(packed.tokens)
        return [
            one
            for one in alike
            if one.is_parked and self._serves(packed, one.tokens, MIN_PARKED_GAIN)
        ]

    def choose_saves(self, caches: Iterable[IdleCache]) -> list[Save]:
        """Return what to save of the idle caches, in their order, and of what is parked.

        1. Too short, or on disk but for some last tokens: not saved.
        2. The beginning of a longer one, but for such: not saved either, where it can be cut
           from that.
        3. Anything else is, and covers the files of its own beginnings.

        A state that goes on from its end alone is saved at the end of the prompt, less its last
        token, which is computed in any case: there the same prompt again and the next one of a
        conversation go on.
        """
        saves = self._candidates(caches)
        on_disk = [prefix for prefix in self if not prefix.is_parked]
        known = [*on_disk]
        chosen: dict[int, Save] = {}
        for index in sorted(range(len(saves)), key=lambda i: len(saves[i].tokens), reverse=True):
            tokens = array("i", saves[index].tokens)
            if len(tokens) < MIN_SAVED or any(self._serves(one, tokens, MIN_GAIN) for one in known):
                continue
            saved = SavedPrefix("", tokens, 0)
            covers = [one.name for one in on_disk if self._serves(saved, one.tokens, MIN_GAIN)]
            chosen[index] = replace(saves[index], covers=tuple(covers))
            known.append(saved)
        return [save for _, save in sorted(chosen.items())]

    def _candidates(self, caches: Iterable[IdleCache]) -> list[Save]:
        """Return the caches, and behind them what is parked, the last used first.

        A parked copy of a cache stands in its place: it is written at once, cells that are
        strewn two bytes at a time.
        """
        saves: list[Save] = []
        parked = [prefix for prefix in reversed(self._prefixes.values()) if prefix.is_parked]
        for cache in caches:
            tokens = self._worth_saving(cache)
            packed = array("i", tokens)
            twin = next((one for one in parked if one.tokens == packed), None)
            saves.append(Save(cache.slot, tokens) if twin is None else _save_parked(twin))
            if twin is not None:
                parked.remove(twin)
        return [*saves, *map(_save_parked, parked)]

    def _worth_saving(self, cache: IdleCache) -> list[int]:
        if self.whole and self._can_cut:
            return cache.tokens[: max(0, cache.n_prompt - 1)]
        return cache.tokens

    def _serves(self, state: SavedPrefix, tokens: array[int], n_lost: int) -> bool:
        """Whether a state is restored for all of these tokens but fewer than the last `n_lost`."""
        if self.whole:
            return state.tokens == tokens
        n_least = len(tokens) - n_lost + 1
        return n_least >= state.min_gain and state.tokens[:n_least] == tokens[:n_least]


def _head(tokens: array[int]) -> bytes:
    return tokens[:MIN_PARKED_GAIN].tobytes()


def _rank(prefix: SavedPrefix, n_common: int) -> tuple[int, bool, int]:
    return n_common, prefix.is_parked, -len(prefix.tokens)


def _save_parked(prefix: SavedPrefix) -> Save:
    return Save(None, prefix.tokens.tolist(), parked=prefix)


class StoredFile(msgspec.Struct, frozen=True):
    """A file of any model's saved prefixes, or what a model has parked."""

    path: str
    n_bytes: int
    # Seconds since the epoch: when it was saved or last restored.
    used_s: float


def plan_room(
    files: Iterable[StoredFile], *, n_new: int, limit: int, n_free: int, reserve: int
) -> list[StoredFile] | None:
    """Return the files to remove for `n_new` more bytes, the least recently used first.

    All files together may take `limit` bytes, and of the disk's or RAM's `n_free` bytes `reserve`
    are left. None: there is no room, whatever is removed.
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
