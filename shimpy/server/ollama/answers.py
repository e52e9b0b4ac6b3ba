"""Events of a generation as Ollama's chunks: generators of values, no I/O of their own."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any, TypeVar, assert_never

from shimpy.protocol.messages import TokenLogprob
from shimpy.server.events import (
    ContentDelta,
    Event,
    Finished,
    Started,
    ThinkingDelta,
    ToolCallMade,
)
from shimpy.server.ollama.wire import (
    AnswerMessage,
    CalledFunction,
    CalledTool,
    ChatChunk,
    GenerateChunk,
    Logprob,
    measured_ns,
    now_text,
    to_ns,
)

Chunk = TypeVar("Chunk", GenerateChunk, ChatChunk)


def generate_chunks(
    events: AsyncGenerator[Event, None], *, model: str, wants_context: bool
) -> AsyncGenerator[GenerateChunk, None]:
    """Yield the chunks of /api/generate, the last with counts and durations."""
    return _chunks(events, partial(_generate_chunk, model), wants_context=wants_context)


def chat_chunks(
    events: AsyncGenerator[Event, None], *, model: str
) -> AsyncGenerator[ChatChunk, None]:
    """Yield the chunks of /api/chat, the last with counts and durations."""
    return _chunks(events, partial(_chat_chunk, model), wants_context=False)


async def _chunks(
    events: AsyncGenerator[Event, None], make: Callable[..., Chunk], *, wants_context: bool
) -> AsyncGenerator[Chunk, None]:
    async with aclosing(events):
        async for event in events:
            match event:
                case Started():
                    continue
                case ThinkingDelta():
                    yield make(thinking=event.text, logprobs=event.logprobs)
                case ContentDelta():
                    yield make(content=event.text, logprobs=event.logprobs)
                case ToolCallMade():
                    yield make(tool_calls=[called_tool(event)])
                case Finished():
                    context = {"context": list(event.tokens)} if wants_context else {}
                    yield make(**context, **final_fields(event))
                case _:
                    assert_never(event)


async def bare_text(events: AsyncGenerator[Event, None]) -> AsyncGenerator[str, None]:
    """Yield the pieces of the answer alone, as the older native form streams them."""
    async with aclosing(events):
        async for event in events:
            if isinstance(event, ContentDelta) and event.text:
                yield event.text


async def whole_generate(chunks: AsyncGenerator[GenerateChunk, None]) -> GenerateChunk:
    """Return all chunks of /api/generate as one."""
    parts, last = await _collect(chunks)
    last.response = "".join(part.response for part in parts)
    last.thinking = "".join(part.thinking for part in parts)
    last.tool_calls = [call for part in parts for call in part.tool_calls]
    last.logprobs = [logprob for part in parts for logprob in part.logprobs]
    return last


async def whole_chat(chunks: AsyncGenerator[ChatChunk, None]) -> ChatChunk:
    """Return all chunks of /api/chat as one."""
    parts, last = await _collect(chunks)
    messages = [part.message for part in parts]
    last.message.content = "".join(message.content for message in messages)
    last.message.thinking = "".join(message.thinking for message in messages)
    last.message.tool_calls = [call for message in messages for call in message.tool_calls]
    last.logprobs = [logprob for part in parts for logprob in part.logprobs]
    return last


async def _collect(chunks: AsyncGenerator[Chunk, None]) -> tuple[list[Chunk], Chunk]:
    parts: list[Chunk] = []
    async with aclosing(chunks):
        async for chunk in chunks:
            parts.append(chunk)  # noqa: PERF401 - the generator must be closed too
    return parts, parts[-1]


def idle_generate(model: str, reason: str) -> GenerateChunk:
    """Return the answer to a request that only loads or unloads."""
    return _generate_chunk(model, done=True, done_reason=reason)


def idle_chat(model: str, reason: str) -> ChatChunk:
    """Return the answer to a request that only loads or unloads."""
    return _chat_chunk(model, done=True, done_reason=reason)


def final_fields(event: Finished) -> dict[str, Any]:
    """Return what Ollama's last chunk adds: counts, and durations in nanoseconds."""
    return {
        "done": True,
        "done_reason": event.reason,
        "total_duration": to_ns(event.total_s),
        "load_duration": measured_ns(event.load_s),
        "prompt_eval_count": event.n_prompt,
        "prompt_eval_duration": to_ns(event.prefill_s),
        "eval_count": event.n_generated,
        "eval_duration": to_ns(event.decode_s),
    }


def called_tool(event: ToolCallMade) -> CalledTool:
    """Return a tool call in Ollama's form: the arguments are an object."""
    function = CalledFunction(
        index=event.index, name=event.call.name, arguments=dict(event.call.arguments)
    )
    return CalledTool(id=event.call.id, function=function)


def _generate_chunk(
    model: str,
    *,
    content: str = "",
    done: bool = False,
    logprobs: Sequence[TokenLogprob] = (),
    **fields: Any,
) -> GenerateChunk:
    return GenerateChunk(
        model=model,
        created_at=now_text(),
        response=content,
        done=done,
        logprobs=_logprobs(logprobs),
        **fields,
    )


def _chat_chunk(
    model: str,
    *,
    content: str = "",
    thinking: str = "",
    tool_calls: Sequence[CalledTool] = (),
    logprobs: Sequence[TokenLogprob] = (),
    done: bool = False,
    **fields: Any,
) -> ChatChunk:
    message = AnswerMessage(
        role="assistant", content=content, thinking=thinking, tool_calls=list(tool_calls)
    )
    return ChatChunk(
        model=model,
        created_at=now_text(),
        message=message,
        done=done,
        logprobs=_logprobs(logprobs),
        **fields,
    )


def _logprobs(given: Sequence[TokenLogprob]) -> list[Logprob]:
    return [
        Logprob(
            token=one.text,
            logprob=one.logprob,
            bytes=list(one.data),
            top_logprobs=_logprobs(one.top),
        )
        for one in given
    ]
