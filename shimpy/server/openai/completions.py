"""Events of a generation as completions, the older form: generators of values, no I/O."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import msgspec

from shimpy.protocol.messages import TokenLogprob
from shimpy.server.events import ContentDelta, Event, Finished
from shimpy.server.openai.answers import Answer, Head, Tally, choice_chunks


class Logprobs(msgspec.Struct, kw_only=True):
    """Lists with one item for each token; `text_offset` counts characters of the text."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class Choice(msgspec.Struct, kw_only=True):
    """A whole choice, or what a chunk adds to it."""

    text: str
    index: int
    logprobs: Logprobs | None = None
    finish_reason: str | None = None


def completion_chunks(
    events: AsyncGenerator[tuple[int, Event], None], head: Head, *, echoes: Sequence[str], n: int
) -> AsyncGenerator[Answer, None]:
    """Yield the chunks of a streamed answer, as `choice_chunks`.

    `echoes` has one text for each prompt, which the `n` choices for it begin with; "": none.
    """
    return choice_chunks(events, _choices(echoes, n), head, n=n)


async def whole_completion(
    events: AsyncGenerator[tuple[int, Event], None], head: Head, *, echoes: Sequence[str], n: int
) -> Answer:
    """Return all of an answer as one; arguments as for `completion_chunks`."""
    choices = _choices(echoes, n)
    parts: list[list[Choice]] = [[] for _ in choices]
    tally = Tally(n)
    async with aclosing(events):
        async for index, event in events:
            parts[index] += choices[index].take(event)
            if isinstance(event, Finished):
                tally.add(index, event)
    return head.whole([_joined(some) for some in parts], tally.usage())


class _Choice:
    """Turns one choice's events into its parts of chunks."""

    def __init__(self, index: int, echo: str) -> None:
        self._index = index
        self._echo = echo
        self._n_chars = 0

    def take(self, event: Event) -> list[Choice]:
        parts = []
        if self._echo:
            parts.append(self._choice(self._echo))
            self._echo = ""
        if isinstance(event, ContentDelta):
            parts.append(self._choice(event.text, event.logprobs))
        elif isinstance(event, Finished):
            parts.append(Choice(text="", index=self._index, finish_reason=event.reason))
        return parts

    def _choice(self, text: str, logprobs: Sequence[TokenLogprob] = ()) -> Choice:
        offset = self._n_chars
        self._n_chars += len(text)
        return Choice(text=text, index=self._index, logprobs=_logprobs(logprobs, offset))


def _choices(echoes: Sequence[str], n: int) -> list[_Choice]:
    return [_Choice(index, echoes[index // n]) for index in range(len(echoes) * n)]


def _joined(parts: Sequence[Choice]) -> Choice:
    last = parts[-1]
    found = [part.logprobs for part in parts if part.logprobs is not None]
    joined = None
    if found:
        joined = Logprobs(
            tokens=[token for one in found for token in one.tokens],
            token_logprobs=[value for one in found for value in one.token_logprobs],
            top_logprobs=[top for one in found for top in one.top_logprobs],
            text_offset=[offset for one in found for offset in one.text_offset],
        )
    return Choice(
        text="".join(part.text for part in parts),
        index=last.index,
        logprobs=joined,
        finish_reason=last.finish_reason,
    )


def _logprobs(given: Sequence[TokenLogprob], offset: int) -> Logprobs | None:
    if not given:
        return None
    offsets = []
    for one in given:
        offsets.append(offset)
        offset += len(one.text)
    return Logprobs(
        tokens=[one.text for one in given],
        token_logprobs=[one.logprob for one in given],
        top_logprobs=[{rival.text: rival.logprob for rival in one.top} for one in given],
        text_offset=offsets,
    )
