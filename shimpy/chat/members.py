"""The insides of JSON objects as grammar rules."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from shimpy.chat.gbnf import Rules, char_class, literal

MAX_KEY_CHARS = 20_000


def members(rules: Rules, pairs: Mapping[str, str], required: frozenset[str], other: str) -> str:
    """Return the expression for the pairs in their order, with or without those not required.

    `pairs` are the rules of the named pairs, `other` that of any other pair; "": there is none.

    From the back to the front there are two expressions for what follows: `after` where a
    pair was written, so that it begins with a comma, and `first` where none was.
    """
    after = f'("," ws {other})*' if other else ""
    first = f"({other} {after})?" if other else ""
    for name in reversed(tuple(pairs)):
        follow = rules.add("follow", after) if after else ""
        written = f"{pairs[name]} {follow}".rstrip()
        if name in required:
            first, after = written, f'"," ws {written}'
        else:
            rest = rules.add("first", first) if first else '""'
            first = f"({written} | {rest})"
            after = f'("," ws {pairs[name]})? {follow}'.rstrip()
    return first


def key_except(rules: Rules, names: Iterable[str]) -> str:
    """Return a rule for any key but these: one rule for each beginning of a name.

    Raises:
        ValueError: the names are too long for that.
    """
    texts = [json.dumps(name, ensure_ascii=False)[1:-1] for name in names]
    if sum(map(len, texts)) > MAX_KEY_CHARS:
        raise ValueError(f"the names of its properties have over {MAX_KEY_CHARS} characters")
    tree: dict[str, Any] = {}
    for text in texts:
        node = tree
        for c in text:
            node = node.setdefault(c, {})
        node[""] = {}
    root = rules.reserve("key")
    pending = [(root, tree)]
    while pending:
        rule, node = pending.pop()
        children = {c: (rules.reserve("key"), child) for c, child in node.items() if c}
        pending += children.values()
        options = [f"{literal(c)} {name}" for c, (name, _) in children.items()]
        rules.fill(rule, " | ".join([*options, *_ends(children, is_name="" in node)]))
    return rules.add("key", f'"\\"" {root}')


def _ends(children: Iterable[str], *, is_name: bool) -> list[str]:
    """Return how a key may leave the tree here: by another character, or by ending."""
    excluded = {0x22, 0x5C, 0x7F, *map(ord, children)}
    ranges = [(0, 0x1F), *((code, code) for code in sorted(excluded))]
    other = f'{char_class(ranges, negated=True)} char* "\\""'
    return [other] if is_name else [other, '"\\""']
