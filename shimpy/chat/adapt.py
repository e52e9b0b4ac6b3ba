"""Turns a conversation into what a template can print: the dicts that Jinja sees."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from msgspec.structs import replace

from shimpy.chat.messages import ChatMessage, ToolCall, ToolSpec
from shimpy.chat.traits import Traits

SHORT_ID_CHARS = 9


def message_dict(message: ChatMessage, traits: Traits) -> dict[str, Any]:
    """Return a message as Hugging Face's chat templates expect it."""
    result: dict[str, Any] = {"role": message.role, "content": _content(message, traits)}
    if message.thinking and not traits.thinking_parts:
        result |= dict.fromkeys(traits.thinking_keys, message.thinking)
    if message.tool_calls:
        result["tool_calls"] = [_call_dict(call, traits) for call in message.tool_calls]
    if message.tool_name:
        result["name"] = message.tool_name
    if message.tool_call_id:
        result["tool_call_id"] = _call_id(message.tool_call_id, traits)
    return result


def _content(message: ChatMessage, traits: Traits) -> str | list[dict[str, str]] | None:
    if message.tool_calls and not message.content and traits.null_content:
        return None
    if message.thinking and traits.thinking_parts:
        thinking = {"type": "thinking", "thinking": message.thinking}
        return [thinking, {"type": "text", "text": message.content}]
    if traits.typed_content:
        return [{"type": "text", "text": message.content}]
    return message.content


def _call_dict(call: ToolCall, traits: Traits) -> dict[str, Any]:
    arguments: Any = call.arguments
    if traits.text_arguments:
        arguments = json.dumps(arguments, ensure_ascii=False)
    function = {"name": call.name, "arguments": arguments}
    return {"id": _call_id(call.id, traits), "type": "function", "function": function}


def _call_id(name: str, traits: Traits) -> str:
    """Return an id that the template takes; Mistral's demand nine letters or digits."""
    if not traits.short_ids or (len(name) == SHORT_ID_CHARS and name.isalnum()):
        return name
    return hashlib.sha256(name.encode(errors="replace")).hexdigest()[:SHORT_ID_CHARS]


def tool_dict(tool: ToolSpec) -> dict[str, Any]:
    """Return a tool's description as Hugging Face's chat templates expect it."""
    function = {
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.parameters,
    }
    return {"type": "function", "function": function}


# --- conversations that a template can't print as they are ------------------------------------


def adapt(
    messages: Sequence[ChatMessage], tools: Sequence[ToolSpec], traits: Traits
) -> list[ChatMessage]:
    """Return the conversation with what the template lacks said in another way."""
    result = list(messages)
    if not traits.developer:
        result = [replace(m, role="system") if m.role == "developer" else m for m in result]
    if tools and not traits.tools:
        result = with_system(result, describe_tools(tools))
    if not (traits.tool_calls and traits.tool_results):
        result = [_without_tools(message) for message in result]
    elif traits.one_call:
        result = one_call_each(result)
    if not traits.system:
        result = system_into_user(result)
    return result


def describe_tools(tools: Iterable[ToolSpec]) -> str:
    """Return the instructions for a model whose template says nothing of tools."""
    lines = "\n".join(json.dumps(tool_dict(tool), ensure_ascii=False) for tool in tools)
    return (
        f"You can call these functions:\n<tools>\n{lines}\n</tools>\n"
        "To call one, answer with a JSON object with its name and arguments, in tags:\n"
        '<tool_call>\n{"name": "...", "arguments": {...}}\n</tool_call>'
    )


def with_system(messages: Sequence[ChatMessage], text: str) -> list[ChatMessage]:
    """Return the conversation with `text` at the end of its first system message."""
    if messages and messages[0].role == "system":
        first = replace(messages[0], content=_join([messages[0].content, text]))
        return [first, *messages[1:]]
    return [ChatMessage(role="system", content=text), *messages]


def _without_tools(message: ChatMessage) -> ChatMessage:
    """Return a message with its calls or its tool's result as plain text."""
    if message.role == "tool":
        text = f"<tool_response>\n{message.content}\n</tool_response>"
        return ChatMessage(role="user", content=text)
    if not message.tool_calls:
        return message
    calls = [
        "<tool_call>\n"
        + json.dumps({"name": call.name, "arguments": call.arguments}, ensure_ascii=False)
        + "\n</tool_call>"
        for call in message.tool_calls
    ]
    content = "\n".join([message.content, *calls] if message.content else calls)
    return replace(message, content=content, tool_calls=())


def system_into_user(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """Return the conversation with all that the system says put before the user's words."""
    system = _join([m.content for m in messages if m.role == "system"])
    result = [m for m in messages if m.role != "system"]
    if not system:
        return result
    for i, message in enumerate(result):
        if message.role == "user":
            result[i] = replace(message, content=_join([system, message.content]))
            return result
    return [ChatMessage(role="user", content=system), *result]


def tidy(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """Return the conversation as the strictest templates want it.

    One system message, at the front; user and assistant by turns, the user first; one call
    for each assistant message, followed by its result.
    """
    system = _join([m.content for m in messages if m.role == "system"])
    result: list[ChatMessage] = []
    for message in one_call_each([m for m in messages if m.role != "system"]):
        last = result[-1] if result else None
        if last is None and message.role != "user":
            result.append(ChatMessage(role="user"))
        if last is not None and _can_merge(last, message):
            result[-1] = replace(
                message,
                content=_join([last.content, message.content]),
                thinking=_join([last.thinking, message.thinking]),
                images=last.images + message.images,
            )
        else:
            result.append(message)
    return [ChatMessage(role="system", content=system), *result] if system else result


def merge_thinking(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """Return the conversation with what was said before a call as part of the thinking.

    gpt-oss's template takes one of the two in a message that makes a call, not both.
    """
    return [
        replace(m, thinking=_join([m.thinking, m.content]), content="")
        if m.tool_calls and m.thinking and m.content
        else m
        for m in messages
    ]


def _can_merge(first: ChatMessage, second: ChatMessage) -> bool:
    return (
        first.role == second.role
        and first.role in ("user", "assistant")
        and not first.tool_calls
        and not second.tool_calls
    )


def one_call_each(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """Return the conversation with a message of its own for each call, its result behind it."""
    result: list[ChatMessage] = []
    i = 0
    while i < len(messages):
        message = messages[i]
        i += 1
        if len(message.tool_calls) <= 1:
            result.append(message)
            continue
        answers = []
        while i < len(messages) and messages[i].role == "tool":
            answers.append(messages[i])
            i += 1
        for n, call in enumerate(message.tool_calls):
            one = replace(message, tool_calls=(call,))
            result.append(one if n == 0 else replace(one, content="", thinking=""))
            result += _answers_to(call, answers)
        result += answers
    return result


def _answers_to(call: ToolCall, answers: list[ChatMessage]) -> list[ChatMessage]:
    """Take a call's result out of `answers`: by id, else the next one."""
    same: Callable[[ChatMessage], bool] = lambda answer: answer.tool_call_id == call.id  # noqa: E731
    found = next(filter(same, answers), answers[0] if answers else None)
    if found is None:
        return []
    answers.remove(found)
    return [found]


def _join(texts: Iterable[str]) -> str:
    return "\n\n".join(text for text in texts if text)
