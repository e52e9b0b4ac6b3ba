"""Anthropic's bodies, messages and events as typed structs.

Source: https://docs.anthropic.com/en/api/messages and messages-streaming. What a request may
hold and has no meaning here (metadata, cache_control, service_tier, container) is ignored.
"""

from __future__ import annotations

from typing import Any

import msgspec

# --- requests ---------------------------------------------------------------------------------


class Block(msgspec.Struct):
    """A content block of any type; which fields it has depends on `type`."""

    type: str
    text: str | None = None
    thinking: str | None = None
    # Of a tool_use.
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    # Of a tool_result.
    tool_use_id: str | None = None
    content: str | list[Block] | dict[str, Any] | None = None
    # Of an image, a document or a search result.
    source: Any = None
    title: str | None = None


class MessageBody(msgspec.Struct):
    """One turn of a conversation."""

    role: str
    content: str | list[Block]


class ToolBody(msgspec.Struct):
    """A tool; those with a type other than "custom" are Anthropic's own."""

    name: str | None = None
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None


class ToolChoiceBody(msgspec.Struct):
    """Whether a tool may, must or must not be used."""

    type: str
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class ThinkingBody(msgspec.Struct):
    """Whether the model is to think first; its budget can't be kept to and is ignored."""

    type: str
    budget_tokens: int | None = None
    display: str | None = None


class FormatBody(msgspec.Struct):
    """The form of the answer."""

    type: str
    schema: dict[str, Any] | None = None


class OutputConfig(msgspec.Struct):
    """How hard to think, and the form of the answer."""

    effort: str | None = None
    format: FormatBody | None = None


class MessagesBody(msgspec.Struct):
    """POST /v1/messages and /v1/messages/count_tokens; the last two fields are shimpy's own."""

    model: str | None = None
    messages: list[MessageBody] | None = None
    max_tokens: int | None = None
    system: str | list[Block] | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    tools: list[ToolBody] | None = None
    tool_choice: ToolChoiceBody | None = None
    thinking: ThinkingBody | None = None
    output_config: OutputConfig | None = None
    # The older place of output_config.format.
    output_format: FormatBody | None = None
    keep_alive: Any = None
    # Ollama's options.
    options: dict[str, Any] | None = None


# --- answers ----------------------------------------------------------------------------------


class TextBlock(msgspec.Struct, tag_field="type", tag="text"):
    """A piece of the answer."""

    text: str


class ThinkingBlock(msgspec.Struct, tag_field="type", tag="thinking"):
    """What the model thought; there is no key here to sign it with."""

    thinking: str
    signature: str = ""


class ToolUseBlock(msgspec.Struct, tag_field="type", tag="tool_use"):
    """A call of a tool."""

    id: str
    name: str
    input: dict[str, Any]


AnswerBlock = TextBlock | ThinkingBlock | ToolUseBlock


class Usage(msgspec.Struct, kw_only=True):
    """Tokens; `input_tokens` are those that were not in the KV cache."""

    input_tokens: int
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int
    output_tokens: int


class Message(msgspec.Struct, tag_field="type", tag="message", kw_only=True):
    """An answer, or its beginning in a stream."""

    id: str
    role: str = "assistant"
    model: str
    content: list[AnswerBlock]
    stop_reason: str | None = None
    stop_sequence: str | None = None
    usage: Usage


class MessageStart(msgspec.Struct, tag_field="type", tag="message_start"):
    """The first event."""

    message: Message


class BlockStart(msgspec.Struct, tag_field="type", tag="content_block_start"):
    """A block begins; it is empty yet."""

    index: int
    content_block: AnswerBlock


class TextDelta(msgspec.Struct, tag_field="type", tag="text_delta"):
    """More of a text block."""

    text: str


class ThinkingTextDelta(msgspec.Struct, tag_field="type", tag="thinking_delta"):
    """More of a thinking block."""

    thinking: str


class InputDelta(msgspec.Struct, tag_field="type", tag="input_json_delta"):
    """More of a tool's input, as a piece of its JSON."""

    partial_json: str


class BlockDelta(msgspec.Struct, tag_field="type", tag="content_block_delta"):
    """More of a block."""

    index: int
    delta: TextDelta | ThinkingTextDelta | InputDelta


class BlockStop(msgspec.Struct, tag_field="type", tag="content_block_stop"):
    """A block is whole."""

    index: int


class StopDelta(msgspec.Struct):
    """Why the answer ended."""

    stop_reason: str
    stop_sequence: str | None


class MessageDelta(msgspec.Struct, tag_field="type", tag="message_delta"):
    """The message is whole."""

    delta: StopDelta
    usage: Usage


class MessageStop(msgspec.Struct, tag_field="type", tag="message_stop"):
    """The last event."""


StreamEvent = MessageStart | BlockStart | BlockDelta | BlockStop | MessageDelta | MessageStop
