"""Two JSON schemas as one that allows what both allow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Schema = Mapping[str, Any]
MAX_OPTIONS = 256


class Conflict(Exception):  # noqa: N818 - internal; the compiler turns it into a UserError
    """The two allow nothing together, or what they allow can't be said."""


def merge_schemas(first: Schema, second: Schema) -> dict[str, Any]:
    """Return a schema for the documents that both allow; neither holds $ref or allOf.

    Raises:
        Conflict: there is none, or none that can be written.
    """
    result = {**first, **second}
    for key in first.keys() & second.keys():
        if first[key] != second[key]:
            result[key] = _merged(key, first[key], second[key])
    _merge_values(first, second, result)
    _merge_properties(first, second, result)
    return result


def _merged(key: str, first: Any, second: Any) -> Any:
    if key in _BY_KEY:
        return _BY_KEY[key](first, second)
    if key in _ANNOTATIONS:
        return second
    raise Conflict(f"two different values of {key} can't be put together")


def _types(first: Any, second: Any) -> list[str]:
    ours = [first] if isinstance(first, str) else list(first)
    theirs = [second] if isinstance(second, str) else list(second)
    both = [kind for kind in ours if kind in theirs]
    for some, others in ((ours, theirs), (theirs, ours)):
        if "integer" in some and "number" in others and "integer" not in both:
            both.append("integer")
    if not both:
        raise Conflict(f"nothing is of type {first} and of type {second}")
    return both


def _options(first: list[Any], second: list[Any]) -> list[Any]:
    """Return the alternatives of both: each of the one with each of the other."""
    if len(first) * len(second) > MAX_OPTIONS:
        raise Conflict(f"there are more than {MAX_OPTIONS} ways to put the alternatives together")
    return [{"allOf": [ours, theirs]} for ours in first for theirs in second]


def _both(first: Any, second: Any) -> Any:
    if first is False or second is False:
        return False
    return {"allOf": [first, second]}


def _union(first: list[Any], second: list[Any]) -> list[Any]:
    return [*first, *(item for item in second if item not in first)]


def _either(first: Any, second: Any) -> bool:
    return bool(first) and bool(second)


_BY_KEY: dict[str, Callable[[Any, Any], Any]] = {
    "type": _types,
    "nullable": _either,
    "required": _union,
    "properties": lambda first, second: {**first, **second},
    "additionalProperties": _both,
    "items": _both,
    "propertyNames": _both,
    "anyOf": _options,
    "oneOf": _options,
    "enum": lambda first, _: first,
    "const": lambda first, _: first,
    **dict.fromkeys(("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties"), max),
    **dict.fromkeys(("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties"), min),
}
_ANNOTATIONS = frozenset(
    """
    $schema $id $comment $defs definitions title description default example examples deprecated
    readOnly writeOnly format uniqueItems strict
    """.split()  # noqa: SIM905 - easier to read
)


def _merge_values(first: Schema, second: Schema, result: dict[str, Any]) -> None:
    """Keep the values that both name."""
    ours, theirs = _values(first), _values(second)
    if ours is None or theirs is None:
        return
    both = [value for value in ours if value in theirs]
    if not both:
        raise Conflict("no value is in both lists of allowed values")
    result.pop("const", None)
    result["enum"] = both


def _values(schema: Schema) -> list[Any] | None:
    if "const" in schema:
        return [schema["const"]]
    values = schema.get("enum")
    return values if isinstance(values, list) else None


def _merge_properties(first: Schema, second: Schema, result: dict[str, Any]) -> None:
    """Merge what both say of one property; one that allows no others drops the other's."""
    ours, theirs = first.get("properties"), second.get("properties")
    if not isinstance(ours, Mapping) or not isinstance(theirs, Mapping):
        return
    names = [*ours, *(name for name in theirs if name not in ours)]
    for some, schema in ((ours, first), (theirs, second)):
        if schema.get("additionalProperties") is False:
            names = [name for name in names if name in some]
    result["properties"] = {
        name: _both(ours[name], theirs[name])
        if name in ours and name in theirs and ours[name] != theirs[name]
        else ours.get(name, theirs.get(name))
        for name in names
    }
