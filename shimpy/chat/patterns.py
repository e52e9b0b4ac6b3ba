"""Regular expressions as grammar expressions for the inside of a JSON string.

Understood are literals, escapes, classes, groups, alternatives and counted repetition. What a
regular expression leaves open at its ends may be any text.
"""

from __future__ import annotations

import re

import msgspec

from shimpy.chat.gbnf import MAX_REPEAT, Rules, char_class, literal

MAX_PATTERN_CHARS = 2000
MAX_GROUP_DEPTH = 32
_LAST = 0x10FFFF

Ranges = tuple[tuple[int, int], ...]

_DIGIT: Ranges = ((ord("0"), ord("9")),)
_WORD: Ranges = (*_DIGIT, (ord("A"), ord("Z")), (ord("_"), ord("_")), (ord("a"), ord("z")))
_SPACE: Ranges = (
    (9, 13),
    (32, 32),
    (0xA0, 0xA0),
    (0x2028, 0x2029),
    (0x3000, 0x3000),
    (0xFEFF, 0xFEFF),
)
_CLASSES = {"d": _DIGIT, "w": _WORD, "s": _SPACE}
_CONTROL = {"n": 10, "r": 13, "t": 9, "f": 12, "v": 11, "b": 8, "0": 0}
_JSON_ESCAPES = {8: "\\b", 9: "\\t", 10: "\\n", 12: "\\f", 13: "\\r", 34: '\\"', 92: "\\\\"}


class Piece(msgspec.Struct, frozen=True):
    """An expression, and how many characters it stands for; `high` None: no limit."""

    text: str
    low: int
    high: int | None


def pattern_piece(rules: Rules, pattern: str) -> Piece:
    """Return the expression for the texts in which the pattern is found, without quotes.

    Raises:
        ValueError: it uses what isn't understood; the message says what and where.
    """
    if len(pattern) > MAX_PATTERN_CHARS:
        raise ValueError(f"it has {len(pattern)} characters; the limit is {MAX_PATTERN_CHARS}")
    return _Reader(rules, pattern).read()


