"""Renders Ollama's own templates, which are written in Go's text/template.

Such a template comes with a request, or with a model that was made for Ollama. It prints
either `.Messages`, or one turn at a time from `.System`, `.Prompt` and `.Response`; then the
last turn ends where the response begins.

Source: template/template.go in Ollama.
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from shimpy.chat.adapt import tool_dict
from shimpy.chat.budget import Budget, TemplateFault
from shimpy.chat.gosyntax import (
    Assign,
    Block,
    Call,
    Constant,
    Expression,
    FieldOf,
    Leave,
    Node,
    Path,
    Print,
    Raw,
    parse_go_template,
)
from shimpy.chat.guard import ControlTokens, Guard
from shimpy.chat.messages import ChatMessage, ToolSpec
from shimpy.chat.rendered import Rendered
from shimpy.errors import UserError

_GO_ACTION = re.compile(
    r"\{\{-?\s*(?:\.[A-Z\s}]|\$|(?:if|range|with|else|end|define|template|block|json)\b)"
)


class GoTemplate:
    """A Go template, ready to render; immutable."""

    def __init__(self, source: str, *, control_tokens: Iterable[str] = ()) -> None:
        """Parse a template.

        Raises:
            UserError: it is no template, or uses what isn't supported.
        """
        self.source = source
        self._nodes = parse_go_template(source)
        paths = {path for node in self._nodes for path in _paths(node)}
        # Every field that the template reads.
        self.fields = frozenset(field for path in paths for field in path.fields)
        if not self.fields & {"Response", "Messages"}:
            self._nodes += (Print(Path("", ("Response",))),)
        self._control = ControlTokens(control_tokens)
        self._literals = {text for node in self._nodes for text in _literals(node) if text.strip()}

    @property
    def takes_messages(self) -> bool:
        """Whether it prints a whole conversation at once."""
        return "Messages" in self.fields

    @property
    def takes_suffix(self) -> bool:
        """Whether it can fill in the middle."""
        return "Suffix" in self.fields

    @property
    def takes_tools(self) -> bool:
        """Whether it describes tools."""
        return "Tools" in self.fields

    def render(
        self,
        messages: Sequence[ChatMessage],
        *,
        now: datetime,
        tools: Sequence[ToolSpec] = (),
        think: bool | str | None = None,
        suffix: str = "",
    ) -> Rendered:
        """Return the prompt of a conversation; one that an assistant ends is left open.

        Raises:
            UserError: the template fails, or does too much.
        """
        guard = Guard(self._control, self._literals)
        plain = _merged([_message(message) for message in messages])
        specs = [tool_dict(tool) for tool in tools]
        guard.reserve(plain, specs, suffix, self.source)
        # Where the response begins; what comes behind it is for the model to write.
        cut = guard.spare()
        shared: dict[str, Any] = {
            "Tools": guard.protect_value(specs),
            "Suffix": guard.protect(suffix),
            "Think": bool(think),
            "ThinkLevel": think if isinstance(think, str) else "",
            "IsThinkSet": think is not None,
        }
        protected = guard.protect_value(plain)
        n_chars = guard.n_chars + len(self.source)
        try:
            if self.takes_messages:
                text = self._run(_conversation(protected, shared, cut), now, n_chars)
            else:
                turns = _turns(protected)
                turns[-1]["Response"] += cut
                text = "".join(self._run({**shared, **turn}, now, n_chars) for turn in turns)
        except TemplateFault as fault:
            raise UserError(f"the template can't render this: {fault}") from fault
        return Rendered(parts=guard.split(text.partition(cut)[0]))

    def _run(self, data: Mapping[str, Any], now: datetime, n_chars: int) -> str:
        return _Run(data, now, Budget(n_chars)).text(self._nodes)


def is_go_template(source: str) -> bool:
    """Whether a template is written in Go's notation; else in Jinja's."""
    return "{%" not in source and _GO_ACTION.search(source) is not None


# --- what a template sees -------------------------------------------------------------------------


def _message(message: ChatMessage) -> dict[str, Any]:
    calls = [
        {"id": call.id, "function": {"index": i, "name": call.name, "arguments": call.arguments}}
        for i, call in enumerate(message.tool_calls)
    ]
    return {
        "role": "system" if message.role == "developer" else message.role,
        "content": message.content,
        "thinking": message.thinking,
        "tool_calls": calls,
        "tool_name": message.tool_name,
        "tool_call_id": message.tool_call_id,
    }


def _merged(messages: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages with neighbours of one role joined, as Ollama passes them."""
    result: list[dict[str, Any]] = []
    for message in messages:
        last = result[-1] if result else None
        if last and message["role"] == last["role"] != "tool" and not last["tool_calls"]:
            texts = (last["content"], message["content"])
            content = "\n\n".join(text for text in texts if text)
            result[-1] = {**message, "content": content}
        else:
            result.append(message)
    return result


