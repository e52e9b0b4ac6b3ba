"""The one path that text takes: a request in no dialect in, events in no dialect out.

    resolve the name -> the model's card -> render the prompt -> a lease -> Submit
    -> Deltas -> parsed into thinking, content and tool calls -> Finished

A dialect parses its body into a GenerationRequest and writes the events in its own form; it
knows nothing of leases. Leaving the generator early, by an error or because the client has
gone, gives the lease back, which frees the worker's slot.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from datetime import datetime
from typing import assert_never

import msgspec

from shimpy.chat import events as chat
from shimpy.chat.events import OutputEvent
from shimpy.chat.messages import ToolCall
from shimpy.errors import GgufError, NotFoundError, StoppingError
from shimpy.names import DEFAULT_TAG, parse_model_name
from shimpy.placement.placement import PlanOptions
from shimpy.protocol.messages import Delta, Done, Prefilled, Submit, Text, TokenLogprob
from shimpy.registry.model import Model
from shimpy.scheduler.lease import Lease
from shimpy.server.events import (
    ContentDelta,
    Event,
    Finished,
    Started,
    ThinkingDelta,
    ToolCallMade,
)
from shimpy.server.options import Options
from shimpy.server.prompts import Prepared, is_short, prepare
from shimpy.server.record import Record
from shimpy.server.requests import GenerationRequest
from shimpy.server.services import Services
from shimpy.server.settings import keep_alive_of, plan_options, with_settings


async def run_generation(
    services: Services, request: GenerationRequest, record: Record
) -> AsyncGenerator[Event, None]:
    """Yield Started, what the model says, and Finished; `record` learns what happened.

    Raises:
        UserError: the request can't be served as it is (the context, an option, a capability).
        NotFoundError: no such model.
        CapacityError: no place for the model, or too many wait.
        WorkerError: its worker failed or died, before or in the middle of the answer.
    """
    arrived_s = time.monotonic()
    model = await find_model(services, request.model, record)
    prepared = await prepare_request(services, model, request)
    async with acquire(services, model, request.options, request.keep_alive_s, record) as lease:
        answer = generate_on(lease, prepared, record, arrived_s)
        async with aclosing(answer) as events:
            async for event in events:
                yield event


async def prepare_request(services: Services, model: Model, request: GenerationRequest) -> Prepared:
    """Return what the worker is told; errors as `prompts.prepare`."""
    services.scheduler.foresee(model)
    card = await services.cards.get(model)
    asked = with_settings(request, model)
    if is_short(asked):
        return prepare(asked, model, card, _local_now)
    return await asyncio.to_thread(prepare, asked, model, card, _local_now)


def _local_now() -> datetime:
    return datetime.now().astimezone()


async def generate_on(
    lease: Lease, prepared: Prepared, record: Record, arrived_s: float
) -> AsyncGenerator[Event, None]:
    """Yield the events of one answer under a lease; errors as `Lease.generate`."""
    answer = _Answer(prepared)
    last_s: float | None = None
    submit = await fit_context(lease, prepared)
    async with aclosing(lease.generate(submit)) as mails:
        async for mail in mails:
            match mail:
                case Delta():
                    now_s = time.monotonic()
                    if record.first_token_s is None:
                        record.first_token_s = now_s - arrived_s
                    if last_s is not None:
                        record.tell_tokens(mail.n_tokens, now_s - last_s)
                    last_s = now_s
                    record.n_generated = (record.n_generated or 0) + mail.n_tokens
                    for event in answer.take(mail):
                        yield event
                case Prefilled():
                    record.n_prompt, record.n_cached = mail.n_prompt, mail.n_cached
                    yield Started(n_prompt=mail.n_prompt, n_cached=mail.n_cached)
                case Done():
                    for event in answer.finish():
                        yield event
                    total_s = time.monotonic() - arrived_s
                    yield _finish(mail, answer, lease, record, total_s)
                case _:
                    assert_never(mail)


async def fit_context(lease: Lease, prepared: Prepared) -> Submit:
    """Return what the worker is told, with a prompt that may be cut, cut to the context.

    A quarter of the context stays for the answer unless it asks for less. Errors as for
    `Lease.tokenize`.
    """
    submit, shortened = prepared.submit, prepared.shortened
    if shortened is None:
        return submit
    n_ctx = lease.ready.n_ctx
    n_answer = n_ctx // 4 if submit.n_predict < 0 else min(submit.n_predict + 1, n_ctx // 4)
    room = n_ctx - n_answer
    n_chars = sum(len(part.text) for part in submit.prompt if isinstance(part, Text))
    # No token is less than a byte.
    while n_chars and _n_bytes(submit) > room:
        counted = await lease.tokenize(prompt=submit.prompt, add_special=submit.add_bos)
        n_tokens = len(counted.ids)
        if n_tokens <= room:
            break
        # A little less than it should take, so that twice is mostly enough.
        n_chars = min(n_chars - 1, int(n_chars * room / n_tokens * 0.97))
        submit = msgspec.structs.replace(submit, prompt=shortened(n_chars))
    return submit


def _n_bytes(submit: Submit) -> int:
    """Return the bytes of a prompt's text, with one for the start and each other part."""
    sizes = (len(part.text.encode()) if isinstance(part, Text) else 1 for part in submit.prompt)
    return 1 + sum(sizes)


