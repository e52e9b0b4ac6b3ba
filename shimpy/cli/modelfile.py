"""Modelfiles: what a model is made of, line by line. Source: ollama parser/parser.go.

FROM qwen3:8b                      a model, or the path of a GGUF file
PARAMETER temperature 0.6          any number of times
SYSTEM \"\"\"Several
lines.\"\"\"
TEMPLATE ... MESSAGE user ... LICENSE ...
"""

from __future__ import annotations

import json
import re
from typing import Any, Final

import msgspec

from shimpy.errors import InvalidOptionError, UserError
from shimpy.parameters import add_typed

_COMMANDS: Final = ("FROM", "PARAMETER", "TEMPLATE", "SYSTEM", "ADAPTER", "LICENSE", "MESSAGE")
_LINE: Final = re.compile(r"[ \t]*(?P<command>[A-Za-z]+)[ \t]+(?P<rest>[^\n]*)(?:\n|\Z)")
_SKIPPED: Final = re.compile(r"[ \t]*(?:#[^\n]*)?(?:\n|\Z)")
_LONG: Final = '"""'
_ROLES: Final = ("system", "user", "assistant")


class Modelfile(msgspec.Struct):
    """The parts of a Modelfile; paths and names as they were written."""

    sources: list[str] = msgspec.field(default_factory=list)
    parameters: dict[str, Any] = msgspec.field(default_factory=dict)
    template: str | None = None
    system: str | None = None
    messages: list[dict[str, str]] = msgspec.field(default_factory=list)
    licenses: list[str] = msgspec.field(default_factory=list)

    def request(self) -> dict[str, Any]:
        """Return the fields of /api/create, all but where the model's files come from."""
        fields = {
            "parameters": self.parameters,
            "template": self.template,
            "system": self.system,
            "messages": self.messages,
            "license": self.licenses,
        }
        return {name: value for name, value in fields.items() if value}


def parse_modelfile(text: str) -> Modelfile:
    """Return the parts of a Modelfile.

    Raises:
        UserError: a line that is none, a parameter that can't be, or no FROM; the message has
            its number.
    """
    result = Modelfile()
    text = text.replace("\r\n", "\n").removeprefix("\ufeff")
    position = 0
    while position < len(text):
        skipped = _SKIPPED.match(text, position)
        if skipped is not None and skipped.end() > position:
            position = skipped.end()
            continue
        number = text.count("\n", 0, position) + 1
        line = _LINE.match(text, position)
        if line is None or line["command"].upper() not in _COMMANDS:
            words = text[position:].split(None, 1)
            # Python knows more white space than Modelfiles do: then there is no word at all.
            word = words[0] if words else text[position]
            raise UserError(
                f"Modelfile, line {number}: {word[:40]!r} is no command; there are "
                f"{', '.join(_COMMANDS)}"
            )
        command, head = line["command"].upper(), ""
        value_at = line.start("rest")
        if command in {"PARAMETER", "MESSAGE"}:
            head, value_at = _head(text, value_at, number)
        value, position = _value(text, value_at, number)
        _take(result, command, head, value, number)
    if not result.sources:
        raise UserError("the Modelfile has no FROM line, which names the model to start from")
    return result


def _head(text: str, position: int, number: int) -> tuple[str, int]:
    """Return the word before a value, and where the value begins."""
    match = re.compile(r"(\S+)[ \t]+").match(text, position)
    if match is None:
        raise UserError(f"Modelfile, line {number}: a value is missing")
    return match[1], match.end()


def _value(text: str, position: int, number: int) -> tuple[str, int]:
    """Return a value and where the next line begins."""
    if text.startswith(_LONG, position):
        end = text.find(_LONG, position + len(_LONG))
        if end < 0:
            raise UserError(f'Modelfile, line {number}: the text that begins with """ has no end')
        rest = text.find("\n", end)
        return text[position + len(_LONG) : end], len(text) if rest < 0 else rest + 1
    end = text.find("\n", position)
    end = len(text) if end < 0 else end
    line = text[position:end].strip()
    if len(line) > 1 and line[0] == line[-1] == '"':
        line = line[1:-1]
    return line, end + 1


def _take(result: Modelfile, command: str, head: str, value: str, number: int) -> None:
    match command:
        case "FROM":
            result.sources.append(value)
        case "PARAMETER":
            _set_parameter(result, head.lower(), value, number)
        case "TEMPLATE":
            result.template = value
        case "SYSTEM":
            result.system = value
        case "LICENSE":
            result.licenses.append(value)
        case "MESSAGE" if head.lower() in _ROLES:
            result.messages.append({"role": head.lower(), "content": value})
        case "MESSAGE":
            raise UserError(
                f"Modelfile, line {number}: {head!r} is no role; there are {', '.join(_ROLES)}"
            )
        case _:
            raise UserError(f"Modelfile, line {number}: LoRA adapters are not supported")


def _set_parameter(result: Modelfile, name: str, value: str, number: int) -> None:
    try:
        add_typed(result.parameters, name, _unescaped(value) if name == "stop" else value)
    except InvalidOptionError as error:
        raise InvalidOptionError(f"Modelfile, line {number}: {error.message}") from None


def _unescaped(value: str) -> str:
    """Return a stop string with its escapes read, as `ollama show` writes them."""
    try:
        return str(json.loads(f'"{value}"'))
    except ValueError:
        return value
