"""A request's `template` in Ollama's own language, Go's text/template, as Jinja.

What Ollama's templates are made of is understood: .System, .Prompt, .Response, .Suffix,
.Messages with .Role and .Content, if / else if / else / end, range, and, or, not, eq, ne, len
and the trim markers. Anything else is a clear error: send the Jinja form then. As in Ollama,
what follows .Response is cut off when an answer is generated.
"""

from __future__ import annotations

import json
import re

from shimpy.errors import InvalidOptionError

_ACTION = re.compile(r"\{\{(?P<left>-\s)?(?P<body>.*?)(?P<right>\s-)?\}\}", re.DOTALL)
_LOOKS_GO = re.compile(
    r"\{\{-?\s*(?:\.[A-Z]|\$|(?:if|range|else|end|with|and|or|not|eq|ne|len|json)\b)"
)
_TOKEN = re.compile(r'\s*("(?:[^"\\]|\\.)*"|`[^`]*`|\(|\)|[^\s()"`]+)')
_PRELUDE = (
    "{%- set system = messages | selectattr('role', 'equalto', 'system')"
    " | map(attribute='content') | join('\\n\\n') -%}"
    "{%- set prompt = messages | selectattr('role', 'equalto', 'user')"
    " | map(attribute='content') | list | last | default('', true) -%}"
)
_NAMES = {".System": "system", ".Prompt": "prompt", ".Messages": "messages", ".Suffix": "''"}
_ITEM_NAMES = {".Role": "item.role", ".Content": "item.content"}
_FUNCTIONS = {"and": " and ", "or": " or ", "eq": " == ", "ne": " != "}


def is_go_template(text: str) -> bool:
    """Whether a template is in Go's language and not Jinja."""
    return "{%" not in text and _LOOKS_GO.search(text) is not None


def to_jinja(text: str) -> str:
    """Return a Go template as a Jinja chat template.

    Raises:
        InvalidOptionError: it uses what is not understood here.
    """
    return _PRELUDE + "".join(_Translator().translate(text))


class _Translator:
    """Walks the actions once; `_open` holds the blocks that an `end` closes."""

    def __init__(self) -> None:
        self._open: list[str] = []

    def translate(self, text: str) -> list[str]:
        out: list[str] = []
        position, trim = 0, False
        for action in _ACTION.finditer(text):
            literal = text[position : action.start()]
            out.append(_literal(literal, trim_left=trim, trim_right=bool(action["left"])))
            position, trim = action.end(), bool(action["right"])
            body = action["body"].strip()
            if body == ".Response":
                return [*out, *self._close_all()]
            out.append(self._action(body))
        out.append(_literal(text[position:], trim_left=trim, trim_right=False))
        if self._open:
            raise _refused(f"a {self._open[-1]} without its end")
        return out

    def _close_all(self) -> list[str]:
        return [f"{{% end{kind} %}}" for kind in reversed(self._open)]

    def _action(self, body: str) -> str:
        if body.startswith("/*"):
            return ""
        word, _, rest = body.partition(" ")
        match word:
            case "if":
                self._open.append("if")
                return f"{{% if {self._expression(rest)} %}}"
            case "else" if rest.strip().startswith("if ") and self._open:
                return f"{{% elif {self._expression(rest.strip()[3:])} %}}"
            case "else" if not rest.strip() and self._open:
                return "{% else %}"
            case "end" if not rest.strip() and self._open:
                return f"{{% end{self._open.pop()} %}}"
            case "range" if rest.strip() in {".Messages", "$.Messages"}:
                self._open.append("for")
                return "{% for item in messages %}"
            case _:
                return f"{{{{ {self._expression(body)} }}}}"

    def _expression(self, text: str) -> str:
        tokens = _TOKEN.findall(text)
        if "".join(tokens) != re.sub(r"\s+", "", text) and not any('"' in t for t in tokens):
            raise _refused(text)
        value, rest = self._call(tokens)
        if rest:
            raise _refused(text)
        return value

    def _call(self, tokens: list[str]) -> tuple[str, list[str]]:
        """Return the value of a function with all its arguments, up to ')' or the end."""
        if not tokens:
            raise _refused("an empty action")
        head = tokens[0]
        if head in _FUNCTIONS or head in {"not", "len"}:
            arguments, rest = self._arguments(tokens[1:])
            return self._apply(head, arguments), rest
        arguments, rest = self._arguments(tokens)
        if len(arguments) != 1:
            raise _refused(" ".join(tokens))
        return arguments[0], rest

    def _apply(self, function: str, arguments: list[str]) -> str:
        if function in {"not", "len"}:
            if len(arguments) != 1:
                raise _refused(f"{function} with {len(arguments)} arguments")
            form = "(not {})" if function == "not" else "({} | length)"
            return form.format(arguments[0])
        if len(arguments) < 2:  # noqa: PLR2004 - a comparison has two sides
            raise _refused(f"{function} with {len(arguments)} arguments")
        if function == "eq":
            first, *others = arguments
            return "(" + " or ".join(f"{first} == {other}" for other in others) + ")"
        return "(" + _FUNCTIONS[function].join(arguments) + ")"

    def _arguments(self, tokens: list[str]) -> tuple[list[str], list[str]]:
        arguments: list[str] = []
        while tokens and tokens[0] != ")":
            if tokens[0] == "(":
                value, tokens = self._call(tokens[1:])
                if not tokens:
                    raise _refused("a ( without its )")
                tokens = tokens[1:]
            else:
                value, tokens = self._operand(tokens[0]), tokens[1:]
            arguments.append(value)
        return arguments, tokens

    def _operand(self, token: str) -> str:
        if token.startswith('"'):
            try:
                return repr(json.loads(token))
            except ValueError:
                raise _refused(token) from None
        if token.startswith("`"):
            return repr(token[1:-1])
        if token.isdigit() or token in {"true", "false"}:
            return token
        name = token.removeprefix("$")
        if "for" in self._open and token in _ITEM_NAMES:
            return _ITEM_NAMES[token]
        if name in _NAMES:
            return _NAMES[name]
        raise _refused(token)


def _literal(text: str, *, trim_left: bool, trim_right: bool) -> str:
    shown = text.lstrip() if trim_left else text
    shown = shown.rstrip() if trim_right else shown
    # As an expression, so that nothing in it means anything to Jinja, and no newline is lost.
    return f"{{{{ {shown!r} }}}}" if shown else ""


def _refused(what: str) -> InvalidOptionError:
    return InvalidOptionError(
        f"the template uses {what.strip()!r}, which is not understood here; of Go's templates "
        ".System, .Prompt, .Response, .Messages, if, else, range, and, or, not, eq, ne and len "
        "are, or send a Jinja template",
        option="template",
    )