def _conversation(
    messages: Sequence[Mapping[str, Any]], shared: Mapping[str, Any], cut: str
) -> dict[str, Any]:
    system = [m["content"] for m in messages if m["role"] == "system"]
    shown = list(messages)
    if shown and shown[-1]["role"] == "assistant":
        shown[-1] = {**shown[-1], "content": shown[-1]["content"] + cut}
    return {**shared, "Messages": shown, "System": "\n\n".join(system), "Response": cut}


def _turns(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return system, prompt and response of each turn."""
    turns: list[dict[str, str]] = [{"System": "", "Prompt": "", "Response": ""}]
    order = ["System", "Prompt", "Response"]
    keys = {"system": "System", "assistant": "Response"}
    for message in messages:
        key = keys.get(message["role"], "Prompt")
        turn = turns[-1]
        if any(turn[later] for later in order[order.index(key) + 1 :]):
            turn = {"System": "", "Prompt": "", "Response": ""}
            turns.append(turn)
        turn[key] = "\n\n".join(text for text in (turn[key], message["content"]) if text)
    return turns


def _paths(node: Node | Expression) -> Iterator[Path]:
    for part in _walk(node):
        if isinstance(part, Path):
            yield part


def _literals(node: Node) -> Iterator[str]:
    """Yield the strings that the template compares with."""
    for part in _walk(node):
        if isinstance(part, Call):
            for operand in part.operands:
                if isinstance(operand, Constant) and isinstance(operand.value, str):
                    yield operand.value


def _walk(node: Node | Expression) -> Iterator[Node | Expression]:
    yield node
    match node:
        case Print(value) | Assign(_, value, _) | FieldOf(value, _):
            yield from _walk(value)
        case Call(_, operands):
            for operand in operands:
                yield from _walk(operand)
        case Block(_, value, _, body, otherwise):
            yield from _walk(value)
            for part in (*body, *otherwise):
                yield from _walk(part)


# --- running it -----------------------------------------------------------------------------------


class _Left(Exception):  # noqa: N818 - no error: a break or continue on its way out
    def __init__(self, kind: str) -> None:
        self.kind = kind


class _Run:
    """One rendering: the dot, the variables, and what may still be spent."""

    def __init__(self, data: Mapping[str, Any], now: datetime, budget: Budget) -> None:
        self._now = now
        self._budget = budget
        self._out: list[str] = []
        # One scope for each block around; the outermost holds the data as `$`.
        self._scopes: list[dict[str, Any]] = [{"": data}]
        self._dot: Any = data

    def text(self, nodes: Iterable[Node]) -> str:
        try:
            self._all(nodes)
        except _Left as left:
            raise TemplateFault(f"a {left.kind} outside a range") from left
        return "".join(self._out)

    def _all(self, nodes: Iterable[Node]) -> None:
        for node in nodes:
            self._budget.spend_steps(1)
            match node:
                case Raw(text):
                    self._print(text)
                case Print(value):
                    self._print(self._show(self._value(value)))
                case Assign(name, value, declares):
                    self._assign(name, self._value(value), declares=declares)
                case Leave(kind):
                    raise _Left(kind)
                case Block():
                    self._block(node)

    def _print(self, text: str) -> None:
        self._budget.spend_chars(len(text))
        self._out.append(text)

    def _show(self, value: object) -> str:
        """Return a value as it is printed: what isn't plain as JSON, as Ollama's types do."""
        if value is None:
            return ""
        if isinstance(value, bool):
            return "true" if value else "false"
        if isinstance(value, (str, int, float)):
            return str(value)
        return self._json(value)

    def _json(self, value: object) -> str:
        self._budget.weigh(value)
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))

    def _assign(self, name: str, value: object, *, declares: bool) -> None:
        if declares:
            self._scopes[-1][name] = value
            return
        for scope in reversed(self._scopes):
            if name in scope:
                scope[name] = value
                return
        raise TemplateFault(f"the variable ${name} is set before it is declared")

    def _block(self, block: Block) -> None:
        value = self._value(block.value)
        dot = self._dot
        self._scopes.append({})
        try:
            if block.kind == "range":
                self._range(block, value)
                return
            if block.variables:
                self._scopes[-1][block.variables[0]] = value
            if block.kind == "with" and _is_true(value):
                self._dot = value
            self._all(block.body if _is_true(value) else block.otherwise)
        finally:
            self._scopes.pop()
            self._dot = dot

    def _range(self, block: Block, value: Any) -> None:
        if isinstance(value, Mapping):
            items: list[tuple[Any, Any]] = sorted(value.items())
        elif isinstance(value, (list, tuple)):
            items = list(enumerate(value))
        elif value in (None, ""):
            items = []
        else:
            raise TemplateFault("a range over what is no list")
        if not items:
            self._all(block.otherwise)
        for key, item in items:
            self._dot = item
            names = block.variables
            if names:
                self._scopes[-1][names[-1]] = item
            if len(names) > 1:
                self._scopes[-1][names[0]] = key
            try:
                self._all(block.body)
            except _Left as left:
                if left.kind == "break":
                    break

    # --- values -----------------------------------------------------------------------------

    def _value(self, expression: Expression) -> Any:
        self._budget.spend_steps(1)
        match expression:
            case Constant(value):
                return value
            case Path(variable, fields):
                return _fields(self._variable(variable), fields)
            case FieldOf(value, fields):
                return _fields(self._value(value), fields)
            case Call("and" | "or" as function, operands):
                return self._logic(function, operands)
            case Call(function, operands):
                return self._call(function, [self._value(operand) for operand in operands])

    def _variable(self, name: str) -> Any:
        if not name:
            return self._dot
        for scope in reversed(self._scopes):
            if name[1:] in scope:
                return scope[name[1:]]
        raise TemplateFault(f"there is no variable {name}")

    def _logic(self, function: str, operands: Sequence[Expression]) -> Any:
        """Return the first operand that decides, as Go does; the rest are not looked at."""
        value: Any = None
        for operand in operands:
            value = self._value(operand)
            if _is_true(value) == (function == "or"):
                break
        return value

    def _call(self, function: str, values: list[Any]) -> Any:
        try:
            if function in _PURE:
                return _PURE[function](*values)
            if function == "printf":
                return self._printf(*values)
            if function in ("json", "toJson"):
                return self._json(*values)
            if function == "currentDate":
                return self._date(*values)
            text = "".join(self._show(value) for value in values)
        except (TypeError, ValueError, LookupError) as error:
            raise TemplateFault(f"{function} can't be done: {error}") from error
        return text + ("\n" if function == "println" else "")

    def _date(self) -> str:
        return self._now.strftime("%Y-%m-%d")

    def _printf(self, pattern: str, *values: Any) -> str:
        pieces = pattern.split("%")
        out = [pieces.pop(0)]
        rest = iter(values)
        while pieces:
            piece = pieces.pop(0)
            if not piece and pieces:
                out.append("%" + pieces.pop(0))
                continue
            verb = piece[:1]
            value = next(rest, None)
            shown = self._json(value) if verb == "q" else self._show(value)
            if verb not in ("s", "d", "v", "q"):
                raise TemplateFault(f"printf knows %s, %d, %v and %q, not %{verb}")
            out += [shown, piece[1:]]
        self._budget.spend_chars(sum(map(len, out)))
        return "".join(out)


def _fields(value: Any, fields: Iterable[str]) -> Any:
    """Return a field of a field; the data has JSON's names, templates write Go's."""
    for field in fields:
        if not isinstance(value, Mapping):
            return None
        names = (field, _snake(field), field[:1].lower() + field[1:])
        value = next((value[name] for name in names if name in value), None)
    return value


def _snake(name: str) -> str:
    """ToolCalls: tool_calls; ToolCallID: tool_call_id."""
    result = ""
    for i, c in enumerate(name):
        if c.isupper() and i and not name[i - 1].isupper():
            result += "_"
        result += c.lower()
    return result


def _is_true(value: object) -> bool:
    return bool(value)


def _is_equal(first: Any, *others: Any) -> bool:
    """Whether the first is one of the others."""
    return first in others


def _index(value: Any, *keys: Any) -> Any:
    for key in keys:
        if isinstance(value, Mapping):
            value = value.get(key)
        elif isinstance(key, int) and not 0 <= key < len(value):
            raise LookupError(f"there is no item {key} among {len(value)}")
        else:
            value = value[key]
    return value


def _slice(value: Any, *ends: int) -> Any:
    return value[ends[0] :] if len(ends) == 1 else value[slice(*ends)]


_PURE: dict[str, Callable[..., Any]] = {
    "not": lambda value: not _is_true(value),
    "eq": _is_equal,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "len": lambda value: len(value or ""),
    "index": _index,
    "slice": _slice,
}
