"""Finds where a call's text ends, while it is still being written.

A finder is fed the whole text so far and looks at each character once.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Protocol

from shimpy.chat.formats import ToolSyntax

# The text can't become a call any more.
HOPELESS = -1
MAX_NAME_CHARS = 128


class EndFinder(Protocol):
    """Looks for the end of one call."""

    def find(self, text: str) -> int | None:
        """Return the index behind the call; None: not there yet; HOPELESS: it never will be."""


class JsonEnd:
    """Ends behind one JSON object or array."""

    def __init__(self, start: int = 0) -> None:
        self._at = start
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def find(self, text: str) -> int | None:
        """As EndFinder says."""
        while self._at < len(text):
            c = text[self._at]
            self._at += 1
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped = c == "\\"
                self._in_string = c != '"'
            elif c == '"':
                self._in_string = True
            elif c in "{[":
                self._depth += 1
            elif c in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return self._at
            if self._depth == 0 and not c.isspace():
                return HOPELESS
        return None


class MarkEnd:
    """Ends before a closing mark; hopeless when the opening one comes again."""

    def __init__(self, syntax: ToolSyntax, is_plausible: Callable[[str], bool]) -> None:
        self._syntax = syntax
        self._is_plausible = is_plausible
        self._at = 0
        self._checked = False

    def find(self, text: str) -> int | None:
        """As EndFinder says."""
        if not self._checked:
            if not self._is_plausible(text):
                return HOPELESS
            # A long beginning has shown what it is.
            self._checked = len(text) > MAX_NAME_CHARS + 16
        end = text.find(self._syntax.closer, self._at)
        again = text.find(self._syntax.opener, self._at, end if end >= 0 else len(text))
        if again >= 0:
            return HOPELESS
        if end >= 0:
            return end
        self._at = max(0, len(text) - max(len(self._syntax.closer), len(self._syntax.opener)))
        return None


class NamedEnd:
    """Ends behind the JSON that follows a name: Mistral's `name[ARGS]{...}`."""

    def __init__(self) -> None:
        self._json: JsonEnd | None = None

    def find(self, text: str) -> int | None:
        """As EndFinder says."""
        if self._json is None:
            match = _NAMED_START.match(text)
            if match is None:
                return None if _NAMED_PREFIX.fullmatch(text) else HOPELESS
            self._json = JsonEnd(match.end() - 1)
        return self._json.find(text)


class NoEnd:
    """Ends with the output."""

    def find(self, text: str) -> int | None:  # noqa: ARG002 - the others look at it
        """As EndFinder says."""
        return None


# Spaces are counted, lest a long run of them be matched in every possible way.
_NAME = rf"\s{{0,8}}[^\s\[\]{{}}<>]{{0,{MAX_NAME_CHARS}}}\s{{0,8}}"
_NAMED_START = re.compile(_NAME + r"(?:\[CALL_ID\][^\[\]{}]{0,64})?(?:\[ARGS\])?\s{0,8}\{")
_NAMED_PREFIX = re.compile(
    _NAME + r"(?:\[[A-Z_]{0,8}(?:\][^\[\]{}]{0,64}(?:\[[A-Z]{0,4}\]?\s{0,8})?)?)?"
)
# What may stand at the beginning of a tag's body: a tag, or GLM's name before one.
_GLM_PREFIX = re.compile(rf"\s{{0,8}}[^\s<>]{{1,{MAX_NAME_CHARS}}}\s{{0,8}}(?:<.*)?", re.DOTALL)


def find_end(syntax: ToolSyntax, text: str) -> EndFinder | None:
    """Return the finder for a call that begins as `text`; None: too short to tell."""
    start = text.lstrip()[:1]
    match syntax.body:
        case "json":
            return JsonEnd()
        case "deepseek" | "kimi" | "gemma" | "invoke":
            return MarkEnd(syntax, lambda _: True)
        case "function":
            return MarkEnd(syntax, _is_function)
        case "tags" | "named" | "python" if not start:
            return None
        case "tags":
            return JsonEnd() if start in "{[" else MarkEnd(syntax, _is_tags)
        case "named":
            return JsonEnd() if start in "{[" else NamedEnd()
        case "python":
            return JsonEnd() if start in "{[" else NoEnd()


def _is_tags(text: str) -> bool:
    body = text.lstrip()
    if body.startswith("<"):
        return body.startswith("<function=") or "<function=".startswith(body)
    return _GLM_PREFIX.fullmatch(text) is not None


def _is_function(text: str) -> bool:
    """Whether the text may be what follows `<function=`."""
    name, end, _ = text.partition(">")
    if len(name) > MAX_NAME_CHARS or re.search(r"[\s<]", name):
        return False
    return bool(name) or not end
