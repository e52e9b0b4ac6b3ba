"""When an idle slot's cache is copied to RAM, and leaves the KV cache. Pure.

Without flash attention llama.cpp computes attention over all cells up to the last one in use,
whoever holds them: 320 idle cells of a 200M model take 140 ms of the 560 ms of a prompt of 256
tokens, and a tenth of each step. So while anything runs, idle slots are emptied whose caches are
kept elsewhere; a parked one comes back as any saved prefix does (engine.prefixes).

A copy takes 1/60 to 1/200 of the time that its tokens took to compute, and 1/8 where sequences
generated side by side: their values lie transposed, two bytes apart from each other. Hence:

1. Nothing has run for PATIENCE times as long as a copy takes: one cache after the other is copied,
   and stays where it is, so that whoever goes on from it finds it there. Few come in the midst of
   one then, be it 0.3 ms of a small model's chat or half a second of a long one.
2. Something runs or waits, and a cache was not copied yet: it is copied now, unless earlier
   copies took more than SHARE of the time since and more than it saves the prompts to come, or
   a first token is waited for and its cells fill up what that prompt attends to anyway
   (llama.cpp rounds that up). It stays until then.
3. Its slot is wanted: it is copied in any case, but in the latter case without an answer that is
   strewn.
4. A cache of a few tokens, or one that is parked or on disk already, is dropped without one.
"""

from __future__ import annotations

from typing import Final

from msgspec.structs import replace

from shimpy.engine.pace import LEAST_CHUNK
from shimpy.engine.sequence import IdleCache

PATIENCE: Final = 10
# A client that goes on at once has asked again by then.
_LEAST_QUIET_S: Final = 0.004
_MOST_QUIET_S: Final = 2.0
# Where no copy has told yet how long they take.
_FIRST_QUIET_S: Final = 0.02
# Of the time of what runs, the most that copies beside it take.
SHARE: Final = 0.04
# Of a prompt's time, what each idle cell adds at the least: 0.0008 with a 200M model. With larger
# ones it is less, but there a copy takes still less of the time.
_SLOWED: Final = 0.00025
# So many pieces are no matter.
_FEW_STREWN: Final = 16


def without_strewn(cache: IdleCache) -> IdleCache:
    """Return a cache, or the prompt's part of one whose answer is strewn."""
    if cache.n_strewn <= _FEW_STREWN:
        return cache
    return replace(cache, tokens=cache.tokens[: cache.n_prompt])


class Parking:
    """Keeps copies from taking more than their share."""

    def __init__(self) -> None:
        self._debt_s = 0.0
        # What a prompt's token took lately.
        self._token_s = 0.0
        # What the last copy took, by its tokens.
        self._copied_token_s: float | None = None

    def quiet_s(self, n_tokens: int) -> float:
        """Return for how long nothing has to run before a cache of `n_tokens` is copied."""
        if self._copied_token_s is None:
            return _FIRST_QUIET_S
        copy_s = n_tokens * self._copied_token_s
        return min(max(PATIENCE * copy_s, _LEAST_QUIET_S), _MOST_QUIET_S)

    def is_due(self, n_prefill: int, n_idle: int) -> bool:
        """Whether a copy may be made beside what runs.

        `n_prefill`: tokens of prompts to come, which attend to `n_idle` cells that nobody needs.
        """
        return self._debt_s <= _SLOWED * n_idle * self._token_s * n_prefill

    def on_batch(self, elapsed_s: float, n_prefill: int) -> None:
        """Note how long a batch took, and how many of its tokens were of prompts."""
        self._debt_s -= min(self._debt_s, SHARE * elapsed_s)
        if n_prefill >= LEAST_CHUNK:
            self._token_s = elapsed_s / n_prefill

    def on_copy(self, elapsed_s: float) -> None:
        """Note how long a copy took that something waited for."""
        self._debt_s += elapsed_s

    def on_kept(self, n_tokens: int, elapsed_s: float) -> None:
        """Note how long the copy of a cache of `n_tokens` took; not of one that came to nothing."""
        self._copied_token_s = elapsed_s / n_tokens

    def on_quiet(self) -> None:
        """Note that nothing runs: copies are free."""
        self._debt_s = 0.0
