"""Routes for whoever runs the daemon: is it alive, is it ready, how is it doing."""

from __future__ import annotations

import asyncio

from aiohttp import web

from shimpy.server.metrics import CONTENT_TYPE
from shimpy.server.openapi import describe, routes_of
from shimpy.server.services import services_of
from shimpy.server.streaming import json_response


async def ready(request: web.Request) -> web.Response:
    """GET /ready: 200 once models can be asked for; while the daemon stops, 503."""
    # Waits for the first scan of the folders: before it every name is unknown.
    models = await services_of(request).registry.models()
    usable = sum(model.error is None for model in models)
    return json_response({"status": "ready", "models": usable})


async def metrics(request: web.Request) -> web.Response:
    """GET /metrics: counters, gauges and histograms in Prometheus' text format."""
    body = services_of(request).metrics.render()
    return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE})


async def openapi(request: web.Request) -> web.Response:
    """GET /openapi.json: what can be asked for here, for programs."""
    return json_response(await asyncio.to_thread(describe, routes_of(request.app)))


async def reload(request: web.Request) -> web.Response:
    """POST /api/reload: read the config again, as at SIGHUP."""
    services = services_of(request)
    return json_response(await services.reloader.reload(services))


ROUTES = [
    web.get("/openapi.json", openapi),
    web.post("/api/reload", reload),
    web.get("/ready", ready),
    web.get("/metrics", metrics),
]
