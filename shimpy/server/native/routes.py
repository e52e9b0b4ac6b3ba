"""shimpy's own routes: all models with the broken ones, and plans."""

from __future__ import annotations

from aiohttp import web

from shimpy.server.ollama import listing
from shimpy.server.services import services_of
from shimpy.server.streaming import json_response


async def models(request: web.Request) -> web.Response:
    """GET /api/models: every model, a broken one with the reason why it can't be used."""
    registry = services_of(request).registry
    found = await registry.models()
    return json_response({"models": [listing.model_entry(model) for model in found]})


ROUTES = [web.get("/api/models", models)]
