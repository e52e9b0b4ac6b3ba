"""What a template can do, found by rendering it with known words and looking for them."""

from __future__ import annotations

from typing import Any

import msgspec

THINKING_KEYS = ("reasoning_content", "thinking", "reasoning")


class Traits(msgspec.Struct, frozen=True, kw_only=True):
    """What a template takes and prints."""

    # Content must be a list of {"type": "text", "text": ...}.
    typed_content: bool = False
    system: bool = True
    developer: bool = False
    # The descriptions of tools are printed.
    tools: bool = False
    # An assistant's calls are printed, and the results of tools.
    tool_calls: bool = False
    tool_results: bool = False
    # How a call must be passed: arguments as JSON text, content null, ids of nine letters.
    text_arguments: bool = False
    null_content: bool = False
    short_ids: bool = False
    # Of several calls in one message only the first is printed, or they are refused.
    one_call: bool = False
    # Under which keys the template reads what an assistant thought.
    thinking_keys: tuple[str, ...] = ()
    # Thinking is a part of the content: {"type": "thinking", "thinking": ...}.
    thinking_parts: bool = False
    # The prompt depends on whether thinking is asked for.
    thinking_switch: bool = False
    # The model thinks: there is a switch, or the template knows thinking tags.
    thinking: bool = False
    # What was printed for an assistant's call, and for its thinking; "": nothing.
    call_sample: str = ""
    thinking_sample: str = ""
    # What the prompt ends with, after the user's words.
    prompt_end: str = ""


def think_variables(*, think: bool | str | None, literals: frozenset[str]) -> dict[str, Any]:
    """Return the switches that templates know by many names.

    Qwen, GLM: enable_thinking; DeepSeek, Granite, Kimi: thinking; Cohere: reasoning; gpt-oss
    and Mistral: reasoning_effort. `literals` are the template's own strings: a level that it
    never mentions becomes the nearest one that every such template knows.
    """
    if think is None:
        return {}
    on = bool(think) and think != "none"
    switches: dict[str, Any] = {"enable_thinking": on, "thinking": on, "reasoning": on}
    if isinstance(think, str) and on:
        known = think in ("low", "medium", "high") or think in literals
        nearest = {"minimal": "low"}.get(think, "high")
        switches["reasoning_effort"] = think if known else nearest
    elif not on and "none" in literals:
        switches["reasoning_effort"] = "none"
    elif on and "none" in literals and "medium" not in literals:
        # Mistral's templates know "none" and "high", and think only when told to.
        switches["reasoning_effort"] = "high"
    return switches
