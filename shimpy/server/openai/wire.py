"""OpenAI's request bodies as typed structs. Source: OpenAI's API reference, November 2026.

Null and a missing field are the same. Fields marked as additions are no part of OpenAI's own
API: they are what Ollama's and llama.cpp's clients send on the same paths.
"""

from __future__ import annotations

from typing import Any

import msgspec


class ContentPart(msgspec.Struct):
    """A part of a message; which field it has depends on its type."""

    type: str | None = None
    text: str | None = None
    refusal: str | None = None
    # {"url": ...} in chat completions, the URL alone in responses.
    image_url: dict[str, Any] | str | None = None


Content = str | list[ContentPart] | None


class CalledFunction(msgspec.Struct):
    """The function of a call; the arguments are JSON text, with some clients an object."""

    name: str
    arguments: str | dict[str, Any] | None = None


class CalledTool(msgspec.Struct):
    """A call that the assistant made."""

    function: CalledFunction
    id: str | None = None


class MessageBody(msgspec.Struct):
    """One message of a conversation."""

    role: str
    content: Content = None
    name: str | None = None
    tool_calls: list[CalledTool] | None = None
    tool_call_id: str | None = None
    # Additions: what an assistant thought, by its two names.
    reasoning: str | None = None
    reasoning_content: str | None = None


class FunctionBody(msgspec.Struct):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolBody(msgspec.Struct):
    """A tool that is offered to the model."""

    type: str | None = None
    function: FunctionBody | None = None


class StreamOptions(msgspec.Struct):
    """What a stream carries besides the answer."""

    include_usage: bool | None = None


class JsonSchemaBody(msgspec.Struct):
    """A schema with its name."""

    schema: dict[str, Any] | None = None
    name: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct):
    """What the answer has to be; `schema` beside json_object is llama.cpp's addition."""

    type: str | None = None
    json_schema: JsonSchemaBody | None = None
    schema: dict[str, Any] | None = None


class ReasoningBody(msgspec.Struct):
    """How hard the model is to think."""

    effort: str | None = None


class SamplingBody(msgspec.Struct, kw_only=True):
    """What all requests for text may say; the second half are additions."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: Any = None

    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repeat_penalty: float | None = None
    grammar: str | None = None
    keep_alive: Any = None
    # Ollama's, for whatever has no field here.
    options: dict[str, Any] | None = None


class ChatBody(SamplingBody, kw_only=True):
    """POST /v1/chat/completions."""

    messages: list[MessageBody] | None = None
    n: int | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: ResponseFormat | None = None
    tools: list[ToolBody] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    # Additions.
    reasoning: ReasoningBody | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    # vLLM's: the answer goes on from the last message, which is the assistant's.
    continue_final_message: bool | None = None


class CompletionBody(SamplingBody, kw_only=True):
    """POST /v1/completions."""

    prompt: str | list[Any] | None = None
    suffix: str | None = None
    echo: bool | None = None
    n: int | None = None
    best_of: int | None = None
    max_tokens: int | None = None
    # How many rivals each token is shown with.
    logprobs: int | None = None


class EmbeddingBody(msgspec.Struct, kw_only=True):
    """POST /v1/embeddings; the last three are additions."""

    model: str | None = None
    input: str | list[Any] | None = None
    encoding_format: str | None = None
    dimensions: int | None = None
    truncate: bool | None = None
    keep_alive: Any = None
    options: dict[str, Any] | None = None
