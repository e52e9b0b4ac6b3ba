"""Events of a generation as chat completions: generators of values, no I/O of their own."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import assert_never

import msgspec
from msgspec import UNSET, UnsetType

from shimpy.protocol.messages import TokenLogprob
from shimpy.server.events import (
    ContentDelta,
    Event,
    Finished,
    Started,
    ThinkingDelta,
    ToolCallMade,
)
from shimpy.server.openai.answers import Answer, Head, Tally, choice_chunks


class Rival(msgspec.Struct, kw_only=True):
    """A token that might have been."""

    token: str
    logprob: float
    bytes: list[int]


class Logprob(msgspec.Struct, kw_only=True):
    """A token with the logarithm of its probability, and its rivals."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[Rival]


class Logprobs(msgspec.Struct, kw_only=True):
    """Those of the content's tokens; there are no refusals here."""

    content: list[Logprob]
    refusal: None = None


class Function(msgspec.Struct, kw_only=True):
    """A function that is called; the arguments are JSON text."""

    name: str
    arguments: str


class Call(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A call; in a stream it comes whole, with its place among the calls."""

    index: int | UnsetType = UNSET
    id: str
    type: str
    function: Function


class Delta(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What a chunk adds to the message.

    A thought has two names, as Ollama's clients read the one and llama.cpp's the other.
    """

    role: str | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    reasoning: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[Call] | UnsetType = UNSET


class ChunkChoice(msgspec.Struct, kw_only=True):
    """One choice's part of a chunk."""

    index: int
    delta: Delta
    logprobs: Logprobs | None = None
    finish_reason: str | None = None


class Message(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A whole message."""

    role: str
    content: str | None
    refusal: None
    reasoning: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[Call] | UnsetType = UNSET


class WholeChoice(msgspec.Struct, kw_only=True):
    """One choice of a whole answer."""

    index: int
    message: Message
    logprobs: Logprobs | None
    finish_reason: str


def chat_chunks(
    events: AsyncGenerator[tuple[int, Event], None], head: Head, *, n: int
) -> AsyncGenerator[Answer, None]:
    """Yield the chunks of a streamed answer, as `choice_chunks`."""
    return choice_chunks(events, [_StreamedChoice(index) for index in range(n)], head, n=n)


async def whole_chat(
    events: AsyncGenerator[tuple[int, Event], None], head: Head, *, n: int
) -> Answer:
    """Return all of an answer as one."""
    choices = [_CollectedChoice(index) for index in range(n)]
    tally = Tally(n)
    async with aclosing(events):
        async for index, event in events:
            choices[index].take(event)
            if isinstance(event, Finished):
                tally.add(index, event)
    return head.whole([choice.whole() for choice in choices], tally.usage())


class _StreamedChoice:
    """Turns one choice's events into its parts of chunks; the first one names the role."""

    def __init__(self, index: int) -> None:
        self._index = index
        self._is_open = False
        self._has_calls = False

    def take(self, event: Event) -> list[ChunkChoice]:
        match event:
            case Started():
                return []
            case ContentDelta(text=text):
                return [self._choice(Delta(content=text), event.logprobs)]
            case ThinkingDelta(text=text):
                return [self._choice(Delta(reasoning=text, reasoning_content=text))]
            case ToolCallMade():
                self._has_calls = True
                return [self._choice(Delta(tool_calls=[called_tool(event, index=event.index)]))]
            case Finished():
                first = [] if self._is_open else [self._choice(Delta(content=""))]
                reason = finish_reason(event, has_calls=self._has_calls)
                last = ChunkChoice(index=self._index, delta=Delta(), finish_reason=reason)
                return [*first, last]
            case _:
                assert_never(event)

    def _choice(self, delta: Delta, logprobs: Sequence[TokenLogprob] = ()) -> ChunkChoice:
        if not self._is_open:
            self._is_open = True
            delta.role = "assistant"
            if delta.content is UNSET:
                delta.content = None if delta.tool_calls is not UNSET else ""
        return ChunkChoice(index=self._index, delta=delta, logprobs=shown_logprobs(logprobs))


class _CollectedChoice:
    """Puts one choice's message together."""

    def __init__(self, index: int) -> None:
        self._index = index
        self._content: list[str] = []
        self._thinking: list[str] = []
        self._calls: list[Call] = []
        self._logprobs: list[TokenLogprob] = []
        self._finish_reason = "stop"

    def take(self, event: Event) -> None:
        match event:
            case Started():
                pass
            case ContentDelta():
                self._content.append(event.text)
                self._logprobs += event.logprobs
            case ThinkingDelta():
                self._thinking.append(event.text)
            case ToolCallMade():
                self._calls.append(called_tool(event))
            case Finished():
                self._finish_reason = finish_reason(event, has_calls=bool(self._calls))
            case _:
                assert_never(event)

    def whole(self) -> WholeChoice:
        content, thinking = "".join(self._content), "".join(self._thinking)
        message = Message(
            role="assistant",
            content=None if self._calls and not content else content,
            refusal=None,
            reasoning=thinking or UNSET,
            reasoning_content=thinking or UNSET,
            tool_calls=self._calls or UNSET,
        )
        return WholeChoice(
            index=self._index,
            message=message,
            logprobs=shown_logprobs(self._logprobs),
            finish_reason=self._finish_reason,
        )


def finish_reason(event: Finished, *, has_calls: bool) -> str:
    """Return OpenAI's word for why an answer ended."""
    return "tool_calls" if has_calls and event.reason == "stop" else event.reason


def called_tool(event: ToolCallMade, *, index: int | UnsetType = UNSET) -> Call:
    """Return a call in OpenAI's form."""
    function = Function(name=event.call.name, arguments=json_text(event.call.arguments))
    return Call(index=index, id=event.call.id, type="function", function=function)


def json_text(value: object) -> str:
    """Return a call's arguments as text."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=dict)


def shown_logprobs(given: Sequence[TokenLogprob]) -> Logprobs | None:
    """Return logprobs as chats have them; None: there are none."""
    if not given:
        return None
    return Logprobs(
        content=[
            Logprob(
                token=one.text,
                logprob=one.logprob,
                bytes=list(one.data),
                top_logprobs=[
                    Rival(token=rival.text, logprob=rival.logprob, bytes=list(rival.data))
                    for rival in one.top
                ],
            )
            for one in given
        ]
    )
