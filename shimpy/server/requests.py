"""What a client wants of a model, in no dialect's words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from shimpy.chat.messages import ChatMessage, ToolSpec
from shimpy.server.options import Options

ThinkLevel = Literal["low", "medium", "high", "max"]
Think = bool | ThinkLevel | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainPrompt:
    """Text as the client wrote it, control tokens included; no template."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GapPrompt:
    """Text before and after a gap that the model fills by its own fill-in-the-middle tokens."""

    prefix: str
    suffix: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatPrompt:
    """A conversation, rendered by the model's template, or by the request's own."""

    messages: tuple[ChatMessage, ...]
    tools: tuple[ToolSpec, ...] = ()
    # Tokens of an earlier answer that this turn follows.
    context: tuple[int, ...] = ()
    # Jinja.
    template: str | None = None
    # A single prompt: a model without a template gets it as it is.
    is_one_turn: bool = False


Prompt = PlainPrompt | GapPrompt | ChatPrompt


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """What a client wants, in no dialect."""

    model: str
    prompt: Prompt
    options: Options = field(default_factory=Options)
    # "json", a JSON schema, or None for free text.
    output_format: Literal["json"] | Mapping[str, Any] | None = None
    keep_alive_s: float | None = None
    think: Think = None
    # A prompt over the context is cut in its middle; else it is an error.
    truncate: bool = False
    # Generation goes on past a full context, forgetting its beginning.
    shift: bool = False
    # Finished carries the tokens of prompt and answer.
    wants_tokens: bool = False
