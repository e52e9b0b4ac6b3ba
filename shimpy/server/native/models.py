"""The older native form's routes of one model: load it, unload it, and how it stands."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from aiohttp import web

from shimpy.server.bodies import read_body
from shimpy.server.generation import acquire, find_model, find_name
from shimpy.server.ollama.options import parse_options
from shimpy.server.ollama.residents import resident_entry
from shimpy.server.ollama.wire import parse_keep_alive
from shimpy.server.record import record_of
from shimpy.server.services import Services, services_of
from shimpy.server.streaming import json_response

# How long an answer waits for the memory to be free; one that still works is unloaded later.
UNLOAD_WAIT_S = 10.0


class LoadBody(msgspec.Struct):
    """POST /api/models/{model}/load: as Ollama's, and all of it may be left out."""

    keep_alive: Any = None
    options: dict[str, Any] | None = None


async def load(request: web.Request) -> web.Response:
    """POST /api/models/{model}/load: answers when it is loaded."""
    services, record = services_of(request), record_of(request)
    body = await read_body(request, LoadBody, may_be_empty=True)
    options, keep_alive_s = parse_options(body.options), parse_keep_alive(body.keep_alive)
    model = await find_model(services, request.match_info["model"], record)
    async with acquire(services, model, options, keep_alive_s, record):
        entry = _resident_entry(services, str(model.name))
    return json_response({"message": f"{model.name} is loaded", "status": "loaded"} | entry)


async def unload(request: web.Request) -> web.Response:
    """POST /api/models/{model}/unload: answers when its memory is free.

    While it still works for somebody it is "unloading": it goes when that has ended.
    """
    services, record = services_of(request), record_of(request)
    name = await find_name(services, request.match_info["model"], record)
    was_loaded = services.scheduler.unload(name)
    status = "unloaded" if was_loaded else "not loaded"
    try:
        async with asyncio.timeout(UNLOAD_WAIT_S):
            await services.scheduler.wait_unloaded(name)
    except TimeoutError:
        status = "unloading"
    return json_response({"message": f"{name} is {status}", "status": status, "model": name})


async def status(request: web.Request) -> web.Response:
    """GET /api/models/{model}/status: whether it is loaded, and where."""
    services, record = services_of(request), record_of(request)
    name = await find_name(services, request.match_info["model"], record)
    entry = _resident_entry(services, name)
    state = entry.get("state", "not loaded")
    return json_response({"status": state, "loaded": state == "ready"} | entry)


async def pin(request: web.Request) -> web.Response:
    """POST /api/models/{model}/pin: once loaded it stays, whoever needs its memory."""
    return await _set_pinned(request, pinned=True)


async def unpin(request: web.Request) -> web.Response:
    """POST /api/models/{model}/unpin: it may leave again, as others do."""
    return await _set_pinned(request, pinned=False)


ROUTES = [
    web.post("/api/models/{model:.+}/load", load),
    web.post("/api/models/{model:.+}/unload", unload),
    web.post("/api/models/{model:.+}/pin", pin),
    web.post("/api/models/{model:.+}/unpin", unpin),
    web.get("/api/models/{model:.+}/status", status),
]


async def _set_pinned(request: web.Request, *, pinned: bool) -> web.Response:
    services, record = services_of(request), record_of(request)
    name = await find_name(services, request.match_info["model"], record)
    services.scheduler.pin(name, pinned=pinned)
    entry = _resident_entry(services, name)
    return json_response({"pinned": pinned, "loaded": entry.get("state") == "ready"} | entry)


def _resident_entry(services: Services, name: str) -> dict[str, Any]:
    """Return a model as /api/ps has it; only its name, where it is not loaded."""
    for resident in services.scheduler.residents():
        if str(resident.model.name) == name:
            return resident_entry(resident)
    return {"model": name}
