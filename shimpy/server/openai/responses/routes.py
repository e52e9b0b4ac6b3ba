"""The routes of the Responses API."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from aiohttp import web

from shimpy.errors import NotFoundError
from shimpy.server.bodies import read_body
from shimpy.server.events import Event
from shimpy.server.generation import run_generation
from shimpy.server.openai.responses.answers import ResponseBuilder
from shimpy.server.openai.responses.requests import AskedResponse, n_chars, parse_response
from shimpy.server.openai.responses.store import ResponseStore, StoredResponse
from shimpy.server.openai.responses.wire import ResponseBody, StreamEvent
from shimpy.server.record import record_of
from shimpy.server.services import services_of
from shimpy.server.streaming import SSE, StreamForm, json_response, sse_json, stream_chunks


async def create(request: web.Request) -> web.StreamResponse:
    """POST /v1/responses."""
    services = services_of(request)
    asked = parse_response(await read_body(request, ResponseBody), services.responses)
    builder = ResponseBuilder(asked.response)
    events = _built(
        run_generation(services, asked.request, record_of(request)),
        builder,
        asked,
        services.responses,
    )
    if asked.stream:
        form = StreamForm(
            content_type=SSE, error_chunk=lambda error: _encoded(builder.failed(error))
        )
        return await stream_chunks(request, _lines(events), form)
    async with aclosing(events):
        async for _ in events:
            pass
    return json_response(builder.response)


async def retrieve(request: web.Request) -> web.Response:
    """GET /v1/responses/{response}: one of those that are kept."""
    response_id = request.match_info["response"]
    stored = services_of(request).responses.get(response_id)
    if stored is None:
        raise _not_found(response_id)
    return json_response(stored.response)


async def delete(request: web.Request) -> web.Response:
    """DELETE /v1/responses/{response}."""
    response_id = request.match_info["response"]
    if not services_of(request).responses.remove(response_id):
        raise _not_found(response_id)
    return json_response({"id": response_id, "object": "response", "deleted": True})


ROUTES = [
    web.post("/v1/responses", create),
    web.get("/v1/responses/{response}", retrieve),
    web.delete("/v1/responses/{response}", delete),
]


async def _built(
    events: AsyncGenerator[Event, None],
    builder: ResponseBuilder,
    asked: AskedResponse,
    store: ResponseStore,
) -> AsyncGenerator[StreamEvent, None]:
    """Yield the events of a response; it is kept before its client hears of its end."""
    async with aclosing(events):
        async for event in events:
            built = builder.take(event)
            if builder.response.usage is not None and asked.response.store:
                said = builder.message()
                stored = StoredResponse(
                    response=builder.response,
                    messages=(*asked.messages, said),
                    n_chars=asked.n_chars + n_chars(said),
                )
                store.add(stored)
            for one in built:
                yield one


async def _lines(events: AsyncGenerator[StreamEvent, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(events):
        async for event in events:
            yield _encoded(event)


def _encoded(event: StreamEvent) -> bytes:
    return sse_json(event, event=event.type)


def _not_found(response_id: str) -> NotFoundError:
    return NotFoundError(
        f"there is no response {response_id[:80]!r}: they are kept in memory until the daemon "
        "stops, the last ones only, and not with store false"
    )
