"""The Responses API's bodies and objects. Source: OpenAI's API reference, November 2026."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from shimpy.server.openai.wire import Content, ContentPart, ReasoningBody, SamplingBody

# --- requests ---------------------------------------------------------------------------------


class ItemBody(msgspec.Struct):
    """An item of the input: a message, a call, a call's output, or a thought."""

    type: str | None = None
    role: str | None = None
    content: Content = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | dict[str, Any] | None = None
    output: Content = None
    summary: list[ContentPart] | None = None


class ToolBody(msgspec.Struct, omit_defaults=True):
    """A tool that is offered to the model; its function's fields are at the top."""

    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FormatBody(msgspec.Struct, omit_defaults=True):
    """What the answer has to be."""

    type: str
    name: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class TextBody(msgspec.Struct):
    """How the text of the answer is to look."""

    format: FormatBody | None = None


class ResponseBody(SamplingBody, kw_only=True):
    """POST /v1/responses."""

    input: str | list[ItemBody] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    max_output_tokens: int | None = None
    tools: list[ToolBody] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    text: TextBody | None = None
    reasoning: ReasoningBody | None = None
    truncation: str | None = None
    top_logprobs: int | None = None
    include: list[str] | None = None
    metadata: dict[str, Any] | None = None
    background: bool | None = None
    conversation: Any = None
    prompt: Any = None


# --- answers ----------------------------------------------------------------------------------

Status = Literal["in_progress", "completed", "incomplete"]


class OutputText(msgspec.Struct, kw_only=True):
    """The text of a message."""

    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[Any] = []
    logprobs: list[Any] = []


class ReasoningText(msgspec.Struct, kw_only=True):
    """The text of a thought."""

    type: Literal["reasoning_text"] = "reasoning_text"
    text: str


class MessageItem(msgspec.Struct, kw_only=True):
    """What the model says."""

    type: Literal["message"] = "message"
    id: str
    status: Status
    role: Literal["assistant"] = "assistant"
    content: list[OutputText]


class ReasoningItem(msgspec.Struct, kw_only=True):
    """What the model thinks; there are no summaries here."""

    type: Literal["reasoning"] = "reasoning"
    id: str
    status: Status
    summary: list[Any] = []
    content: list[ReasoningText]


class CallItem(msgspec.Struct, kw_only=True):
    """A call that the model makes; the arguments are JSON text."""

    type: Literal["function_call"] = "function_call"
    id: str
    status: Status
    call_id: str
    name: str
    arguments: str


Item = MessageItem | ReasoningItem | CallItem


class InputDetails(msgspec.Struct, kw_only=True):
    """Of the input's tokens, those that were in the KV cache already."""

    cached_tokens: int
    cache_write_tokens: int = 0


class OutputDetails(msgspec.Struct, kw_only=True):
    """Of the output's tokens, those of thoughts."""

    reasoning_tokens: int


class Usage(msgspec.Struct, kw_only=True):
    """How many tokens a response took."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class Incomplete(msgspec.Struct, kw_only=True):
    """Why a response was cut off."""

    reason: Literal["max_output_tokens"] = "max_output_tokens"


class TextConfig(msgspec.Struct, kw_only=True):
    """How the text was asked for."""

    format: FormatBody


class ReasoningConfig(msgspec.Struct, kw_only=True):
    """How the model was asked to think."""

    effort: str | None
    summary: None = None


class Response(msgspec.Struct, kw_only=True):
    """A response: what was asked for, and the output as far as it is there."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Status
    completed_at: int | None = None
    background: bool = False
    error: None = None
    incomplete_details: Incomplete | None = None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, Any]
    model: str
    output: list[Item] = []
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: ReasoningConfig
    store: bool
    temperature: float | None
    text: TextConfig
    tool_choice: Any
    tools: list[ToolBody]
    top_p: float | None
    truncation: str
    usage: Usage | None = None


class StreamEvent(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One event of a stream; which fields it has depends on its type."""

    type: str
    sequence_number: int
    response: Response | UnsetType = UNSET
    output_index: int | UnsetType = UNSET
    content_index: int | UnsetType = UNSET
    item_id: str | UnsetType = UNSET
    item: Item | UnsetType = UNSET
    part: OutputText | ReasoningText | UnsetType = UNSET
    delta: str | UnsetType = UNSET
    text: str | UnsetType = UNSET
    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET
    logprobs: list[Any] | UnsetType = UNSET
    code: str | UnsetType = UNSET
    message: str | UnsetType = UNSET
    param: str | UnsetType | None = UNSET
    # OpenAI's own SDKs raise an error where they see this.
    error: Any = UNSET
