"""Requests drawn from an OpenAPI description: mostly what it allows, now and then what not."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import msgspec
from hypothesis import strategies as st

MODEL = "chain"
# Answers that go on as long as the daemon runs.
_ENDLESS = {"/api/events"}
_DEPTH = 4

_chaos = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
_texts = st.text(max_size=30) | st.sampled_from(
    [MODEL, "user", "json", "5m", "-1", "{{ x }}", "aGk=", "../../etc/passwd", "http://x/y", "\0"]
)
_SCALARS: dict[str, st.SearchStrategy[Any]] = {
    "string": _texts,
    "integer": st.integers(-2, 40) | st.integers(),
    "number": st.floats(-1, 3) | st.floats(allow_nan=False, allow_infinity=False),
    "boolean": st.booleans(),
    "null": st.none(),
}
_paths = st.text(max_size=20) | st.sampled_from(
    [MODEL, "none", "..", "a/b:c", "sha256-" + "0" * 64, "%00", "sha256:" + "0" * 64]
)


@dataclass(frozen=True)
class Drawn:
    """One request."""

    method: str
    path: str
    content: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


def requests(description: dict[str, Any]) -> st.SearchStrategy[Drawn]:
    """Draw requests to every route of a description, each as likely as the others."""
    operations = [
        _operation(description, method.upper(), path, operation)
        for path, item in description["paths"].items()
        for method, operation in item.items()
        if path not in _ENDLESS
    ]
    return st.sampled_from(operations).flatmap(lambda drawn: drawn)


@st.composite
def _operation(
    draw: st.DrawFn, description: dict[str, Any], method: str, path: str, operation: dict[str, Any]
) -> Drawn:
    path = re.sub(r"\{\w+\}", lambda _: draw(_paths), path)
    if draw(st.integers(0, 9)) == 0:
        method = draw(st.sampled_from(["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS"]))
    headers = draw(
        st.dictionaries(
            st.sampled_from(["accept", "content-type", "x-request-id", "authorization", "origin"]),
            st.sampled_from(["text/event-stream", "a" * 300, "Bearer x", "http://localhost", "é"]),
            max_size=2,
        )
    )
    headers = {name: value for name, value in headers.items() if value.isascii()}
    content = operation.get("requestBody", {}).get("content", {}).get("application/json")
    if content is None:
        return Drawn(method, path, draw(st.binary(max_size=20)), headers)
    body = draw(_value(content["schema"], description["components"]["schemas"], 0))
    if isinstance(body, dict) and draw(st.booleans()):
        # Past the first check, so that the later ones are reached.
        body |= {"model": MODEL}
    return Drawn(method, path, msgspec.json.encode(body), headers)


@st.composite
def _value(draw: st.DrawFn, schema: dict[str, Any], known: dict[str, Any], depth: int) -> Any:
    """A value of a schema; one in twelve of anything else."""
    if draw(st.integers(0, 11)) == 0:
        return draw(_chaos)
    if "$ref" in schema:
        return draw(_value(known[schema["$ref"].rpartition("/")[2]], known, depth))
    if "anyOf" in schema:
        return draw(_value(draw(st.sampled_from(schema["anyOf"])), known, depth))
    if "enum" in schema:
        return draw(st.sampled_from(schema["enum"]))
    kind = schema.get("type")
    if kind in _SCALARS:
        return draw(_SCALARS[kind])
    if kind == "array":
        inner = _value(schema.get("items") or {}, known, depth + 1)
        return draw(st.lists(inner, max_size=3 if depth < _DEPTH else 0))
    if kind == "object":
        return draw(_object(schema, known, depth)) if depth < _DEPTH else {}
    return draw(_chaos)


@st.composite
def _object(draw: st.DrawFn, schema: dict[str, Any], known: dict[str, Any], depth: int) -> Any:
    properties = schema.get("properties", {})
    required = set(schema.get("required", ()))
    made = {}
    for name, inner in properties.items():
        # Few at once: with all of them one would nearly always be wrong.
        if name in required or draw(st.integers(0, 5)) == 0:
            made[name] = draw(_value(inner, known, depth + 1))
    return made
