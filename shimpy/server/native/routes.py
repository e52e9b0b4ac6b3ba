"""shimpy's own routes: all models with the broken ones, and plans."""

from __future__ import annotations

from aiohttp import web

from shimpy.server.bodies import read_body
from shimpy.server.generation import find_model
from shimpy.server.native.wire import PlanBody, parse_supposition
from shimpy.server.ollama import listing
from shimpy.server.ollama.requests import parse_model
from shimpy.server.planning import plan_model
from shimpy.server.record import record_of
from shimpy.server.services import services_of
from shimpy.server.streaming import json_response


async def models(request: web.Request) -> web.Response:
    """GET /api/models: every model, a broken one with the reason why it can't be used.

    `problems` are what keeps models from being seen, or from having the name of their file.
    """
    registry = services_of(request).registry
    found = await registry.models()
    entries = [listing.model_entry(model) for model in found]
    return json_response({"models": entries, "problems": registry.problems})


async def plan(request: web.Request) -> web.Response:
    """POST /api/plan: where a model would be placed and why, here or on a supposed machine."""
    services = services_of(request)
    body = await read_body(request, PlanBody)
    supposed = parse_supposition(body)
    model = await find_model(services, parse_model(body.model, body.name), record_of(request))
    return json_response(await plan_model(services, model, supposed, exactly=True))


ROUTES = [web.get("/api/models", models), web.post("/api/plan", plan)]
