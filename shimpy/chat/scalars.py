"""The strings and numbers of a JSON schema as grammar rules."""

from __future__ import annotations

from fractions import Fraction

from shimpy.chat.gbnf import Rules
from shimpy.chat.patterns import pattern_piece
from shimpy.chat.places import Place, Schema, counts
from shimpy.chat.ranges import Bounds, integer_rule, number_rule

_DATE = (
    '[0-9]{4} "-" (("0" [13578] | "1" [02]) "-" ("0" [1-9] | [12] [0-9] | "3" [01])'
    ' | ("0" [469] | "11") "-" ("0" [1-9] | [12] [0-9] | "30")'
    ' | "02-" ("0" [1-9] | "1" [0-9] | "2" [0-8]))'
)
_TIME = (
    '([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9] ":" [0-5] [0-9] ("." [0-9]{1,9})?'
    ' ("Z" | [+-] ([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9])'
)
_FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f'{_DATE} "T" {_TIME}',
    "uuid": 'hex{8} "-" hex{4} "-" hex{4} "-" hex{4} "-" hex{12}',
}


def string_rule(rules: Rules, schema: Schema, place: Place) -> str:
    """Return the rule for the strings of a schema.

    Raises:
        UserError: its pattern isn't understood, or it is too long.
    """
    low, high = counts(schema, "minLength", "maxLength", place)
    if "pattern" in schema:
        return _pattern(rules, schema["pattern"], low, high, place.beside("pattern"))
    known = schema.get("format")
    if isinstance(known, str) and known in _FORMATS:
        return rules.add(known, f'"\\"" {_FORMATS[known]} "\\""')
    if not low and high is None:
        return "string"
    return rules.add("str", f'"\\"" {repeat(rules, "char", low, high, place)} "\\""')


def _pattern(rules: Rules, pattern: object, low: int, high: int | None, place: Place) -> str:
    if not isinstance(pattern, str):
        raise place.error("a pattern is a string")
    try:
        piece = pattern_piece(rules, pattern)
    except ValueError as error:
        raise place.error(str(error)) from error
    if piece.low < low or (high is not None and (piece.high is None or piece.high > high)):
        raise place.error(
            f"it matches texts of {piece.low} to {piece.high or 'any number of'} characters, "
            "beyond minLength and maxLength: say the length in the pattern"
        )
    return rules.add("pattern", f'"\\"" {piece.text} "\\""')


def number_or_integer_rule(rules: Rules, kind: str, schema: Schema, place: Place) -> str:
    """Return the rule for the numbers of a schema; `kind` is "number" or "integer".

    Raises:
        UserError: there are none, or a bound has too many digits.
    """
    low, low_open = _bound(schema, "minimum", "exclusiveMinimum", place)
    high, high_open = _bound(schema, "maximum", "exclusiveMaximum", place)
    if low is None and high is None:
        return kind
    bounds = Bounds(low=low, high=high, low_open=low_open, high_open=high_open)
    make = integer_rule if kind == "integer" else number_rule
    try:
        return make(rules, bounds)
    except ValueError as error:
        raise place.error(str(error)) from error


def _bound(schema: Schema, closed: str, opened: str, place: Place) -> tuple[Fraction | None, bool]:
    """Return a bound and whether it is left out itself; of two the tighter one."""
    sign = 1 if closed == "minimum" else -1
    found = []
    for key in (closed, opened):
        value = schema.get(key)
        if value is None or (key == opened and isinstance(value, bool)):
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise place.beside(key).error("a bound is a number")
        try:
            found.append((sign * Fraction(str(value)), key == opened))
        except ValueError as error:
            raise place.beside(key).error("a bound is a finite number") from error
    if not found:
        return None, False
    bound, is_open = max(found)
    return sign * bound, is_open or schema.get(opened) is True


def repeat(rules: Rules, item: str, low: int, high: int | None, place: Place) -> str:
    """Return the expression for `low` to `high` of `item`.

    Raises:
        UserError: these are too many.
    """
    try:
        return rules.repeat(item, low, high)
    except ValueError as error:
        raise place.error(str(error)) from error
