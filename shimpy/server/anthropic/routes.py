"""Anthropic's routes: bodies parsed by `requests`, answers formed by `answers`.

Any anthropic-version is taken: what it says changes nothing here.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from aiohttp import web

from shimpy.server.anthropic.answers import stream_events, whole_message
from shimpy.server.anthropic.requests import parse_messages, parse_prompt
from shimpy.server.anthropic.wire import MessagesBody, StreamEvent
from shimpy.server.bodies import read_body
from shimpy.server.errors import anthropic_error
from shimpy.server.generation import acquire, find_model, prepare_request, run_generation
from shimpy.server.record import record_of
from shimpy.server.services import services_of
from shimpy.server.streaming import SSE, StreamForm, json_response, sse_json, stream_chunks

_FORM = StreamForm(
    content_type=SSE,
    error_chunk=lambda error: sse_json(anthropic_error(error), event="error"),
    ping=sse_json({"type": "ping"}, event="ping"),
)


async def messages(request: web.Request) -> web.StreamResponse:
    """POST /v1/messages."""
    asked = parse_messages(await read_body(request, MessagesBody))
    events = run_generation(services_of(request), asked.generation, record_of(request))
    if asked.stream:
        return await stream_chunks(request, _lines(stream_events(events, asked)), _FORM)
    return json_response(await whole_message(events, asked))


async def count_tokens(request: web.Request) -> web.Response:
    """POST /v1/messages/count_tokens: how long the prompt is for this model, which is loaded."""
    asked = parse_prompt(await read_body(request, MessagesBody))
    services, record = services_of(request), record_of(request)
    model = await find_model(services, asked.model, record)
    prepared = await prepare_request(services, model, asked)
    async with acquire(services, model, asked.options, asked.keep_alive_s, record) as lease:
        submit = prepared.submit
        counted = await lease.tokenize(prompt=submit.prompt, add_special=submit.add_bos)
    record.n_prompt = len(counted.ids)
    return json_response({"input_tokens": len(counted.ids)})


ROUTES = [
    web.post("/v1/messages", messages),
    web.post("/v1/messages/count_tokens", count_tokens),
]


async def _lines(events: AsyncGenerator[StreamEvent, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(events):
        async for event in events:
            kind = event.__struct_config__.tag
            yield sse_json(event, event=str(kind))
