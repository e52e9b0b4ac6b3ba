"""llama.cpp's routes that make text: /completion and /infill."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

from aiohttp import web

from shimpy.errors import ShimpyError
from shimpy.server.bodies import read_body
from shimpy.server.choices import check_choices, run_choices
from shimpy.server.choosing import GENERATING, INFILLING, choose_model
from shimpy.server.errors import llamacpp_error
from shimpy.server.events import Event
from shimpy.server.generation import acquire, find_model
from shimpy.server.llamacpp.answers import Head, completion_chunks, whole_completions
from shimpy.server.llamacpp.options import settings_entry
from shimpy.server.llamacpp.requests import Asked, parse_completion, parse_infill
from shimpy.server.llamacpp.wire import CompletionBody, InfillBody
from shimpy.server.record import Record, record_of
from shimpy.server.requests import MixedPrompt, PlainPrompt, Prompt
from shimpy.server.services import Services, services_of
from shimpy.server.settings import with_settings
from shimpy.server.streaming import SSE, StreamForm, json_response, sse_json, stream_chunks


def _error_chunk(error: ShimpyError) -> bytes:
    return sse_json(llamacpp_error(error))


_FORM = StreamForm(content_type=SSE, error_chunk=_error_chunk)


async def completion(request: web.Request) -> web.StreamResponse:
    """POST /completion: text as it is, in no template."""
    body = await read_body(request, CompletionBody)
    model = await choose_model(services_of(request), body.model, GENERATING)
    return await _answer(request, parse_completion(body, model))


async def infill(request: web.Request) -> web.StreamResponse:
    """POST /infill: what belongs between two texts, by the model's own tokens for that."""
    body = await read_body(request, InfillBody)
    model = await choose_model(services_of(request), body.model, INFILLING)
    return await _answer(request, parse_infill(body, model))


async def _answer(request: web.Request, given: Asked) -> web.StreamResponse:
    services, record = services_of(request), record_of(request)
    check_choices(len(given.requests), given.n)
    asked = await _with_text_biases(services, given, record)
    head = await _head(services, asked, record)
    events = run_choices(services, asked.requests, asked.n, record)
    if asked.stream:
        return await stream_chunks(request, _lines(events, head, record), _FORM)
    completions = await whole_completions(events, head)
    _tell_outcome(record)
    return json_response(completions[0] if len(completions) == 1 else completions)


async def _with_text_biases(services: Services, asked: Asked, record: Record) -> Asked:
    """Return the request with biases by text as biases by token."""
    if not asked.text_biases:
        return asked
    model = await find_model(services, asked.model, record)
    first = asked.requests[0]
    biases: dict[int, float] = {}
    async with acquire(services, model, first.options, first.keep_alive_s, record) as lease:
        for text, amount in asked.text_biases.items():
            tokenized = await lease.tokenize(text, parse_special=False)
            biases |= dict.fromkeys(tokenized.ids, amount)
    return asked.with_biases(biases)


async def _head(services: Services, asked: Asked, record: Record) -> Head:
    model = await find_model(services, asked.model, record)
    effective = [with_settings(one, model) for one in asked.requests]
    return Head(
        asked=asked,
        model=asked.model,
        settings=[
            settings_entry(one.options, one.options.sampling(one.grammar)) for one in effective
        ],
        prompts=[_text_of(one.prompt) for one in asked.requests],
        clock=time.monotonic,
    )


def _text_of(prompt: Prompt) -> str:
    match prompt:
        case PlainPrompt(text=text):
            return text
        case MixedPrompt(pieces=pieces):
            return "".join(piece for piece in pieces if isinstance(piece, str))
        case _:
            return ""


async def _lines(
    events: AsyncGenerator[tuple[int, Event], None], head: Head, record: Record
) -> AsyncGenerator[bytes, None]:
    async with aclosing(completion_chunks(events, head)) as chunks:
        async for chunk in chunks:
            yield sse_json(chunk)
    _tell_outcome(record)


def _tell_outcome(record: Record) -> None:
    """An answer that was cut here has not ended for the worker."""
    record.outcome = record.outcome or "length"


ROUTES = [
    web.post("/completion", completion),
    web.post("/completions", completion),
    web.post("/infill", infill),
]
