"""Finds marks in a text that comes in pieces."""

from __future__ import annotations

import re
from collections.abc import Iterable


class Marks:
    """A set of strings to look for."""

    def __init__(self, marks: Iterable[str]) -> None:
        # Longest first: of two that begin at one place the longer is meant.
        self._marks = sorted({mark for mark in marks if mark}, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, self._marks)) or r"(?!)")
        self._prefixes = {mark[:n] for mark in self._marks for n in range(1, len(mark))}
        self._longest = max((len(mark) for mark in self._marks), default=0)

    def __bool__(self) -> bool:
        return bool(self._marks)

    def find(self, text: str) -> tuple[int, str] | None:
        """Return the first mark and where it begins."""
        match = self._pattern.search(text)
        return None if match is None else (match.start(), match.group())

    def held(self, text: str) -> int:
        """Return how many characters at the end may be the beginning of a mark."""
        for n in range(min(self._longest - 1, len(text)), 0, -1):
            if text[-n:] in self._prefixes:
                return n
        return 0
