"""What an output parser says."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from shimpy.chat.messages import ToolCall


class ThinkingDelta(msgspec.Struct, frozen=True):
    """More of a thought."""

    text: str


class ContentDelta(msgspec.Struct, frozen=True):
    """More of the answer."""

    text: str


OutputEvent = ThinkingDelta | ContentDelta | ToolCall


def merge(events: Iterable[OutputEvent]) -> list[OutputEvent]:
    """Return the events with neighbouring texts of one kind joined, and empty ones left out."""
    result: list[OutputEvent] = []
    for event in events:
        last = result[-1] if result else None
        if isinstance(event, ToolCall):
            result.append(event)
        elif isinstance(last, ThinkingDelta) and isinstance(event, ThinkingDelta):
            result[-1] = ThinkingDelta(last.text + event.text)
        elif isinstance(last, ContentDelta) and isinstance(event, ContentDelta):
            result[-1] = ContentDelta(last.text + event.text)
        elif event.text:
            result.append(event)
    return result
