"""GBNF, llama.cpp's grammar notation: rules put together from parts.

Source: https://github.com/ggml-org/llama.cpp/blob/master/grammars/README.md
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from shimpy.errors import UserError

MAX_GRAMMAR_CHARS = 1_000_000
MAX_REPEAT = 100_000
# llama.cpp refuses a repetition of 2,000 or more; larger ones are made of blocks.
_BLOCK = 100
_MAX_DIRECT = 1000

_ESCAPES = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}
_CLASS_ESCAPES = {"\\": "\\\\", "]": "\\]", "[": "\\[", "\n": "\\n", "\r": "\\r", "\t": "\\t"}

# Bounded, so that no model can write white space for ever.
_SPACE = r'" "? | "\n" " "{0,20}'
JSON_RULES = {
    "ws": _SPACE,
    # No escaped surrogates: alone they are no characters, and pairs are never needed.
    "char": r'[^"\\\x7F\x00-\x1F] | "\\" (["\\/bfnrt] | "u" code)',
    "hex": "[0-9a-fA-F]",
    "code": "[0-9a-ce-fA-CE-F] hex{3} | [dD] [0-7] hex{2}",
    "string": r'"\"" char* "\""',
    "integer": '"-"? ("0" | [1-9] [0-9]{0,15})',
    "number": 'integer ("." [0-9]{1,16})? ([eE] [-+]? [0-9]{1,2})?',
    "boolean": '"true" | "false"',
    "null": '"null"',
    "value": "object | array | string | number | boolean | null",
    "object": r'"{" ws (pair ("," ws pair)*)? ws "}"',
    "pair": r'string ws ":" ws value',
    "array": r'"[" ws (value ("," ws value)*)? ws "]"',
}


def render(rules: dict[str, str]) -> str:
    """Return the grammar's text.

    Raises:
        UserError: it is too large.
    """
    text = "".join(f"{name} ::= {body}\n" for name, body in rules.items())
    if len(text) > MAX_GRAMMAR_CHARS:
        raise UserError(
            f"the grammar of the schema has {len(text)} characters; the limit is "
            f"{MAX_GRAMMAR_CHARS}: make the schema smaller"
        )
    return text


class Rules:
    """The rules of a grammar that is being put together."""

    def __init__(self) -> None:
        self._rules: dict[str, str] = {"root": ""}

    def set_root(self, body: str) -> None:
        """Say what a whole text is."""
        self._rules["root"] = body

    def add(self, name: str, body: str) -> str:
        """Add a rule under a name like `name` and return the name."""
        name = self.reserve(name)
        self._rules[name] = body
        return name

    def reserve(self, name: str) -> str:
        """Return a name like `name` that no rule has; `fill` gives it a body."""
        base = re.sub(r"[^a-zA-Z0-9]+", "-", name).strip("-")[:40] or "rule"
        if base in JSON_RULES or base == "root":
            base += "-"
        unique, n = base, 1
        while unique in self._rules:
            n += 1
            unique = f"{base}-{n}"
        self._rules[unique] = ""
        return unique

    def fill(self, name: str, body: str) -> None:
        """Give a reserved rule its body."""
        self._rules[name] = body

    def text(self) -> str:
        """Return the grammar, with the rules of JSON that it uses."""
        rules = dict(self._rules)
        pending = list(rules.values())
        while pending:
            for name in re.findall(r"[a-z][a-z0-9]*", strip_literals(pending.pop())):
                if name in JSON_RULES and name not in rules:
                    rules[name] = JSON_RULES[name]
                    pending.append(JSON_RULES[name])
        return render(rules)

    def repeat(self, item: str, low: int, high: int | None) -> str:
        """Return an expression for `low` to `high` of `item`, which is one symbol or group.

        Raises:
            ValueError: the numbers are over MAX_REPEAT.
        """
        if max(low, high or 0) > MAX_REPEAT:
            raise ValueError(f"it repeats {max(low, high or 0)} times; the limit is {MAX_REPEAT}")
        if high is None:
            parts = [self._exactly(item, low), f"{item}*"]
            return " ".join(part for part in parts if part)
        if high == 0:
            return '""'
        parts = [self._exactly(item, low), self._at_most(item, high - low)]
        return " ".join(part for part in parts if part)

    def _exactly(self, item: str, n: int) -> str:
        if n <= _MAX_DIRECT:
            return {0: "", 1: item}.get(n, f"{item}{{{n}}}")
        block = self.add("block", f"{item}{{{_BLOCK}}}")
        rest = self._exactly(item, n % _BLOCK)
        return f"{block}{{{n // _BLOCK}}} {rest}".rstrip()

    def _at_most(self, item: str, n: int) -> str:
        if n <= _MAX_DIRECT:
            return {0: "", 1: f"{item}?"}.get(n, f"{item}{{0,{n}}}")
        block = self.add("block", f"{item}{{{_BLOCK}}}")
        n_blocks, rest = divmod(n, _BLOCK)
        last = (
            f" | {block}{{{n_blocks}}} {item}{{0,{rest}}}" if rest else f" | {block}{{{n_blocks}}}"
        )
        return f"({block}{{0,{n_blocks - 1}}} {item}{{0,{_BLOCK - 1}}}{last})"


def strip_literals(body: str) -> str:
    """Return a rule's body without its quoted texts and character classes."""
    return re.sub(r'"(?:[^"\\]|\\.)*"|\[(?:[^\]\\]|\\.)*\]', " ", body)


def literal(text: str) -> str:
    """Return the expression for exactly this text."""
    return '"' + "".join(_ESCAPES.get(c) or _plain(c) for c in text) + '"'


def char_class(ranges: Iterable[tuple[int, int]], *, negated: bool = False) -> str:
    """Return the expression for one character of (or not of) these ranges of code points."""
    inner = "".join(
        _class_char(low) if low == high else f"{_class_char(low)}-{_class_char(high)}"
        for low, high in ranges
    )
    return f"[{'^' if negated else ''}{inner}]"


def _class_char(code: int) -> str:
    c = chr(code)
    if c in "-^":
        return f"\\x{code:02X}"
    return _CLASS_ESCAPES.get(c) or _plain(c)


def _plain(c: str) -> str:
    if c.isascii() and c.isprintable():
        return c
    return f"\\U{ord(c):08X}"


def until(rules: Rules, closer: str) -> str:
    """Return a rule for any text up to and with the first `closer`.

    One rule for each beginning of `closer` that has been read, as in Knuth, Morris and Pratt.
    """
    names = [rules.reserve(f"until-{n}") for n in range(len(closer))]
    alphabet = sorted(set(closer))
    for n, name in enumerate(names):
        options = []
        others: list[int] = []
        for c in alphabet:
            state = _next_state(closer, n, c)
            if state == len(closer):
                options.append(literal(c))
            elif state:
                options.append(f"{literal(c)} {names[state]}")
            if state:
                others.append(ord(c))
        rest = char_class(((code, code) for code in others), negated=True)
        rules.fill(name, " | ".join([*options, f"{rest} {names[0]}"]))
    return names[0]


def _next_state(closer: str, n_read: int, c: str) -> int:
    """Return how much of `closer` the text ends with, after `n_read` of it and then `c`."""
    text = closer[:n_read] + c
    return next(n for n in range(min(len(text), len(closer)), -1, -1) if text.endswith(closer[:n]))


JSON_GRAMMAR = render({"root": "object", **JSON_RULES})
