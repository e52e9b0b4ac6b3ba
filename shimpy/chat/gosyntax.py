"""Reads Go's text/template notation, as far as Ollama's templates use it.

    text = { raw | "{{" action "}}" }
    action = pipeline | $x := pipeline | if | else | range | with | break | continue | end
    pipeline = command { "|" command },  command = operand { operand }

Source: https://pkg.go.dev/text/template
"""

from __future__ import annotations

import json
import re
from typing import Literal

import msgspec

from shimpy.errors import UserError

MAX_TEMPLATE_CHARS = 64 * 1024
MAX_DEPTH = 64


class Constant(msgspec.Struct, frozen=True):
    """A literal."""

    value: str | int | float | bool | None


class Path(msgspec.Struct, frozen=True):
    """A variable ("" for the dot) and the fields behind it: `$m.Function.Name`, `.Role`."""

    variable: str
    fields: tuple[str, ...]


class Call(msgspec.Struct, frozen=True):
    """A function and its operands; a piped value comes last."""

    function: str
    operands: tuple[Expression, ...]


class FieldOf(msgspec.Struct, frozen=True):
    """Fields of a value in parentheses: `(index .Messages 0).Content`."""

    value: Expression
    fields: tuple[str, ...]


Expression = Constant | Path | Call | FieldOf


class Raw(msgspec.Struct, frozen=True):
    """Text that is printed as it is."""

    text: str


class Print(msgspec.Struct, frozen=True):
    """A value that is printed."""

    value: Expression


class Assign(msgspec.Struct, frozen=True):
    """A variable that is declared (`:=`) or set (`=`)."""

    name: str
    value: Expression
    declares: bool


class Block(msgspec.Struct, frozen=True):
    """An if, range or with; `variables` are those before its `:=`."""

    kind: Literal["if", "range", "with"]
    value: Expression
    variables: tuple[str, ...]
    body: tuple[Node, ...]
    otherwise: tuple[Node, ...]


class Leave(msgspec.Struct, frozen=True):
    """A break or continue."""

    kind: Literal["break", "continue"]


Node = Raw | Print | Assign | Block | Leave

FUNCTIONS = frozenset(
    """
    and or not eq ne lt le gt ge len index slice print printf println json toJson currentDate
    """.split()  # noqa: SIM905 - easier to read
)
_UNSUPPORTED = ("define", "template", "block")
_QUOTED = re.compile(r'"(?:[^"\\\n]|\\.)*"|`[^`]*`')
_TOKEN = re.compile(
    r"""\s*(?:
        (?P<string>"(?:[^"\\\n]|\\.)*"|`[^`]*`)
      | (?P<number>-?\d+(?:\.\d+)?)
      | (?P<path>(?:\$[A-Za-z_]\w*|\$|(?=\.))(?:\.[A-Za-z_]\w*)*(?:(?<![\w$.])\.)?)
      | (?P<word>[A-Za-z_]\w*)
      | (?P<sign>:=|=|\||\(|\)|,)
    )""",
    re.VERBOSE,
)


def parse_go_template(source: str) -> tuple[Node, ...]:
    """Return the parts of a template.

    Raises:
        UserError: it is no template, or uses what isn't supported; the message shows the place.
    """
    if len(source) > MAX_TEMPLATE_CHARS:
        raise UserError(
            f"the template has {len(source)} characters; the limit is {MAX_TEMPLATE_CHARS}"
        )
    return _Parser(source).parse()


class _Parser:
    def __init__(self, source: str) -> None:
        self._pieces = _split(source)
        self._at = 0

    def parse(self) -> tuple[Node, ...]:
        nodes, ended_by = self._nodes(depth=0)
        if ended_by:
            raise UserError(f"the template has {{{{ {ended_by} }}}} without a beginning")
        return nodes

    def _nodes(self, depth: int) -> tuple[tuple[Node, ...], str]:
        """Return the nodes up to an end or else, and that action."""
        if depth > MAX_DEPTH:
            raise UserError(f"the template is nested over {MAX_DEPTH} levels deep")
        nodes: list[Node] = []
        while self._at < len(self._pieces):
            piece = self._pieces[self._at]
            self._at += 1
            if isinstance(piece, Raw):
                nodes.append(piece)
                continue
            word = piece.partition(" ")[0].partition("(")[0]
            if word in ("end", "else"):
                return tuple(nodes), piece
            nodes.append(self._action(word, piece, depth))
        return tuple(nodes), ""

    def _action(self, word: str, piece: str, depth: int) -> Node:
        if word in _UNSUPPORTED:
            raise UserError(f"the template uses {{{{ {word} }}}}, which is not supported")
        match word:
            case "if" | "range" | "with":
                return self._block(word, piece, depth)
            case "break" | "continue":
                return Leave(word)
        tokens = _Tokens(piece)
        names, operator = tokens.variables()
        value = tokens.pipeline()
        tokens.end()
        if not names:
            return Print(value)
        if len(names) != 1:
            raise tokens.error("two variables outside a range")
        return Assign(names[0], value, operator == ":=")

    def _block(self, kind: Literal["if", "range", "with"], piece: str, depth: int) -> Block:
        tokens = _Tokens(piece[len(kind) :])
        names, _ = tokens.variables()
        value = tokens.pipeline()
        tokens.end()
        body, ended_by = self._nodes(depth + 1)
        otherwise: tuple[Node, ...] = ()
        if ended_by.startswith("else"):
            rest = ended_by[len("else") :].strip()
            if rest:
                word: Literal["if", "with"] = "with" if rest.startswith("with") else "if"
                if not rest.startswith((f"{word} ", f"{word}(")):
                    raise UserError(f"the template has an unknown {{{{ {ended_by} }}}}")
                otherwise = (self._block(word, rest, depth + 1),)
                return Block(kind, value, names, body, otherwise)
            otherwise, ended_by = self._nodes(depth + 1)
        if ended_by != "end":
            raise UserError(f"the template has {{{{ {piece} }}}} without its {{{{ end }}}}")
        return Block(kind, value, names, body, otherwise)


