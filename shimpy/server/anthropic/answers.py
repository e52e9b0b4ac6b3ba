"""Events of a generation as Anthropic's messages and stream events: no I/O of their own."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import assert_never

from shimpy.server.anthropic.requests import Asked
from shimpy.server.anthropic.wire import (
    AnswerBlock,
    BlockDelta,
    BlockStart,
    BlockStop,
    InputDelta,
    Message,
    MessageDelta,
    MessageStart,
    MessageStop,
    StopDelta,
    StreamEvent,
    TextBlock,
    TextDelta,
    ThinkingBlock,
    ThinkingTextDelta,
    ToolUseBlock,
    Usage,
)
from shimpy.server.events import (
    ContentDelta,
    Event,
    Finished,
    Started,
    ThinkingDelta,
    ToolCallMade,
)


async def stream_events(
    events: AsyncGenerator[Event, None], asked: Asked
) -> AsyncGenerator[StreamEvent, None]:
    """Yield the events of a streamed message, message_start first and message_stop last."""
    writer = _Writer(asked)
    async with aclosing(events):
        async for event in events:
            for written in writer.take(event):
                yield written


async def whole_message(events: AsyncGenerator[Event, None], asked: Asked) -> Message:
    """Return all of an answer as one message."""
    blocks: list[AnswerBlock] = []
    message: Message | None = None
    async with aclosing(stream_events(events, asked)) as written:
        async for event in written:
            match event:
                case MessageStart():
                    message = event.message
                case BlockStart():
                    blocks.append(event.content_block)
                case BlockDelta():
                    _append(blocks[event.index], event)
                case MessageDelta() if message is not None:
                    message.content, message.usage = blocks, event.usage
                    message.stop_reason = event.delta.stop_reason
                    message.stop_sequence = event.delta.stop_sequence
    assert message is not None, "a generation begins with Started"
    return message


def stop_of(finished: Finished, asked: Asked, *, has_calls: bool) -> StopDelta:
    """Return why an answer ended, in Anthropic's words."""
    if finished.reason == "length":
        is_full = finished.n_generated < asked.max_tokens
        reason = "model_context_window_exceeded" if is_full else "max_tokens"
        return StopDelta(reason, None)
    if finished.stop_string in asked.stop_sequences:
        return StopDelta("stop_sequence", finished.stop_string)
    return StopDelta("tool_use" if has_calls else "end_turn", None)


class _Writer:
    """Puts what the model says into blocks, one open at a time."""

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self._n_blocks = 0
        self._open: type[TextBlock | ThinkingBlock] | None = None
        self._has_calls = False

    def take(self, event: Event) -> list[StreamEvent]:
        """Return what an event adds to the stream."""
        match event:
            case Started():
                return [MessageStart(self._message(event))]
            case ThinkingDelta(text=text):
                if not (text and self._asked.shows_thinking):
                    return []
                opened = self._open_block(ThinkingBlock(""))
                return [*opened, BlockDelta(self._index, ThinkingTextDelta(text))]
            case ContentDelta(text=text):
                if not text:
                    return []
                return [*self._open_block(TextBlock("")), BlockDelta(self._index, TextDelta(text))]
            case ToolCallMade():
                return self._call(event)
            case Finished():
                stop = stop_of(event, self._asked, has_calls=self._has_calls)
                usage = _usage(event, n_output=event.n_generated)
                return [*self._close_block(), MessageDelta(stop, usage), MessageStop()]
            case _:
                assert_never(event)

    @property
    def _index(self) -> int:
        return self._n_blocks - 1

    def _message(self, event: Started) -> Message:
        return Message(
            id=f"msg_{secrets.token_hex(12)}",
            model=self._asked.generation.model,
            content=[],
            usage=_usage(event, n_output=0),
        )

    def _open_block(self, block: TextBlock | ThinkingBlock) -> list[StreamEvent]:
        if self._open is type(block):
            return []
        closed = self._close_block()
        self._open = type(block)
        self._n_blocks += 1
        return [*closed, BlockStart(self._index, block)]

    def _close_block(self) -> list[StreamEvent]:
        if self._open is None:
            return []
        self._open = None
        return [BlockStop(self._index)]

    def _call(self, event: ToolCallMade) -> list[StreamEvent]:
        self._has_calls = True
        closed = self._close_block()
        self._n_blocks += 1
        text = json.dumps(event.call.arguments, ensure_ascii=False, default=dict)
        return [
            *closed,
            BlockStart(self._index, ToolUseBlock(event.call.id, event.call.name, {})),
            BlockDelta(self._index, InputDelta(text)),
            BlockStop(self._index),
        ]


def _append(block: AnswerBlock, event: BlockDelta) -> None:
    delta = event.delta
    if isinstance(block, TextBlock) and isinstance(delta, TextDelta):
        block.text += delta.text
    elif isinstance(block, ThinkingBlock) and isinstance(delta, ThinkingTextDelta):
        block.thinking += delta.thinking
    elif isinstance(block, ToolUseBlock) and isinstance(delta, InputDelta):
        block.input = json.loads(delta.partial_json)


def _usage(counted: Started | Finished, *, n_output: int) -> Usage:
    return Usage(
        input_tokens=counted.n_prompt - counted.n_cached,
        cache_read_input_tokens=counted.n_cached,
        output_tokens=n_output,
    )
