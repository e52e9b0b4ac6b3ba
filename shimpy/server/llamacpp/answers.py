"""Events of a generation as completions of llama.cpp's server: no I/O of their own."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any

import msgspec
from msgspec import UNSET

from shimpy.protocol.messages import TokenLogprob
from shimpy.server.events import ContentDelta, Event, Finished, Started
from shimpy.server.llamacpp.limits import Cutter
from shimpy.server.llamacpp.requests import Asked
from shimpy.server.llamacpp.wire import Completion, Piece, Probability, Rival, Timings

# Which slot served is not known here.
_NO_SLOT = -1

Clock = Callable[[], float]
Answers = AsyncGenerator[tuple[int, Event], None]


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """What all completions of one request have in common."""

    asked: Asked
    model: str
    # What was in force, for each prompt.
    settings: Sequence[dict[str, Any]]
    # The prompts as text; "": it is not known.
    prompts: Sequence[str]
    # In seconds.
    clock: Clock


async def completion_chunks(
    events: Answers, head: Head
) -> AsyncGenerator[Piece | dict[str, Any], None]:
    """Yield the chunks of a streamed completion; each answer's last has `stop` true.

    When all answers have ended or are cut, the events are not waited for any more.
    """
    choices = _choices(head)
    async with aclosing(events):
        async for index, event in events:
            choice = choices[index]
            if choice.has_ended():
                continue
            piece = choice.take(event)
            if piece is not None:
                yield piece
            if choice.has_ended():
                yield _chosen_fields(choice.whole(), head.asked)
            if all(choice.has_ended() for choice in choices):
                return


async def whole_completions(events: Answers, head: Head) -> list[dict[str, Any]]:
    """Return all completions, in order; as for `completion_chunks`."""
    choices = _choices(head)
    async with aclosing(events):
        async for index, event in events:
            choice = choices[index]
            if not choice.has_ended():
                choice.take(event)
            if all(choice.has_ended() for choice in choices):
                break
    return [_chosen_fields(choice.whole(), head.asked) for choice in choices]


class _Choice:
    """Puts one answer together."""

    def __init__(self, index: int, head: Head) -> None:
        self._index = index
        self._head = head
        self._prompt = index // head.asked.n
        self._arrived_s = head.clock()
        self._begun_s = self._arrived_s
        self._started = Started(n_prompt=0, n_cached=0)
        self._cutter: Cutter | None = None
        self._texts: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._n_generated = 0
        self._finished: Finished | None = None

    def has_ended(self) -> bool:
        """Whether the answer has ended, by itself or cut."""
        return self._finished is not None or (self._cutter is not None and self._cutter.is_cut)

    def take(self, event: Event) -> Piece | None:
        """Take an event of the answer; return the chunk that it makes."""
        match event:
            case Started():
                self._begun_s = self._head.clock()
                self._started = event
                self._cutter = Cutter(self._head.asked.limits, begun_s=self._begun_s)
            case ContentDelta():
                return self._add(event)
            case Finished():
                self._finished = event
                self._n_generated = event.n_generated
        return None

    def _add(self, event: ContentDelta) -> Piece | None:
        assert self._cutter is not None, "Started comes first"
        text = self._cutter.push(event.text, self._head.clock())
        self._texts.append(text)
        self._logprobs += event.logprobs
        self._n_generated += event.n_tokens
        if not text and not event.logprobs:
            return None
        asked = self._head.asked
        return Piece(
            index=self._index,
            content=text,
            tokens=[one.id for one in event.logprobs] if asked.return_tokens else [],
            stop=False,
            id_slot=_NO_SLOT,
            tokens_predicted=self._n_generated,
            tokens_evaluated=self._started.n_prompt,
            completion_probabilities=_shown(event.logprobs) if asked.wants_probabilities else UNSET,
            timings=self._timings() if asked.timings_per_token else UNSET,
        )

    def whole(self) -> Completion:
        """Return the completion; in a stream its text has been sent already."""
        asked, finished = self._head.asked, self._finished
        is_whole = not asked.stream
        settings = self._head.settings[self._prompt]
        wants_probabilities = is_whole and asked.wants_probabilities
        stop_type, word = _stop(finished)
        return Completion(
            index=self._index,
            content="".join(self._texts) if is_whole else "",
            tokens=[one.id for one in self._logprobs] if is_whole and asked.return_tokens else [],
            id_slot=_NO_SLOT,
            stop=True,
            model=self._head.model,
            tokens_predicted=self._n_generated,
            tokens_evaluated=self._started.n_prompt,
            generation_settings=settings,
            prompt=self._head.prompts[self._prompt],
            has_new_line=self._cutter is not None and self._cutter.has_new_line,
            truncated=self._is_full(settings["n_predict"]),
            stop_type=stop_type,
            stopping_word=word,
            tokens_cached=self._started.n_prompt + self._n_generated,
            timings=self._timings(),
            completion_probabilities=_shown(self._logprobs) if wants_probabilities else UNSET,
        )

    def _is_full(self, n_predict: int) -> bool:
        """Whether it was the context that ended the answer."""
        if self._finished is None or self._finished.reason != "length":
            return False
        return n_predict < 0 or self._n_generated < n_predict

    def _timings(self) -> Timings:
        """Return the worker's own times, or as far as they are seen from here."""
        started, finished = self._started, self._finished
        n_prompt = started.n_prompt - started.n_cached
        prefill_s = self._begun_s - self._arrived_s
        decode_s = self._head.clock() - self._begun_s
        if finished is not None:
            prefill_s, decode_s = finished.prefill_s, finished.decode_s
        return Timings(
            cache_n=started.n_cached,
            prompt_n=n_prompt,
            prompt_ms=prefill_s * 1000,
            prompt_per_token_ms=_ratio(prefill_s * 1000, n_prompt),
            prompt_per_second=_ratio(n_prompt, prefill_s),
            predicted_n=self._n_generated,
            predicted_ms=decode_s * 1000,
            predicted_per_token_ms=_ratio(decode_s * 1000, self._n_generated),
            predicted_per_second=_ratio(self._n_generated, decode_s),
        )


def _choices(head: Head) -> list[_Choice]:
    return [_Choice(index, head) for index in range(len(head.asked.requests) * head.asked.n)]


def _stop(finished: Finished | None) -> tuple[str, str]:
    """Return why an answer ended in llama.cpp's words, and the stop string."""
    if finished is None or finished.reason == "length":
        return "limit", ""
    return ("word", finished.stop_string) if finished.stop_string else ("eos", "")


def _chosen_fields(completion: Completion, asked: Asked) -> dict[str, Any]:
    """Return those fields of an answer that are wanted; what is not there is left out."""
    entry: dict[str, Any] = msgspec.to_builtins(completion)
    if not asked.response_fields:
        return entry
    chosen: dict[str, Any] = {}
    for path in asked.response_fields:
        value: Any = entry
        for name in path.split("/"):
            value = value.get(name, UNSET) if isinstance(value, dict) else UNSET
        if value is not UNSET:
            chosen[path] = value
    return chosen


def _shown(given: Sequence[TokenLogprob]) -> list[Probability]:
    return [
        Probability(
            id=one.id,
            token=one.text,
            bytes=list(one.data),
            logprob=one.logprob,
            top_logprobs=[
                Rival(id=top.id, token=top.text, bytes=list(top.data), logprob=top.logprob)
                for top in one.top
            ],
        )
        for one in given
    ]


def _ratio(amount: float, divisor: float) -> float:
    return amount / divisor if divisor else 0.0
