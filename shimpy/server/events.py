"""What happens in a generation, in no dialect's words: Started, deltas and calls, Finished."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shimpy.chat.messages import ToolCall
from shimpy.protocol.messages import TokenLogprob


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """The prompt is in the KV cache; always the first event."""

    n_prompt: int
    n_cached: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ThinkingDelta:
    """More of what the model thinks before it answers."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ContentDelta:
    """More of the answer; whole characters."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    # Tokens that were generated since the last one: their text may still be held back.
    n_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCallMade:
    """A whole call of a tool; `index` counts the calls of one answer from 0."""

    index: int
    call: ToolCall


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The end; always the last event. Times in seconds."""

    reason: Literal["stop", "length"]
    stop_string: str | None
    n_prompt: int
    n_cached: int
    n_generated: int
    # Of the generated tokens, those of thoughts.
    n_thinking: int
    prefill_s: float
    decode_s: float
    load_s: float
    total_s: float
    tokens: tuple[int, ...]


Event = Started | ThinkingDelta | ContentDelta | ToolCallMade | Finished
