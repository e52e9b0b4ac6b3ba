"""What happens in a generation, in no dialect's words: Started, deltas and calls, Finished."""

from __future__ import annotations

from typing import Literal

import msgspec

from shimpy.chat.messages import ToolCall
from shimpy.protocol.messages import TokenLogprob


class Started(msgspec.Struct, frozen=True, kw_only=True):
    """The prompt is in the KV cache; always the first event."""

    n_prompt: int
    n_cached: int


class ThinkingDelta(msgspec.Struct, frozen=True, kw_only=True):
    """More of what the model thinks before it answers."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


class ContentDelta(msgspec.Struct, frozen=True, kw_only=True):
    """More of the answer; whole characters."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    # Tokens that were generated since the last one: their text may still be held back.
    n_tokens: int = 0


class ToolCallMade(msgspec.Struct, frozen=True, kw_only=True):
    """A whole call of a tool; `index` counts the calls of one answer from 0."""

    index: int
    call: ToolCall


class Finished(msgspec.Struct, frozen=True, kw_only=True):
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
