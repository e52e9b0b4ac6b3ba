"""The text of calls, as models write them, into names and arguments."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NoReturn

from shimpy.chat.formats import BodyKind
from shimpy.chat.messages import ToolSpec

Call = tuple[str, dict[str, Any]]
Specs = Mapping[str, ToolSpec]

_NAME_KEYS = ("name", "tool_name", "function")
_ARGUMENT_KEYS = ("arguments", "parameters", "args")


def parse_calls(kind: BodyKind, body: str, specs: Specs) -> list[Call]:
    """Return the calls in a body; none where it is malformed.

    `specs` are the tools by name: values that are written as plain text get their types there.
    """
    try:
        return _PARSERS[kind](body, specs)
    except (ValueError, TypeError, RecursionError):
        return []


def parse_json_calls(text: str, _specs: Specs) -> list[Call]:
    """Return the calls in a JSON object or array.

    Raises:
        ValueError: it is no JSON, or not of calls.
    """
    value = _loads(text.strip().removeprefix("```json").removesuffix("```"))
    return [_call(item) for item in (value if isinstance(value, list) else [value])]


def parse_arguments(name: str, text: str) -> Call | None:
    """Return the call of `name` whose arguments are JSON; None where they are not."""
    try:
        return _checked(name, text)
    except (ValueError, RecursionError):
        return None


def _call(value: Any) -> Call:
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict):
        raise ValueError("a call is an object")  # noqa: TRY004 - caught with the others
    name = next((value[k] for k in _NAME_KEYS if isinstance(value.get(k), str)), "")
    arguments = next((value[k] for k in _ARGUMENT_KEYS if k in value), None)
    return _checked(name, arguments)


def _checked(name: str, arguments: Any) -> Call:
    if isinstance(arguments, str):
        arguments = _loads(arguments) if arguments.strip() else {}
    if arguments is None:
        arguments = {}
    if not name.strip() or not isinstance(arguments, dict):
        raise ValueError("a call has a name and an object of arguments")
    return name.strip(), arguments


def _loads(text: str) -> Any:
    """Parse JSON; raw line breaks in strings are let through, as models write them."""
    return _clean(json.loads(text, strict=False, parse_constant=_refuse_constant))


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _clean(value: Any) -> Any:
    """Return the value without lone surrogates, which JSON can escape but UTF-8 can't hold."""
    if isinstance(value, str):
        return value if value.isascii() else value.encode(errors="replace").decode()
    if isinstance(value, dict):
        return {_clean(key): _clean(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_clean(item) for item in value]
    return value


# --- bodies of tags ------------------------------------------------------------------------------

_PARAMETER = re.compile(r"<parameter=([^<>]{1,256})>")
_GLM_ARGUMENT = re.compile(r"<arg_key>([^<>]{1,256})</arg_key>\s{0,8}<arg_value>")
_INVOKE = re.compile(r'<invoke name="([^"<>]{1,256})">')
_INVOKE_PARAMETER = re.compile(r'<parameter name="([^"<>]{1,256})">')


def _parse_tags(body: str, specs: Specs) -> list[Call]:
    """JSON, `<function=f><parameter=p>value</parameter></function>`, or GLM's pairs."""
    body = body.strip()
    if body.startswith(("{", "[", "```")):
        return parse_json_calls(body, specs)
    head, arrow, _ = body.removeprefix("<function=").partition(">")
    if body.startswith("<function=") or (arrow and "<" not in head):
        return [_parse_function(body, specs)]
    name, mark, pairs = body.partition("<arg_key>")
    name = name.strip()
    found = _pairs(mark + pairs, _GLM_ARGUMENT, "</arg_value>")
    if any(c.isspace() or c in "<>" for c in name) or bool(pairs) != bool(found):
        return []
    if not found and name not in specs:
        # A word between the tags is not yet a call.
        return []
    return [(name, _typed(found, specs.get(name)))]


def _parse_function_body(body: str, specs: Specs) -> list[Call]:
    """What follows `<function=`, where the tag round it was left away."""
    return [_parse_function(body, specs)]


def _parse_function(body: str, specs: Specs) -> Call:
    body = body.removeprefix("<function=").removesuffix("</function>")
    name, arrow, inner = body.partition(">")
    if not arrow:
        raise ValueError("no function")
    if inner.lstrip().startswith("{"):
        return _checked(name, inner)
    values = {
        key: value.removeprefix("\n").removesuffix("\n")
        for key, value in _pairs(inner, _PARAMETER, "</parameter>").items()
    }
    if inner.strip() and not values:
        raise ValueError("no parameters")
    return _checked(name, _typed(values, specs.get(name.strip())))


def _parse_invoke(body: str, specs: Specs) -> list[Call]:
    """MiniMax: `<invoke name="f"><parameter name="p">value</parameter></invoke>`."""
    return [
        (name, _typed(_pairs(inner, _INVOKE_PARAMETER, "</parameter>"), specs.get(name)))
        for name, inner in _pairs(body, _INVOKE, "</invoke>").items()
    ]


def _pairs(text: str, opener: re.Pattern[str], closer: str) -> dict[str, str]:
    """Return what stands between each opener and the next closer, by the opener's name."""
    result: dict[str, str] = {}
    at = 0
    while (match := opener.search(text, at)) is not None:
        end = text.find(closer, match.end())
        if end < 0:
            break
        result[match.group(1).strip()] = text[match.end() : end]
        at = end + len(closer)
    return result


def _typed(values: Mapping[str, str], spec: ToolSpec | None) -> dict[str, Any]:
    """Return texts as the values that the tool's schema asks for; text where it asks for none."""
    properties = spec.parameters.get("properties") if spec is not None else None
    known: Mapping[str, Any] = properties if isinstance(properties, Mapping) else {}
    return {key: _typed_value(text, known.get(key)) for key, text in values.items()}


def _typed_value(text: str, schema: Any) -> Any:
    kinds = schema.get("type") if isinstance(schema, Mapping) else None
    if kinds == "string" or (isinstance(kinds, list) and "string" in kinds):
        return _clean(text)
    try:
        return _loads(text)
    except ValueError:
        return {"True": True, "False": False, "None": None}.get(text.strip(), _clean(text))


# --- names, then JSON ----------------------------------------------------------------------------

_BUILTIN_ARGUMENT = re.compile(
    r'\s{0,8}(\w{1,64})\s{0,8}=\s{0,8}("(?:[^"\\]|\\.)*"|[^,"]{1,1024})\s{0,8}(?:,|$)'
)


def _parse_named(body: str, specs: Specs) -> list[Call]:
    """Mistral: an array of calls, or `name[ARGS]{...}`, or `name[CALL_ID]id[ARGS]{...}`."""
    if body.lstrip().startswith(("[", "{")):
        return parse_json_calls(body, specs)
    name, brace, rest = body.partition("{")
    return [_checked(name.partition("[")[0], brace + rest)] if brace else []


def _parse_deepseek(body: str, _specs: Specs) -> list[Call]:
    """DeepSeek: `function<sep>name` and fenced JSON, or `name<sep>{...}`."""
    head, brace, rest = body.partition("{")
    head = head.strip().removesuffix("```json").strip()
    names = [part.strip() for part in head.split("<｜tool▁sep｜>") if part.strip()]
    if names[:1] == ["function"]:
        del names[0]
    if len(names) != 1:
        return []
    return [_checked(names[0], brace + rest.strip().removesuffix("```"))]


def _parse_kimi(body: str, _specs: Specs) -> list[Call]:
    """Kimi: `functions.name:0<|tool_call_argument_begin|>{...}`."""
    name, mark, arguments = body.partition("<|tool_call_argument_begin|>")
    name = re.sub(r":\d{1,9}$", "", name.strip()).removeprefix("functions.")
    return [_checked(name, arguments)] if mark else []


def _parse_python(body: str, specs: Specs) -> list[Call]:
    """Llama 3: a JSON object, or `name.call(query="...")`."""
    body = body.strip()
    if body.startswith(("{", "[")):
        return parse_json_calls(body, specs)
    name, call, inner = body.partition(".call(")
    if not call or not inner.endswith(")") or not re.fullmatch(r"[\w.]{1,64}", name):
        return []
    arguments = dict(_BUILTIN_ARGUMENT.findall(inner[:-1]))
    return [(name, {key: _typed_value(text, None) for key, text in arguments.items()})]


# --- Gemma's notation ----------------------------------------------------------------------------

_GEMMA_TOKEN = re.compile(
    r'<\|"\|>(.*?)<\|"\|>|([A-Za-z_$][\w$.\-]{0,127})(?=\s{0,8}:)|([^<A-Za-z_$]+|.)', re.DOTALL
)


def _parse_gemma(body: str, _specs: Specs) -> list[Call]:
    """Gemma: `name{key:<|"|>text<|"|>,other:1}`; bare keys, and strings between marks."""
    name, brace, rest = body.partition("{")
    written = "".join(_as_json(match) for match in _GEMMA_TOKEN.finditer(brace + rest))
    return [_checked(name, _loads(written))]


def _as_json(match: re.Match[str]) -> str:
    string, key, other = match.groups()
    return str(other) if other is not None else json.dumps(key if string is None else string)


_PARSERS = {
    "json": parse_json_calls,
    "tags": _parse_tags,
    "function": _parse_function_body,
    "named": _parse_named,
    "deepseek": _parse_deepseek,
    "kimi": _parse_kimi,
    "gemma": _parse_gemma,
    "invoke": _parse_invoke,
    "python": _parse_python,
}
