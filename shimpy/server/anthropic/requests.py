"""Anthropic's bodies as requests in no dialect: checked here, and only here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, cast, get_args

import msgspec
from msgspec.structs import replace

from shimpy.chat.messages import ChatMessage, ToolSpec
from shimpy.errors import InvalidOptionError
from shimpy.parameters import check_number, check_stop
from shimpy.server.anthropic.messages import parse_conversation
from shimpy.server.anthropic.wire import (
    FormatBody,
    MessagesBody,
    ThinkingBody,
    ToolBody,
    ToolChoiceBody,
)
from shimpy.server.ollama.options import parse_options
from shimpy.server.ollama.requests import parse_model
from shimpy.server.ollama.wire import parse_keep_alive
from shimpy.server.options import Options
from shimpy.server.requests import (
    ChatPrompt,
    GenerationRequest,
    Think,
    ThinkLevel,
    ToolChoice,
)

_NUMBERS = ("temperature", "top_p", "top_k")
_EFFORTS: Mapping[str, ThinkLevel] = {
    **{level: level for level in get_args(ThinkLevel)},
    "xhigh": "max",
}
_THINKING_TYPES = ("enabled", "adaptive", "between_tools", "disabled")
_CHOICES = ("auto", "any", "tool", "none")


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What a client asks for, and how it wants the answer."""

    generation: GenerationRequest
    stream: bool
    shows_thinking: bool
    # Strings that end the answer with "stop_sequence"; the template's own end it otherwise.
    stop_sequences: tuple[str, ...]
    max_tokens: int


def parse_messages(body: MessagesBody) -> Asked:
    """Return what POST /v1/messages asks for.

    Raises:
        UserError: the message names what is wrong.
    """
    if body.max_tokens is None:
        raise InvalidOptionError('"max_tokens" is required', option="max_tokens")
    check_number("n_predict", "max_tokens", body.max_tokens)
    if body.max_tokens < 0:
        raise InvalidOptionError('"max_tokens" must be at least 0', option="max_tokens")
    generation = parse_prompt(body)
    options = replace(generation.options, n_predict=body.max_tokens)
    return Asked(
        generation=replace(generation, options=options),
        stream=bool(body.stream),
        shows_thinking=_shows_thinking(body.thinking),
        stop_sequences=options.stop or (),
        max_tokens=body.max_tokens,
    )


def parse_prompt(body: MessagesBody) -> GenerationRequest:
    """Return what both routes ask for: all but the length of the answer.

    Raises:
        UserError: the message names what is wrong.
    """
    if not body.messages:
        raise InvalidOptionError('"messages" must hold at least one message', option="messages")
    tools = _tools(body.tools or [])
    messages = parse_conversation(body.system, body.messages)
    output = body.output_config
    return GenerationRequest(
        model=parse_model(body.model),
        prompt=ChatPrompt(
            messages=messages,
            tools=tools,
            tool_choice=_tool_choice(body.tool_choice, tools),
            continues=_continues(messages[-1]),
        ),
        options=_options(body),
        output_format=_schema(body.output_format or (output.format if output else None)),
        keep_alive_s=parse_keep_alive(body.keep_alive),
        think=_think(body.thinking, output.effort if output else None),
        think_is_hint=True,
    )


def _continues(last: ChatMessage) -> bool:
    """Whether the conversation ends with the beginning of the answer."""
    return last.role == "assistant" and bool(last.content) and not last.tool_calls


def _options(body: MessagesBody) -> Options:
    values: dict[str, Any] = {}
    for name in _NUMBERS:
        value = getattr(body, name)
        if value is not None:
            check_number(name, name, value)
            values[name] = value
    if body.stop_sequences is not None:
        values["stop"] = check_stop("stop_sequences", body.stop_sequences)
    return Options(**values).over(parse_options(body.options))


def _tools(bodies: list[ToolBody]) -> tuple[ToolSpec, ...]:
    for i, body in enumerate(bodies):
        where = f"tools[{i}]"
        if (body.type or "custom") != "custom":
            raise InvalidOptionError(
                f'"{where}" is of type {str(body.type)[:40]!r}, one of Anthropic\'s own tools; '
                "tools with an input_schema work here",
                option=where,
            )
        if not body.name:
            raise InvalidOptionError(f'"{where}.name" is required', option=where)
    return tuple(
        ToolSpec(
            name=body.name or "",
            description=body.description or "",
            parameters=body.input_schema or {},
        )
        for body in bodies
    )


def _tool_choice(body: ToolChoiceBody | None, tools: tuple[ToolSpec, ...]) -> ToolChoice:
    if body is None:
        return ToolChoice()
    if body.type not in _CHOICES:
        raise InvalidOptionError(
            f'"tool_choice.type" must be one of {", ".join(_CHOICES)}, not {body.type[:40]!r}',
            option="tool_choice",
        )
    if body.type in {"any", "tool"} and not tools:
        raise InvalidOptionError(
            "tool_choice demands a call, but no tools are given", option="tools"
        )
    name = ""
    if body.type == "tool":
        name = body.name or ""
        if all(tool.name != name for tool in tools):
            known = ", ".join(tool.name for tool in tools)
            raise InvalidOptionError(
                f"tool_choice names the tool {name[:100]!r}; the tools are: {known}",
                option="tool_choice",
            )
    mode = {"auto": "auto", "none": "none"}.get(body.type, "required")
    return ToolChoice(
        mode=cast("Any", mode), name=name, allows_several=not body.disable_parallel_tool_use
    )


def _think(thinking: ThinkingBody | None, effort: str | None) -> Think:
    """Return whether and how hard to think: not at all unless it is asked for."""
    if effort is not None and effort not in _EFFORTS:
        raise InvalidOptionError(
            f'"output_config.effort" must be one of {", ".join(_EFFORTS)}, not {effort[:40]!r}',
            option="output_config",
        )
    if thinking is not None and thinking.type not in _THINKING_TYPES:
        raise InvalidOptionError(
            f'"thinking.type" must be one of {", ".join(_THINKING_TYPES)}, not '
            f"{thinking.type[:40]!r}",
            option="thinking",
        )
    if thinking is None or thinking.type == "disabled":
        return False
    return True if effort is None else _EFFORTS[effort]


def _shows_thinking(thinking: ThinkingBody | None) -> bool:
    return thinking is not None and thinking.type != "disabled" and thinking.display != "omitted"


def _schema(body: FormatBody | None) -> Mapping[str, Any] | None:
    if body is None:
        return None
    if body.type != "json_schema" or body.schema is None:
        raise InvalidOptionError(
            'the format of the output must be {"type": "json_schema", "schema": {...}}, not type '
            f"{json.dumps(body.type[:40])}",
            option="output_config",
        )
    return body.schema
