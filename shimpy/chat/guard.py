"""Tells a conversation's own text from the template's, so that it can't forge control tokens.

Before rendering, the first and last character of whatever could be (a part of) a control token
in the conversation's text is replaced by a twin: one private-use character for one character,
so that lengths, trimming, slicing and JSON stay as they were. After rendering, the twins are
turned back, and a control token in the output that holds one was not written by the template:
it becomes a piece of its own in which the tokenizer looks for no control tokens. That also
catches a token whose parts come from two places, or that closes up when the template cuts
something out of a text.

A template may look for a string in a text (`content.split('</think>')`). Where the text holds
such a string, it is left alone, unless it is a whole control token.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from shimpy.chat.budget import InputDict, InputList
from shimpy.errors import UserError
from shimpy.protocol.messages import PromptPart, Text

MAX_DEPTH = 64
_PRIVATE_USE = (range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE), range(0xE000, 0xF900))
_PRIVATE = re.compile("[\ue000-\uf8ff\U000f0000-\U000ffffd\U00100000-\U0010fffd]")


class ControlTokens:
    """The texts of a vocabulary's control tokens, made ready for finding."""

    def __init__(self, tokens: Iterable[str]) -> None:
        # Whitespace alone can't be told from layout, and no vocabulary means it as control.
        self._tokens = frozenset(token for token in tokens if token.strip())
        # By their first two characters, as most begin with the same one.
        self._lengths: dict[str, set[int]] = {}
        for token in self._tokens:
            if len(token) > 1:
                self._lengths.setdefault(token[:2], set()).add(len(token))
        self._single = (1,) if any(len(token) == 1 for token in self._tokens) else ()
        ends = {token[0] for token in self._tokens} | {token[-1] for token in self._tokens}
        # Letters and quotes mean something to templates; a token that begins or ends with
        # one is caught when it is whole.
        self.edges = frozenset(c for c in ends if not (c.isalnum() or c.isspace() or c in "\"'\\"))
        self._first = _any_of({token[0] for token in self._tokens})
        self._edge = _any_of(self.edges)

    def __contains__(self, text: str) -> bool:
        return text in self._tokens

    def __iter__(self) -> Iterator[str]:
        return iter(self._tokens)

    def may_matter(self, text: str) -> bool:
        """Whether the text holds a first or last character of a control token."""
        return bool(self._edge.search(text) or self._first.search(text))

    def find(self, text: str) -> list[tuple[int, int]]:
        """Return the [start, end) of every control token in the text, overlapping ones too."""
        spans = []
        for match in self._first.finditer(text):
            start = match.start()
            for length in (*self._lengths.get(text[start : start + 2], ()), *self._single):
                end = start + length
                if end <= len(text) and text[start:end] in self._tokens:
                    spans.append((start, end))
        return spans

    def find_edges(self, text: str) -> Iterable[int]:
        """Yield where the text has a character that begins or ends control tokens."""
        return (match.start() for match in self._edge.finditer(text))


def _any_of(characters: Iterable[str]) -> re.Pattern[str]:
    joined = "".join(re.escape(c) for c in sorted(characters))
    return re.compile(f"[{joined}]" if joined else r"(?!)")


class Guard:
    """Marks the texts of one conversation and finds them again in what was rendered."""

    def __init__(self, control: ControlTokens, literals: Iterable[str]) -> None:
        self._control = control
        self._literals = [text for text in literals if any(c in control.edges for c in text)]
        self._twins: dict[str, str] = {}
        self._taken: set[str] = set()
        self.n_chars = 0

    def reserve(self, *values: object) -> None:
        """Take note of the private-use characters in these values: they can't be twins."""
        stack: list[object] = list(values)
        while stack:
            value = stack.pop()
            if isinstance(value, str):
                if not value.isascii():
                    self._taken.update(_PRIVATE.findall(value))
            elif isinstance(value, Mapping):
                stack += [*value.keys(), *value.values()]
            elif isinstance(value, (list, tuple)):
                stack += value

    def protect(self, text: str) -> str:
        """Return the text for the template, of the same length."""
        self.n_chars += len(text)
        if not self._control.may_matter(text):
            return text
        whole = self._control.find(text)
        edges = set(self._control.find_edges(text)) - self._looked_for(text)
        for start, end in whole:
            body = text[start:end]
            edges.add(start + len(body) - len(body.lstrip()))
            edges.add(start + len(body.rstrip()) - 1)
        if not edges:
            return text
        characters = list(text)
        for i in edges:
            characters[i] = self._twin(characters[i])
        return "".join(characters)

    def protect_value(self, value: Any, depth: int = 0) -> Any:
        """Return a JSON value with all its strings protected, keys too.

        Raises:
            UserError: it is nested too deeply.
        """
        if isinstance(value, str):
            return self.protect(value)
        self.n_chars += 1
        if depth > MAX_DEPTH:
            raise UserError(f"the tools or their arguments are nested over {MAX_DEPTH} levels deep")
        if isinstance(value, Mapping):
            return InputDict(
                (self.protect(str(key)), self.protect_value(item, depth + 1))
                for key, item in value.items()
            )
        if isinstance(value, (list, tuple)):
            return InputList(self.protect_value(item, depth + 1) for item in value)
        return value

    def split(self, rendered: str) -> list[PromptPart]:
        """Return the rendered text as parts, the conversation's own control tokens apart."""
        marked = {match.start() for match in _any_of(self._twins.values()).finditer(rendered)}
        if not marked:
            return [Text(_utf8(rendered), parse_special=True)] if rendered else []
        plain = rendered
        for c, twin in self._twins.items():
            plain = plain.replace(twin, c)
        forged = bytearray(len(plain))
        genuine: list[tuple[int, int]] = []
        for start, end in self._control.find(plain):
            if marked.isdisjoint(range(start, end)):
                genuine.append((start, end))
            else:
                forged[start:end] = b"\1" * (end - start)
        for start, end in genuine:
            forged[start:end] = bytes(end - start)
        return _parts(plain, forged)

    def _looked_for(self, text: str) -> set[int]:
        """Return the places in the text that the template may look for."""
        places: set[int] = set()
        for literal in self._literals:
            start = text.find(literal)
            while start >= 0:
                places.update(range(start, start + len(literal)))
                start = text.find(literal, start + 1)
        return places

    def _twin(self, character: str) -> str:
        twin = self._twins.get(character)
        if twin is None:
            twin = self.spare()
            self._twins[character] = twin
        return twin

    def spare(self) -> str:
        """Return a private-use character that is nowhere in the conversation."""
        for block in _PRIVATE_USE:
            for code in block:
                if (c := chr(code)) not in self._taken:
                    self._taken.add(c)
                    return c
        raise UserError("the conversation uses every private-use character of Unicode")


def _parts(plain: str, forged: bytearray) -> list[PromptPart]:
    parts: list[PromptPart] = []
    start = 0
    while start < len(plain):
        other = forged.find(1 - forged[start], start)
        end = len(plain) if other < 0 else other
        parts.append(Text(_utf8(plain[start:end]), parse_special=not forged[start]))
        start = end
    return parts


def _utf8(text: str) -> str:
    """Return the text with lone surrogates replaced: JSON can hold them, UTF-8 can't."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