def _split(source: str) -> list[Raw | str]:
    """Return raw texts and the insides of actions; trim marks are applied, comments left out."""
    pieces: list[Raw | str] = []
    at = 0
    trim = False
    while (start := source.find("{{", at)) >= 0:
        end = _end_of_action(source, start + 2)
        text, inside = source[at:start], source[start + 2 : end]
        if trim:
            text = text.lstrip()
        if inside[:1] == "-" and inside[1:2].isspace():
            text, inside = text.rstrip(), inside[1:]
        trim = inside[-1:] == "-" and inside[-2:-1].isspace()
        inside = (inside[:-1] if trim else inside).strip()
        if text:
            pieces.append(Raw(text))
        if not inside.startswith("/*"):
            pieces.append(inside)
        at = end + 2
    rest = source[at:].lstrip() if trim else source[at:]
    return [*pieces, Raw(rest)] if rest else pieces


def _end_of_action(source: str, at: int) -> int:
    """Return where an action's }} is; those in its strings don't count."""
    while at < len(source):
        if source.startswith("}}", at):
            return at
        quoted = _QUOTED.match(source, at) if source[at] in '"`' else None
        comment = source.find("*/", at) if source.startswith("/*", at) else -1
        at = quoted.end() if quoted else comment + 2 if comment >= 0 else at + 1
    raise UserError("the template has a {{ without its }}")


class _Tokens:
    """The tokens of one action."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens: list[tuple[str, str]] = []
        at = 0
        text = text.rstrip()
        while at < len(text):
            match = _TOKEN.match(text, at)
            if match is None or match.lastgroup is None:
                raise self.error(f"{text[at : at + 20]!r}")
            glued = at > 0 and match.start(match.lastgroup) == at
            self._tokens.append((match.lastgroup, match.group(match.lastgroup)))
            if glued and match.lastgroup == "path" and self._tokens[-2][1] == ")":
                self._tokens[-1] = ("fields", match.group("path"))
            at = match.end()
        self._at = 0
        self._depth = 0

    def error(self, what: str) -> UserError:
        return UserError(f"the template's {{{{ {self._text.strip()} }}}} is not understood: {what}")

    def _peek(self, ahead: int = 0) -> tuple[str, str]:
        at = self._at + ahead
        return self._tokens[at] if at < len(self._tokens) else ("", "")

    def variables(self) -> tuple[tuple[str, ...], str]:
        """Read `$i, $e :=` or `$x =`, where it stands."""
        names = []
        ahead = 0
        while self._peek(ahead)[0] == "path" and self._peek(ahead)[1].startswith("$"):
            names.append(self._peek(ahead)[1][1:])
            sign = self._peek(ahead + 1)[1]
            if sign in (":=", "="):
                self._at += ahead + 2
                return tuple(names), sign
            if sign != ",":
                break
            ahead += 2
        return (), ""

    def end(self) -> None:
        """Raise where something is left over."""
        if self._at < len(self._tokens):
            raise self.error(f"{self._peek()[1]!r} is left over")

    def pipeline(self) -> Expression:
        """Read commands with bars between; each is the last operand of the next."""
        value = self._command(None)
        while self._peek()[1] == "|":
            self._at += 1
            value = self._command(value)
        return value

    def _command(self, piped: Expression | None) -> Expression:
        kind, text = self._peek()
        if kind == "word" and text not in ("true", "false", "nil"):
            if text not in FUNCTIONS:
                raise self.error(f"there is no function {text!r}")
            self._at += 1
            operands = []
            while self._peek()[0] and self._peek()[1] not in ("|", ")"):
                operands.append(self._operand())
            return Call(text, (*operands, piped) if piped is not None else tuple(operands))
        if piped is not None:
            raise self.error("a value is piped into what is no function")
        return self._operand()

    def _operand(self) -> Expression:
        kind, text = self._peek()
        self._at += 1
        match kind:
            case "string":
                return Constant(text[1:-1] if text[0] == "`" else self._unquoted(text))
            case "number":
                return Constant(float(text) if "." in text else int(text))
            case "path":
                first, *fields = text.split(".")
                return Path(first, tuple(field for field in fields if field))
            case "word" if text in ("true", "false", "nil"):
                return Constant({"true": True, "false": False}.get(text))
            case "word":
                # A function without operands, such as currentDate.
                self._at -= 1
                return self._alone()
            case "sign" if text == "(":
                return self._group()
        raise self.error(f"{text!r} where a value should be" if text else "a value is missing")

    def _alone(self) -> Expression:
        _, text = self._peek()
        if text not in FUNCTIONS:
            raise self.error(f"there is no function {text!r}")
        self._at += 1
        return Call(text, ())

    def _group(self) -> Expression:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise self.error("parentheses nested too deeply")
        value = self.pipeline()
        if self._peek()[1] != ")":
            raise self.error("a ) is missing")
        self._at += 1
        self._depth -= 1
        if self._peek()[0] == "fields":
            fields = tuple(field for field in self._peek()[1].split(".") if field)
            self._at += 1
            return FieldOf(value, fields)
        return value

    def _unquoted(self, text: str) -> str:
        try:
            return str(json.loads(text, strict=False))
        except ValueError as error:
            raise self.error(f"the string {text}") from error