class _Reader:
    def __init__(self, rules: Rules, pattern: str) -> None:
        self._rules = rules
        self._pattern = pattern
        self._at = 0

    def read(self) -> Piece:
        piece = self._alternatives(depth=0)
        if self._at < len(self._pattern):
            raise self._error("a ) without a (")
        return piece

    def _error(self, what: str) -> ValueError:
        return ValueError(f"{what} at character {self._at} of {self._pattern!r}")

    def _peek(self) -> str:
        return self._pattern[self._at : self._at + 1]

    def _alternatives(self, depth: int) -> Piece:
        if depth > MAX_GROUP_DEPTH:
            raise self._error(f"groups nested over {MAX_GROUP_DEPTH} deep")
        pieces = [self._sequence(depth)]
        while self._peek() == "|":
            self._at += 1
            pieces.append(self._sequence(depth))
        if len(pieces) == 1:
            return pieces[0]
        highs = [piece.high for piece in pieces]
        return Piece(
            "(" + " | ".join(piece.text for piece in pieces) + ")",
            min(piece.low for piece in pieces),
            None if None in highs else max(high for high in highs if high is not None),
        )

    def _sequence(self, depth: int) -> Piece:
        pieces = []
        if self._peek() == "^":
            self._at += 1
        elif depth == 0:
            pieces.append(Piece("char*", 0, None))
        closed = False
        while (c := self._peek()) and c not in "|)":
            if closed:
                raise self._error("text after a $")
            if c == "$":
                self._at += 1
                closed = True
            else:
                pieces.append(self._repeated(depth))
        if depth == 0 and not closed:
            pieces.append(Piece("char*", 0, None))
        return _joined(pieces)

    def _repeated(self, depth: int) -> Piece:
        piece = self._atom(depth)
        counts = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(self._peek())
        if counts is not None:
            self._at += 1
        elif match := re.compile(r"\{(\d{1,6})(,?)(\d{0,6})\}").match(self._pattern, self._at):
            low, comma, high = match.groups()
            self._at = match.end()
            counts = (int(low), int(high) if high else None if comma else int(low))
        if counts is None:
            return piece
        if self._peek() in ("?", "+") and self._peek():
            raise self._error("a lazy or possessive repetition")
        low_count, high_count = counts
        if high_count is not None and high_count < low_count:
            raise self._error("a repetition whose numbers are the wrong way round")
        if max(low_count, high_count or 0) > MAX_REPEAT:
            raise self._error(f"a repetition over {MAX_REPEAT} times")
        item = piece.text if re.fullmatch(r"[a-zA-Z0-9-]+", piece.text) else f"({piece.text})"
        return Piece(
            self._rules.repeat(item, low_count, high_count),
            piece.low * low_count,
            None if piece.high is None or high_count is None else piece.high * high_count,
        )

    def _atom(self, depth: int) -> Piece:
        c = self._peek()
        if c == "(":
            return self._group(depth)
        if c in "*+?{":
            raise self._error(f"a {c} with nothing to repeat")
        if c == "^":
            raise self._error("a ^ inside")
        self._at += 1
        if c == ".":
            return _one(_inverted(((10, 10), (13, 13))))
        if c == "[":
            return self._set()
        if c == "\\":
            found = self._escape()
            return _one(found) if isinstance(found, tuple) else _one(((found, found),))
        return _one(((ord(c), ord(c)),))

    def _group(self, depth: int) -> Piece:
        self._at += 1
        if self._peek() == "?":
            match = re.compile(r"\?(?::|P?<[A-Za-z_]\w{0,63}>)").match(self._pattern, self._at)
            if match is None:
                raise self._error("a look-around or flag")
            self._at = match.end()
        piece = self._alternatives(depth + 1)
        if self._peek() != ")":
            raise self._error("a ( without a )")
        self._at += 1
        return Piece(f"({piece.text})", piece.low, piece.high)

    def _escape(self) -> int | Ranges:
        """Read what follows a backslash: a character, or a class of them."""
        c = self._peek()
        self._at += 1
        if c in _CLASSES:
            return _CLASSES[c]
        if c and c.lower() in _CLASSES:
            return _inverted(_CLASSES[c.lower()])
        if c in _CONTROL and c != "b":
            return _CONTROL[c]
        for kind, n in (("x", 2), ("u", 4)):
            if c == kind:
                digits = self._pattern[self._at : self._at + n]
                if re.fullmatch(rf"[0-9a-fA-F]{{{n}}}", digits) is None:
                    raise self._error(f"an escape \\{kind} without {n} digits")
                self._at += n
                return int(digits, 16)
        if not c or c.isalnum():
            raise self._error(f"an escape \\{c}")
        return ord(c)

    def _set(self) -> Piece:
        negated = self._peek() == "^"
        self._at += negated
        ranges: list[tuple[int, int]] = []
        first = True
        while (c := self._peek()) != "]" or first:
            if not c:
                raise self._error("a [ without a ]")
            first = False
            low = self._set_member()
            if isinstance(low, tuple):
                ranges += low
                continue
            high: int | Ranges = low
            if self._peek() == "-" and self._pattern[self._at + 1 : self._at + 2] not in ("]", ""):
                self._at += 1
                high = self._set_member()
            if isinstance(high, tuple) or high < low:
                raise self._error("a range with its ends the wrong way round")
            ranges.append((low, high))
        self._at += 1
        return _one(_inverted(tuple(ranges)) if negated else tuple(ranges))

    def _set_member(self) -> int | Ranges:
        c = self._peek()
        self._at += 1
        if c == "\\":
            if self._peek() == "b":
                self._at += 1
                return 8
            return self._escape()
        return ord(c)


def _joined(pieces: list[Piece]) -> Piece:
    highs = [piece.high for piece in pieces]
    return Piece(
        " ".join(piece.text for piece in pieces if piece.text) or '""',
        sum(piece.low for piece in pieces),
        None if None in highs else sum(high for high in highs if high is not None),
    )


def _merged(ranges: Ranges) -> Ranges:
    result: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if result and low <= result[-1][1] + 1:
            result[-1] = (result[-1][0], max(high, result[-1][1]))
        else:
            result.append((low, high))
    return tuple(result)


def _inverted(ranges: Ranges) -> Ranges:
    result = []
    start = 0
    for low, high in _merged(ranges):
        if start < low:
            result.append((start, low - 1))
        start = high + 1
    if start <= _LAST:
        result.append((start, _LAST))
    return tuple(result)


def _one(ranges: Ranges) -> Piece:
    """Return the expression for one character of these, written as JSON writes it."""
    plain: list[tuple[int, int]] = []
    options: list[str] = []
    wanted = _merged(ranges)
    for low, high in wanted:
        # JSON strings escape quotes, backslashes and what lies below the space.
        for start, end in ((32, 33), (35, 91), (93, 126), (128, 0xD7FF), (0xE000, _LAST)):
            if max(low, start) <= min(high, end):
                plain.append((max(low, start), min(high, end)))
        options += [
            literal(escape) for code, escape in _JSON_ESCAPES.items() if low <= code <= high
        ]
    if plain:
        options.insert(0, char_class(plain))
    if not options:
        raise ValueError("a class of characters that JSON can't write plainly")
    return Piece(options[0] if len(options) == 1 else "(" + " | ".join(options) + ")", 1, 1)
