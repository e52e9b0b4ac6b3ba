"""Grammars for whole answers: JSON by a schema, or a call that has to be made.

A model that thinks may think first: the grammar lets any text through up to the end of the
thought.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from shimpy.chat.formats import ChatFormat
from shimpy.chat.gbnf import Rules, literal, until
from shimpy.chat.messages import ToolSpec
from shimpy.chat.schema import add_schema
from shimpy.errors import UserError

_ANY_OBJECT = {"type": "object"}


def json_answer(
    chat_format: ChatFormat,
    *,
    schema: object = None,
    tools: Sequence[ToolSpec] = (),
    prompt: str = "",
    allow_thinking: bool = True,
) -> str:
    """Return the grammar of an answer that is JSON by a schema; None: any JSON object.

    Where there are `tools` it may be a call instead. `prompt` is the rendered prompt, which may
    end inside a thought; without `allow_thinking` a thought is let through only there.

    Raises:
        UserError: a part of the schema can't be compiled; the message names it.
    """
    rules = Rules()
    body = add_schema(rules, _ANY_OBJECT if schema is None else schema)
    if chat_format.kind == "harmony" and not _in_harmony_message(prompt):
        body = f"{literal('<|channel|>final<|message|>')} {body}"
    if tools:
        body = f"({body} | {_calls(rules, tools, chat_format)})"
    return _after_thought(rules, body, chat_format, prompt, allow_thinking=allow_thinking)


def call_answer(
    chat_format: ChatFormat,
    tools: Sequence[ToolSpec],
    *,
    name: str | None = None,
    prompt: str = "",
    allow_thinking: bool = True,
) -> str:
    """Return the grammar of an answer that is one call: of any of the tools, or of `name`.

    Raises:
        UserError: there is no such tool, or its parameters can't be compiled.
    """
    chosen = [tool for tool in tools if name is None or tool.name == name]
    if not chosen:
        known = ", ".join(tool.name for tool in tools) or "none"
        raise UserError(f"there is no tool named {name!r}; the tools are: {known}")
    rules = Rules()
    body = _calls(rules, chosen, chat_format)
    return _after_thought(rules, body, chat_format, prompt, allow_thinking=allow_thinking)


def _calls(rules: Rules, tools: Sequence[ToolSpec], chat_format: ChatFormat) -> str:
    return rules.add("call", " | ".join(_call(rules, tool, chat_format) for tool in tools))


def _call(rules: Rules, tool: ToolSpec, chat_format: ChatFormat) -> str:
    properties = tool.parameters.get("properties")
    if chat_format.tagged_calls and isinstance(properties, Mapping):
        return _tagged_call(rules, tool, properties)
    try:
        arguments = add_schema(rules, {"type": "object", **tool.parameters})
    except UserError as error:
        raise UserError(f"the parameters of the tool {tool.name!r}: {error}") from error
    if chat_format.kind == "harmony":
        header = f"<|channel|>commentary to=functions.{tool.name} <|constrain|>json<|message|>"
        return f"{literal(header)} {arguments}"
    frame = chat_format.frame
    written = json.dumps(tool.name, ensure_ascii=False)[1:-1]
    before = literal(frame.before + written + frame.between)
    return f"{before} {arguments} {literal(frame.after) if frame.after else ''}".rstrip()


def _tagged_call(rules: Rules, tool: ToolSpec, properties: Mapping[str, object]) -> str:
    """Return a call as Qwen Coder writes it; a text stands in its tags without quotes."""
    required = tool.parameters.get("required") or ()
    parts = [literal(f"<tool_call>\n<function={tool.name}>\n")]
    for name, schema in properties.items():
        try:
            value = _tagged_value(rules, schema, tool.parameters)
        except UserError as error:
            place = f"the parameter {name!r} of the tool {tool.name!r}"
            raise UserError(f"{place}: {error}") from error
        part = f"{literal(f'<parameter={name}>' + chr(10))} {value}"
        parts.append(part if name in required else f"({part})?")
    return " ".join([*parts, literal("</function>\n</tool_call>")])


def _tagged_value(rules: Rules, schema: object, root: Mapping[str, object]) -> str:
    end = "\n</parameter>\n"
    if isinstance(schema, Mapping) and schema.get("type") == "string":
        texts = schema.get("enum")
        if not isinstance(texts, list):
            return until(rules, end)
        options = " | ".join(literal(text) for text in texts if isinstance(text, str))
        return f"({options}) {literal(end)}"
    return f"{add_schema(rules, schema, root=root)} {literal(end)}"


def _after_thought(
    rules: Rules, body: str, chat_format: ChatFormat, prompt: str, *, allow_thinking: bool
) -> str:
    tags = chat_format.thinking
    if chat_format.kind == "harmony":
        if allow_thinking and not _in_harmony_message(prompt):
            opener, closer = "<|channel|>analysis<|message|>", "<|end|>"
            thought = f"{literal(opener)} {until(rules, closer)} {literal('<|start|>assistant')}"
            body = f"({thought})? {body}"
    elif chat_format.opens_thinking(prompt) and tags is not None:
        body = f'{until(rules, tags.closer)} "\\n"{{0,2}} {body}'
    elif allow_thinking and tags is not None:
        thought = f'{literal(tags.opener)} {until(rules, tags.closer)} "\\n"{{0,2}}'
        body = f"({thought})? {body}"
    rules.set_root(body)
    return rules.text()


def _in_harmony_message(prompt: str) -> bool:
    return "<|message|>" in prompt.rpartition("<|start|>")[2]