class _Answer:
    """Turns the worker's text into events; logprobs go with the first text after them."""

    def __init__(self, prepared: Prepared) -> None:
        self._parser = prepared.make_parser()
        self._one_call = prepared.one_call
        self._logprobs: list[TokenLogprob] = []
        self._n_calls = 0
        # Tokens since the last content.
        self._n_new = 0
        # Tokens whose text the parser has held back so far.
        self._n_held = 0
        self.n_thinking = 0

    def take(self, delta: Delta) -> list[Event]:
        """Return what is certain after more text."""
        self._n_new += delta.n_tokens
        if self._parser is None:
            if not delta.text and not delta.logprobs:
                return []
            n_tokens, self._n_new = self._n_new, 0
            logprobs = tuple(delta.logprobs)
            return [ContentDelta(text=delta.text, logprobs=logprobs, n_tokens=n_tokens)]
        self._logprobs += delta.logprobs
        self._n_held += delta.n_tokens
        return self._events(self._parser.push(delta.text))

    def finish(self) -> list[Event]:
        """Return what the parser held back."""
        return [] if self._parser is None else self._events(self._parser.finish())

    def _events(self, parsed: list[OutputEvent]) -> list[Event]:
        if parsed:
            # By length: which token wrote which character is not known here.
            n_all = sum(map(_n_chars, parsed))
            thought = sum(_n_chars(e) for e in parsed if isinstance(e, chat.ThinkingDelta))
            self.n_thinking += round(self._n_held * thought / n_all) if n_all else 0
            self._n_held = 0
        return [event for one in parsed if (event := self._event(one)) is not None]

    def _event(self, parsed: OutputEvent) -> Event | None:
        match parsed:
            case chat.ContentDelta(text=text):
                n_tokens, self._n_new = self._n_new, 0
                return ContentDelta(text=text, logprobs=self._take_logprobs(), n_tokens=n_tokens)
            case chat.ThinkingDelta(text=text):
                return ThinkingDelta(text=text, logprobs=self._take_logprobs())
            case ToolCall():
                self._n_calls += 1
                if self._one_call and self._n_calls > 1:
                    return None
                return ToolCallMade(index=self._n_calls - 1, call=parsed)
            case _:
                assert_never(parsed)

    def _take_logprobs(self) -> tuple[TokenLogprob, ...]:
        taken = tuple(self._logprobs)
        self._logprobs.clear()
        return taken


def _n_chars(parsed: OutputEvent) -> int:
    return 1 if isinstance(parsed, ToolCall) else len(parsed.text)


async def load_model(services: Services, request: GenerationRequest, record: Record) -> None:
    """Load a request's model, or renew its keep_alive, and generate nothing.

    Raises:
        ShimpyError: as `run_generation`.
    """
    model = await find_model(services, request.model, record)
    async with acquire(services, model, request.options, request.keep_alive_s, record):
        return


async def unload_model(services: Services, name: str, record: Record) -> bool:
    """Unload a model once its last request has ended; return whether it was loaded.

    Raises:
        NotFoundError: no such model.
    """
    return services.scheduler.unload(await find_name(services, name, record))


async def find_name(services: Services, text: str, record: Record) -> str:
    """Return the name of a model; one that is loaded counts though its file has gone.

    Raises:
        NotFoundError, GgufError: as for `find_model`, and it is not loaded.
    """
    try:
        return str((await find_model(services, text, record)).name)
    except (NotFoundError, GgufError):
        wanted = parse_model_name(text)
        loaded = {resident.model.name for resident in services.scheduler.residents()}
        namesakes = [name for name in loaded if name.name == wanted.name]
        if wanted in loaded:
            namesakes = [wanted]
        if len(namesakes) != 1 or wanted.tag not in {DEFAULT_TAG, namesakes[0].tag}:
            raise
        record.model = str(namesakes[0])
        return record.model


async def find_model(services: Services, name: str, record: Record) -> Model:
    """Return a model that can be used.

    Raises:
        NotFoundError: no such model.
        GgufError: its file is broken; says how.
    """
    try:
        model = await services.registry.resolve(name)
    except NotFoundError as error:
        # The words that Ollama's clients look for.
        told = f"model '{name}' not found: {error.message}"
        catalog = await asyncio.to_thread(services.catalog.current)
        if catalog.has(parse_model_name(name)):
            told += f"; `shimpy pull {name}` brings it"
        raise NotFoundError(told) from error
    record.model = str(model.name)
    return model


@asynccontextmanager
async def acquire(
    services: Services,
    model: Model,
    options: Options,
    keep_alive_s: float | None,
    record: Record,
) -> AsyncIterator[Lease]:
    """Hold a model loaded; `record` learns what the wait was for. Errors as for the scheduler."""
    asked = PlanOptions(n_ctx=options.n_ctx, n_gpu_layers=options.n_gpu_layers)
    asked_s = time.monotonic()
    async with services.scheduler.acquire(
        model, plan_options(model, asked), keep_alive=keep_alive_of(model, keep_alive_s)
    ) as lease:
        record.acquire_s = time.monotonic() - asked_s
        record.load_s = lease.load_s
        yield lease


def _finish(done: Done, answer: _Answer, lease: Lease, record: Record, total_s: float) -> Finished:
    if done.reason == "cancelled":
        # Nobody here asked for it: the worker is being stopped.
        raise StoppingError("the model was unloaded in the middle of the answer")
    record.outcome = done.reason
    record.n_generated = done.n_generated
    record.queue_s, record.prefill_s, record.decode_s = done.queue_s, done.prefill_s, done.decode_s
    return Finished(
        reason=done.reason,
        stop_string=done.stop_string,
        n_prompt=done.n_prompt,
        n_cached=done.n_cached,
        n_generated=done.n_generated,
        n_thinking=answer.n_thinking,
        prefill_s=done.prefill_s,
        decode_s=done.decode_s,
        load_s=lease.load_s,
        total_s=total_s,
        tokens=tuple(done.tokens),
    )
