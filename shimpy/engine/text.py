"""From a request's tokens to its text: whole characters, and never a part of a stop string.

A stop string is found where it first becomes complete, whatever tokens it came in: of all
that end at the same character the longest counts. Text that may be the start of one is held
back until it is clear that it is none.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Generic, TypeVar

T = TypeVar("T")

_NewDecoder = codecs.getincrementaldecoder("utf-8")


class TextStream:
    """The text of one request; feed it each token's bytes.

    Bytes that are no UTF-8 become U+FFFD, as Python's "replace" handler does it.
    """

    __slots__ = (
        "_decode",
        "_firsts",
        "_held",
        "_lengths",
        "_prefixes",
        "_stops",
        "cut",
        "n_shown",
        "stop",
    )

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._decode = _NewDecoder("replace").decode
        self._stops = frozenset(stop for stop in stops if stop)
        self._firsts = frozenset(stop[0] for stop in self._stops)
        self._lengths = sorted({len(stop) for stop in self._stops})
        self._prefixes = {stop[:n] for stop in self._stops for n in range(1, len(stop))}
        self._held = ""
        # Characters given out so far.
        self.n_shown = 0
        # The stop string that ended the text, and all that was cut off with it.
        self.stop: str | None = None
        self.cut = ""

    @property
    def n_held(self) -> int:
        """Characters that are held back."""
        return len(self._held)

    def push(self, data: bytes) -> str:
        """Take a token's bytes and return the text that is now certain.

        Once `stop` is set the text is complete: push no more.
        """
        return self._show(self._decode(data))

    def finish(self) -> str:
        """Return what was held back, at the end of the text; nothing after a stop string.

        A character whose last bytes never came is left out.
        """
        text, self._held = self._held, ""
        self.n_shown += len(text)
        return text

    def _show(self, text: str) -> str:
        if self._held:
            text = self._held + text
            self._held = ""
        if self._firsts and not self._firsts.isdisjoint(text):
            text = self._screen(text)
        self.n_shown += len(text)
        return text

    def _screen(self, text: str) -> str:
        """Cut the text at a stop string, or hold back its end where one may begin."""
        cut = self._find_stop(text)
        if cut is not None:
            start, end = cut
            self.stop, self.cut = text[start:end], text[start:]
            return text[:start]
        if self._lengths[-1] > 1:
            for start in range(max(0, len(text) - self._lengths[-1] + 1), len(text)):
                if text[start] in self._firsts and text[start:] in self._prefixes:
                    self._held = text[start:]
                    return text[:start]
        return text

    def _find_stop(self, text: str) -> tuple[int, int] | None:
        """Return the span of the stop string that is complete first, the longest if several."""
        span = None
        best_end = len(text) + 1
        for start, character in enumerate(text):
            if start >= best_end:
                break
            if character not in self._firsts:
                continue
            for length in self._lengths:
                end = start + length
                if end >= best_end:
                    break
                if text[start:end] in self._stops:
                    span, best_end = (start, end), end
                    break
        return span


class Attached(Generic[T]):
    """Values that belong to tokens, given out no sooner than the tokens' text."""

    __slots__ = ("_items", "_stream")

    def __init__(self, stream: TextStream) -> None:
        self._stream = stream
        self._items: list[tuple[int, T]] = []

    def push(self, value: T) -> None:
        """Add the value of the token that is pushed to the stream next."""
        self._items.append((self._stream.n_shown + self._stream.n_held, value))

    def take(self) -> list[T]:
        """Return the values of the tokens whose text has begun to show, in order.

        After a stop string was found this leaves out the tokens that lie wholly in it.
        """
        n_shown = self._stream.n_shown
        is_open = self._stream.stop is None and not self._stream.n_held
        ready = [value for start, value in self._items if is_open or start < n_shown]
        del self._items[: len(ready)]
        return ready
