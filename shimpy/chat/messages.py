"""A conversation in no dialect: what Ollama, OpenAI and Anthropic requests are turned into."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

Role = Literal["system", "developer", "user", "assistant", "tool"]


class ToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """A call that the model made: `arguments` is the parsed JSON object."""

    id: str = ""
    name: str
    arguments: Mapping[str, Any]


class ToolSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A function that the model may call; `parameters` is the JSON schema of its arguments."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any]


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True):
    """One turn. Absent text is the empty string, whatever the dialect calls it."""

    role: Role
    content: str = ""
    # What an assistant thought before it answered, without the tags round it.
    thinking: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    # Of a tool's result: the tool, and the call that it answers.
    tool_name: str = ""
    tool_call_id: str = ""
    # Encoded image files.
    images: tuple[bytes, ...] = ()
