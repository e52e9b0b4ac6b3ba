"""Anthropic's content blocks as a conversation in no dialect."""

from __future__ import annotations

from collections.abc import Sequence

from shimpy.chat.messages import ChatMessage, ToolCall
from shimpy.errors import InvalidOptionError
from shimpy.server.anthropic.wire import Block, MessageBody

_ROLES = ("user", "assistant", "system")
# Blocks that only their own servers can read.
_OPAQUE = frozenset({"redacted_thinking"})


def parse_conversation(
    system: str | Sequence[Block] | None, bodies: Sequence[MessageBody]
) -> tuple[ChatMessage, ...]:
    """Return the messages of a conversation, what the system says first.

    A user's turn with results of tools becomes one message for each result, then one of its
    text.

    Raises:
        InvalidOptionError: an unknown role, or a block that can't be taken; the message names it.
    """
    messages: list[ChatMessage] = []
    opening = _text(system, "system")
    if opening:
        messages.append(ChatMessage(role="system", content=opening))
    # A result names the call that it answers; templates want the tool's name.
    called: dict[str, str] = {}
    for i, body in enumerate(bodies):
        where = f"messages[{i}]"
        match body.role:
            case "user":
                messages += _user(body.content, f"{where}.content", called)
            case "assistant":
                messages.append(_assistant(body.content, f"{where}.content", called))
            case "system":
                text = _text(body.content, f"{where}.content")
                messages.append(ChatMessage(role="system", content=text))
            case _:
                raise InvalidOptionError(
                    f'"{where}.role" must be one of {", ".join(_ROLES)}, not {body.role[:40]!r}',
                    option=f"{where}.role",
                )
    return tuple(messages)


def _user(content: str | Sequence[Block], where: str, called: dict[str, str]) -> list[ChatMessage]:
    if isinstance(content, str):
        return [ChatMessage(role="user", content=content)]
    results: list[ChatMessage] = []
    texts: list[str] = []
    for i, block in enumerate(content):
        at = f"{where}[{i}]"
        if block.type != "tool_result":
            texts.append(_block_text(block, at))
            continue
        call_id = block.tool_use_id or ""
        if isinstance(block.content, dict):
            raise InvalidOptionError(f'"{at}.content" must be text or blocks', option=at)
        results.append(
            ChatMessage(
                role="tool",
                content=_text(block.content, f"{at}.content"),
                tool_name=called.get(call_id, ""),
                tool_call_id=call_id,
            )
        )
    if results and not any(texts):
        return results
    return [*results, ChatMessage(role="user", content="\n".join(texts))]


def _assistant(content: str | Sequence[Block], where: str, called: dict[str, str]) -> ChatMessage:
    if isinstance(content, str):
        return ChatMessage(role="assistant", content=content)
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[ToolCall] = []
    for i, block in enumerate(content):
        at = f"{where}[{i}]"
        if block.type == "thinking":
            thoughts.append(block.thinking or "")
        elif block.type == "tool_use":
            if not block.name:
                raise InvalidOptionError(f'"{at}.name" is required', option=at)
            calls.append(ToolCall(id=block.id or "", name=block.name, arguments=block.input or {}))
            called[block.id or ""] = block.name
        elif block.type not in _OPAQUE:
            texts.append(_block_text(block, at))
    return ChatMessage(
        role="assistant",
        content="\n".join(texts),
        thinking="\n".join(thoughts),
        tool_calls=tuple(calls),
    )


def _text(content: str | Sequence[Block] | None, where: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(_block_text(block, f"{where}[{i}]") for i, block in enumerate(content))


def _block_text(block: Block, where: str) -> str:
    """Return the text of a block that is nothing but text."""
    match block.type:
        case "text":
            return block.text or ""
        case "document":
            return _titled(block.title, _document(block, where))
        case "search_result" if isinstance(block.content, list):
            return _titled(block.title or str(block.source or ""), _text(block.content, where))
        case "image":
            raise InvalidOptionError(
                f'"{where}" is an image; images are not understood here, only text', option=where
            )
        case _:
            raise InvalidOptionError(
                f'"{where}" is of type {block.type[:40]!r}, which has no place here; text, '
                "thinking, tool_use and tool_result have",
                option=where,
            )


def _document(block: Block, where: str) -> str:
    source = block.source if isinstance(block.source, dict) else {}
    data = source.get("data")
    if source.get("type") != "text" or not isinstance(data, str):
        raise InvalidOptionError(
            f'"{where}" is a document of type {str(source.get("type"))[:40]!r}; documents of '
            "plain text can be read here",
            option=where,
        )
    return data


def _titled(title: str | None, text: str) -> str:
    return f"{title}\n{text}" if title else text
