"""OpenAI's messages and tools as a conversation in no dialect."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

from shimpy.chat.messages import ChatMessage, Role, ToolCall, ToolSpec
from shimpy.errors import InvalidOptionError
from shimpy.server.openai.wire import (
    Content,
    ContentPart,
    FunctionBody,
    MessageBody,
    ResponseFormat,
    ToolBody,
)
from shimpy.server.requests import ToolChoice

# "function" is the older name of a tool's result.
_ROLES: Mapping[str, Role] = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
_TEXT_PARTS = frozenset({"text", "input_text", "output_text", "summary_text", "reasoning_text"})
_IMAGE_PARTS = frozenset({"image_url", "input_image"})
_MODES = frozenset({"none", "auto", "required"})


def parse_messages(bodies: Sequence[MessageBody]) -> tuple[ChatMessage, ...]:
    """Return the messages of a conversation.

    Raises:
        InvalidOptionError: an unknown role, or a part that can't be taken.
    """
    # A tool's result names the call that it answers; templates want the tool's name.
    called = {
        call.id: call.function.name for body in bodies for call in body.tool_calls or [] if call.id
    }
    return tuple(_message(body, f"messages[{i}]", called) for i, body in enumerate(bodies))


def parse_role(role: str, where: str) -> Role:
    """Return a role.

    Raises:
        InvalidOptionError: there is no such role; `where` is the message.
    """
    if role not in _ROLES:
        raise InvalidOptionError(
            f'"{where}.role" must be one of {", ".join(_ROLES)}, not {role[:40]!r}',
            option=f"{where}.role",
        )
    return _ROLES[role]


def parse_content(content: Content, where: str) -> tuple[str, tuple[bytes, ...]]:
    """Return a message's text, its parts one line each, and its images.

    Raises:
        InvalidOptionError: a part of another kind, or an image that is only linked to.
    """
    if content is None or isinstance(content, str):
        return content or "", ()
    texts: list[str] = []
    images: list[bytes] = []
    for i, part in enumerate(content):
        at = f"{where}.content[{i}]"
        if part.type in _IMAGE_PARTS:
            images.append(_image(part, at))
        elif part.type == "refusal":
            texts.append(part.refusal or "")
        elif part.type is None or part.type in _TEXT_PARTS:
            texts.append(part.text or "")
        else:
            raise InvalidOptionError(
                f'"{at}" is of type {part.type[:40]!r}; text and images are taken', option=at
            )
    return "\n".join(texts), tuple(images)


def parse_arguments(given: str | Mapping[str, Any] | None, where: str) -> Mapping[str, Any]:
    """Return the arguments of a call.

    Raises:
        InvalidOptionError: they are no JSON object.
    """
    if not isinstance(given, str):
        return given or {}
    try:
        value = json.loads(given.strip() or "{}")
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise InvalidOptionError(f'"{where}" must be a JSON object as text', option=where)
    return value


def parse_tools(bodies: Sequence[ToolBody]) -> tuple[ToolSpec, ...]:
    """Return the tools that are offered to the model.

    Raises:
        InvalidOptionError: one is no function, or has no name.
    """
    return tuple(
        parse_tool(body.type, body.function, f"tools[{i}]") for i, body in enumerate(bodies)
    )


def parse_tool(kind: str | None, function: FunctionBody | None, where: str) -> ToolSpec:
    """Return one tool; errors as `parse_tools`."""
    if (kind or "function") != "function":
        raise InvalidOptionError(
            f'"{where}" is of type {str(kind)[:40]!r}; functions are the tools that work here',
            option=where,
        )
    if function is None or not function.name:
        raise InvalidOptionError(f'"{where}" must name its function', option=where)
    return ToolSpec(
        name=function.name,
        description=function.description or "",
        parameters=function.parameters or {},
    )


def parse_tool_choice(
    given: Any, tools: tuple[ToolSpec, ...], *, allows_several: bool
) -> tuple[tuple[ToolSpec, ...], ToolChoice]:
    """Return the tools that may be called, and whether they may, must or must not be.

    Both forms are read: {"type": "function", "function": {"name": ...}} of chat completions, and
    {"type": "function", "name": ...} of responses; likewise for allowed_tools.

    Raises:
        InvalidOptionError: it is none of the forms, or names a tool that there is not.
    """
    if given is None:
        return tools, ToolChoice(allows_several=allows_several)
    if isinstance(given, str) and given in _MODES:
        mode, name = cast('Literal["none", "auto", "required"]', given), ""
    elif isinstance(given, dict) and given.get("type") == "function":
        mode, name = "required", _name_in(given, tools)
    elif isinstance(given, dict) and given.get("type") == "allowed_tools":
        inner = given.get("allowed_tools", given)
        inner = inner if isinstance(inner, dict) else {}
        listed = inner.get("tools")
        names = {_name_in(one, tools) for one in listed} if isinstance(listed, list) else set()
        tools = tuple(tool for tool in tools if tool.name in names)
        mode, name = "required" if inner.get("mode") == "required" else "auto", ""
    else:
        raise InvalidOptionError(
            "tool_choice must be none, auto, required or the function to call, not "
            f"{json.dumps(given)[:100]}",
            option="tool_choice",
        )
    if mode == "required" and not tools:
        raise InvalidOptionError(
            "tool_choice requires a call, but no tools are given", option="tools"
        )
    return tools, ToolChoice(mode=mode, name=name, allows_several=allows_several)


def parse_format(
    given: ResponseFormat | None, *, name: str
) -> Literal["json"] | Mapping[str, Any] | None:
    """Return "json", a JSON schema, or None for free text.

    Raises:
        InvalidOptionError: an unknown type, or no schema where there has to be one.
    """
    if given is None or given.type in {None, "text"}:
        return None
    if given.type == "json_object":
        return given.schema or "json"
    if given.type != "json_schema":
        raise InvalidOptionError(
            f'"{name}.type" must be text, json_object or json_schema, not {str(given.type)[:40]!r}',
            option=f"{name}.type",
        )
    schema = given.json_schema.schema if given.json_schema is not None else given.schema
    if schema is None:
        raise InvalidOptionError(f'"{name}" has no schema', option=name)
    return schema


def _message(body: MessageBody, where: str, called: Mapping[str, str]) -> ChatMessage:
    text, images = parse_content(body.content, where)
    calls = tuple(
        ToolCall(
            id=call.id or "",
            name=call.function.name,
            arguments=parse_arguments(
                call.function.arguments, f"{where}.tool_calls[{i}].function.arguments"
            ),
        )
        for i, call in enumerate(body.tool_calls or [])
    )
    role = parse_role(body.role, where)
    return ChatMessage(
        role=role,
        content=text,
        thinking=body.reasoning_content or body.reasoning or "",
        tool_calls=calls,
        tool_name=(called.get(body.tool_call_id or "") or body.name or "")
        if role == "tool"
        else "",
        tool_call_id=body.tool_call_id or "",
        images=images,
    )


def _image(part: ContentPart, where: str) -> bytes:
    url = part.image_url.get("url") if isinstance(part.image_url, dict) else part.image_url
    head, _, data = str(url or "").partition(",")
    if not head.startswith("data:"):
        raise InvalidOptionError(
            f'"{where}" must hold its image as a data: URL; links are not followed', option=where
        )
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise InvalidOptionError(f'"{where}" is not valid base64', option=where) from None


def _name_in(given: Any, tools: Sequence[ToolSpec]) -> str:
    inner = given.get("function", given) if isinstance(given, dict) else {}
    name = inner.get("name") if isinstance(inner, dict) else None
    if not isinstance(name, str) or all(tool.name != name for tool in tools):
        known = ", ".join(tool.name for tool in tools) or "none"
        raise InvalidOptionError(
            f"tool_choice names the tool {str(name)[:100]!r}; the tools are: {known}",
            option="tool_choice",
        )
    return name
