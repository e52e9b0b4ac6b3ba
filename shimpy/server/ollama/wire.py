"""Ollama's bodies and chunks as typed structs. Source: ollama/api/types.go.

Requests: null and a missing field are the same. Answers: Go's `omitempty` is `omit_defaults`
here, so a field without a default is always present; the order is Ollama's own.
"""

from __future__ import annotations

import math
import time
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

import msgspec

from shimpy.errors import InvalidOptionError
from shimpy.units import parse_duration

# --- requests ---------------------------------------------------------------------------------


class ToolCallFunction(msgspec.Struct):
    """A function's name and arguments; some clients send the arguments as JSON text."""

    name: str
    arguments: dict[str, Any] | str | None = None
    index: int | None = None


class ToolCallBody(msgspec.Struct):
    """A tool call in a message of the assistant's."""

    function: ToolCallFunction
    id: str | None = None


class MessageBody(msgspec.Struct):
    """One message of a conversation; `content` is missing where there are only tool calls."""

    role: str
    content: str | None = None
    thinking: str | None = None
    images: list[str] | None = None
    tool_calls: list[ToolCallBody] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


class ToolFunction(msgspec.Struct):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None


class ToolBody(msgspec.Struct):
    """A tool that is offered to the model."""

    function: ToolFunction
    type: str | None = None


class GenerateBody(msgspec.Struct):
    """POST /api/generate; the last five fields are the older native form's."""

    model: str | None = None
    prompt: str | None = None
    suffix: str | None = None
    system: str | None = None
    template: str | None = None
    context: list[int] | None = None
    stream: bool | None = None
    raw: bool | None = None
    format: Any = None
    keep_alive: Any = None
    images: list[str] | None = None
    options: dict[str, Any] | None = None
    think: Any = None
    truncate: bool | None = None
    shift: bool | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    messages: list[MessageBody] | None = None


class ChatBody(msgspec.Struct):
    """POST /api/chat."""

    model: str | None = None
    messages: list[MessageBody] | None = None
    stream: bool | None = None
    format: Any = None
    keep_alive: Any = None
    tools: list[ToolBody] | None = None
    options: dict[str, Any] | None = None
    think: Any = None
    truncate: bool | None = None
    shift: bool | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None


class EmbedBody(msgspec.Struct):
    """POST /api/embed."""

    model: str | None = None
    input: str | list[str] | None = None
    truncate: bool | None = None
    dimensions: int | None = None
    keep_alive: Any = None
    options: dict[str, Any] | None = None


class EmbeddingsBody(msgspec.Struct):
    """POST /api/embeddings, the older form: one text, one vector."""

    model: str | None = None
    prompt: str | None = None
    keep_alive: Any = None
    options: dict[str, Any] | None = None


class ShowBody(msgspec.Struct):
    """POST /api/show; Continue sends `name`."""

    model: str | None = None
    name: str | None = None
    verbose: bool | None = None


# --- answers ----------------------------------------------------------------------------------


class Logprob(msgspec.Struct, omit_defaults=True, kw_only=True):
    """A token with the logarithm of its probability, and its rivals."""

    token: str
    logprob: float
    bytes: list[int] = []
    top_logprobs: list[Logprob] = []


class CalledFunction(msgspec.Struct, omit_defaults=True, kw_only=True):
    """The function of a tool call; `arguments` is an object, not text."""

    index: int
    name: str
    arguments: dict[str, Any]


class CalledTool(msgspec.Struct, omit_defaults=True, kw_only=True):
    """A tool call that the model made."""

    id: str = ""
    function: CalledFunction


class AnswerMessage(msgspec.Struct, omit_defaults=True, kw_only=True):
    """The assistant's message, or the piece of it that a chunk brings."""

    role: str
    content: str
    thinking: str = ""
    tool_calls: list[CalledTool] = []


class GenerateChunk(msgspec.Struct, omit_defaults=True, kw_only=True):
    """A chunk of /api/generate, or the whole answer."""

    model: str
    created_at: str
    response: str
    thinking: str = ""
    done: bool
    done_reason: str = ""
    context: list[int] = []
    total_duration: int = 0
    load_duration: int = 0
    prompt_eval_count: int = 0
    prompt_eval_duration: int = 0
    eval_count: int = 0
    eval_duration: int = 0
    tool_calls: list[CalledTool] = []
    logprobs: list[Logprob] = []


class ChatChunk(msgspec.Struct, omit_defaults=True, kw_only=True):
    """A chunk of /api/chat, or the whole answer."""

    model: str
    created_at: str
    message: AnswerMessage
    done: bool
    done_reason: str = ""
    total_duration: int = 0
    load_duration: int = 0
    prompt_eval_count: int = 0
    prompt_eval_duration: int = 0
    eval_count: int = 0
    eval_duration: int = 0
    logprobs: list[Logprob] = []


class EmbedAnswer(msgspec.Struct, omit_defaults=True, kw_only=True):
    """The answer of /api/embed."""

    model: str
    # Of numbers, as JSON already.
    embeddings: list[msgspec.Raw]
    total_duration: int = 0
    load_duration: int = 0
    prompt_eval_count: int = 0


# --- values -----------------------------------------------------------------------------------


def parse_keep_alive(value: Any) -> float | None:
    """Return the seconds of a request's keep_alive; None: not given. Negative is forever.

    A number is seconds, a text is a Go duration and needs a unit ("300" is an error).

    Raises:
        InvalidOptionError: neither.
    """
    match value:
        case None:
            return None
        case bool() | list() | dict():
            raise InvalidOptionError(
                "keep_alive must be a number of seconds or a duration like 5m, not "
                f"{type(value).__name__}",
                option="keep_alive",
            )
        case str():
            try:
                seconds = parse_duration(value)
            except ValueError as error:
                raise InvalidOptionError(f"keep_alive: {error}", option="keep_alive") from None
        case _:
            seconds = float(min(value, FOREVER_S))
    return math.inf if seconds < 0 or seconds >= FOREVER_S else seconds


# What Go's time.Duration holds at most: 292 years, as seconds.
FOREVER_S = 9_223_372_036


def format_time(ns: int) -> str:
    """Return nanoseconds since the epoch as Go's RFC3339Nano in UTC: no trailing zeros."""
    seconds, fraction = divmod(ns, 1_000_000_000)
    digits = f".{fraction:09d}".rstrip("0").rstrip(".")
    return f"{_format_second(seconds)}{digits}Z"


# Each token of an answer tells its time.
@lru_cache(maxsize=8)
def _format_second(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def format_local_time(seconds: float) -> str:
    """Return seconds since the epoch as RFC 3339 in this machine's own time zone."""
    return datetime.fromtimestamp(seconds, UTC).astimezone().isoformat()


def now_text() -> str:
    """Return the present as `created_at` has it."""
    return format_time(time.time_ns())


def measured_ns(seconds: float) -> int:
    """Return a duration in nanoseconds, at least one.

    Ollama leaves out zeros, but what it measures never is: some clients demand the field.
    """
    return max(1, to_ns(seconds))


def to_ns(seconds: float) -> int:
    """Return a duration in nanoseconds."""
    return round(seconds * 1e9)
