"""What OpenAI's answers are made of, for chats and completions alike, as typed structs.

A field with a default is left out where it has that; `null` is written where OpenAI's clients
expect the field to be there.
"""

from __future__ import annotations

import os
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, Protocol, TypeVar

import msgspec
from msgspec import UNSET, UnsetType

from shimpy.server.events import Event, Finished
from shimpy.server.streaming import sse_data, sse_json

FINGERPRINT = "fp_shimpy"
DONE = sse_data("[DONE]")

T = TypeVar("T")


class PromptDetails(msgspec.Struct, kw_only=True):
    """Of the prompt's tokens, those that were in the KV cache already."""

    cached_tokens: int


class CompletionDetails(msgspec.Struct, kw_only=True):
    """Of the generated tokens, those of thoughts."""

    reasoning_tokens: int


class Usage(msgspec.Struct, kw_only=True):
    """How many tokens a request took."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


class Answer(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A whole answer, or one chunk of a streamed one."""

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[Any]
    usage: Usage | UnsetType | None = UNSET


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """What all chunks of one answer have in common."""

    id: str
    created: int
    model: str
    object: str
    # The chunks' usage is null but for the last one's.
    wants_usage: bool = False

    def chunk(self, *choices: Any) -> Answer:
        """Return a chunk that brings something of these choices."""
        return self._answer(list(choices), None if self.wants_usage else UNSET)

    def last(self, usage: Usage) -> Answer:
        """Return the chunk that brings the usage."""
        return self._answer([], usage)

    def whole(self, choices: list[Any], usage: Usage) -> Answer:
        """Return an answer that is not streamed."""
        return self._answer(choices, usage)

    def _answer(self, choices: list[Any], usage: Usage | UnsetType | None) -> Answer:
        return Answer(
            id=self.id,
            object=self.object,
            created=self.created,
            model=self.model,
            system_fingerprint=FINGERPRINT,
            choices=choices,
            usage=usage,
        )


def new_id(prefix: str) -> str:
    """Return an id like OpenAI's: "chatcmpl-" and the like, then what nobody can guess."""
    return prefix + os.urandom(12).hex()


def now_s() -> int:
    """Return seconds since the epoch, as `created` has them."""
    return int(time.time())


class Tally:
    """Adds up the tokens of `n` answers to each of some prompts."""

    def __init__(self, n: int) -> None:
        self._n = n
        self._n_prompt = self._n_cached = self._n_generated = self._n_thinking = 0

    def add(self, index: int, finished: Finished) -> None:
        """Count an answer; a prompt's tokens count once, with the first answer to it."""
        if index % self._n == 0:
            self._n_prompt += finished.n_prompt
            self._n_cached += finished.n_cached
        self._n_generated += finished.n_generated
        self._n_thinking += finished.n_thinking

    def usage(self) -> Usage:
        """Return the sums."""
        return Usage(
            prompt_tokens=self._n_prompt,
            completion_tokens=self._n_generated,
            total_tokens=self._n_prompt + self._n_generated,
            prompt_tokens_details=PromptDetails(cached_tokens=self._n_cached),
            completion_tokens_details=CompletionDetails(reasoning_tokens=self._n_thinking),
        )


class Streamed(Protocol):
    """One choice of a streamed answer."""

    def take(self, event: Event) -> Sequence[Any]:
        """Return the parts of chunks that an event makes."""


async def choice_chunks(
    events: AsyncGenerator[tuple[int, Event], None],
    choices: Sequence[Streamed],
    head: Head,
    *,
    n: int,
) -> AsyncGenerator[Answer, None]:
    """Yield the chunks of a streamed answer; the last one has the usage where it is wanted.

    Args:
        events: each with the index of its choice.
        choices: all of them, `n` for each prompt.
        head: what all chunks have in common.
        n: choices for one prompt.
    """
    tally = Tally(n)
    async with aclosing(events):
        async for index, event in events:
            for part in choices[index].take(event):
                yield head.chunk(part)
            if isinstance(event, Finished):
                tally.add(index, event)
    if head.wants_usage:
        yield head.last(tally.usage())


async def sse_lines(chunks: AsyncGenerator[Answer, None]) -> AsyncGenerator[bytes, None]:
    """Yield chunks as server-sent events, then the word that ends them."""
    async with aclosing(chunks):
        async for chunk in chunks:
            yield sse_json(chunk)
    yield DONE
