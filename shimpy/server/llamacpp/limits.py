"""llama.cpp's limits of an answer beyond its tokens: the time it takes, and its indentation.

Editors ask for them so that a completion comes soon and stays within its block. Source:
llama.cpp, tools/server/server-context.cpp, process_token.
"""

from __future__ import annotations

import msgspec


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Where an answer is cut; both count from its first new line on."""

    # Spaces and tabs that each further line has to begin with.
    n_indent: int = 0
    # Seconds since the prompt was read; 0: any time.
    max_predict_s: float = 0.0


class Cutter:
    """Lets the text of one answer through until it is over a limit."""

    def __init__(self, limits: Limits, *, begun_s: float) -> None:
        """`begun_s` is when the prompt was read, on any clock."""
        self._limits = limits
        self._begun_s = begun_s
        self._at_line_start = False
        self._indent = 0
        self.has_new_line = False
        self.is_cut = False

    def push(self, text: str, now_s: float) -> str:
        """Return what may be shown of more text; `is_cut` says whether it is the last."""
        end = self._find_outdent(text)
        if end is not None:
            self.is_cut = True
            return text[:end]
        limit_s = self._limits.max_predict_s
        if self.has_new_line and limit_s > 0 and now_s - self._begun_s > limit_s:
            self.is_cut = True
        return text

    def _find_outdent(self, text: str) -> int | None:
        """Return where a line begins to say something too far to the left."""
        for i, c in enumerate(text):
            if self._at_line_start:
                if c in " \t":
                    self._indent += 1
                    continue
                if self._indent < self._limits.n_indent:
                    return i
                self._at_line_start = False
            if c == "\n":
                self._at_line_start = self.has_new_line = True
                self._indent = 0
        return None
