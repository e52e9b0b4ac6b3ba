"""The HTTP application: every dialect's routes behind one chain of middleware.

A request passes, from the outside in: `observe` (its id, its place in the count of running
requests, its canonical log line), `answer_errors` (errors become the dialect's answers) and
`admit` (not while stopping; Host and Origin; preflights; API keys).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable

from aiohttp import hdrs, web

import shimpy
from shimpy.errors import ShimpyError, StoppingError
from shimpy.logs import get_logger
from shimpy.server.anthropic import routes as anthropic
from shimpy.server.errors import (
    InternalError,
    error_body,
    headers_of,
    is_anthropic,
    status_at,
)
from shimpy.server.gate import peer_uid
from shimpy.server.guard import cors_headers
from shimpy.server.llamacpp import ranking, reports, texts
from shimpy.server.llamacpp import routes as llamacpp
from shimpy.server.native import (
    catalog,
    diagnosis,
    events,
    models,
    operations,
    sockets,
    store,
)
from shimpy.server.native import routes as native
from shimpy.server.ollama import library, pull
from shimpy.server.ollama import routes as ollama
from shimpy.server.openai import routes as openai
from shimpy.server.record import REQUEST_ID_HEADER, Record, attach_record, log_bug, record_of
from shimpy.server.services import SERVICES, Services, services_of
from shimpy.server.streaming import JSON

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_log = get_logger("server")
_CLIENT_ERROR = 400


def make_app(services: Services, routes: Iterable[web.RouteDef] | None = None) -> web.Application:
    """Return the application; `routes` are those of all dialects unless given."""
    app = web.Application(
        middlewares=[observe, answer_errors, admit],
        client_max_size=services.config.max_body,
    )
    app[SERVICES] = services
    app.on_response_prepare.append(_add_headers)
    app.add_routes(all_routes() if routes is None else routes)
    return app


def all_routes() -> list[web.RouteDef]:
    """Return the routes of all dialects."""
    return [
        *ollama.ROUTES,
        *library.ROUTES,
        *pull.ROUTES,
        *openai.ROUTES,
        *anthropic.ROUTES,
        *llamacpp.ROUTES,
        *texts.ROUTES,
        *ranking.ROUTES,
        *reports.ROUTES,
        *native.ROUTES,
        *models.ROUTES,
        *sockets.ROUTES,
        *events.ROUTES,
        *diagnosis.ROUTES,
        *catalog.ROUTES,
        *store.ROUTES,
        *operations.ROUTES,
    ]


@web.middleware
async def observe(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Count the request, and log it once when it ends, however it ends."""
    lifecycle = services_of(request).lifecycle
    record = attach_record(request)
    record.on_tokens = services_of(request).metrics.on_tokens
    started_s = time.monotonic()
    try:
        with lifecycle.running():
            response = await handler(request)
    except asyncio.CancelledError:
        record.outcome = "stopping" if lifecycle.is_stopping else "client_gone"
        raise
    else:
        record.status = response.status
        return response
    finally:
        _log_request(request, record, time.monotonic() - started_s)


@web.middleware
async def answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn what a handler raises into the answer that the client's dialect knows."""
    record = record_of(request)
    try:
        return await handler(request)
    except ShimpyError as error:
        return _error_response(request, record, error)
    except web.HTTPNotFound:
        return web.Response(status=404, text="404 page not found")
    except web.HTTPMethodNotAllowed as error:
        allow = ", ".join(sorted(error.allowed_methods))
        headers = {hdrs.ALLOW: allow}
        return web.Response(status=405, text="405 method not allowed", headers=headers)
    except web.HTTPException:
        raise
    except ConnectionError:
        # The client went while its body was read or its answer written.
        record.outcome = "client_gone"
        raise
    except Exception as error:  # noqa: BLE001 - the boundary of a request
        log_bug(record, error)
        return _error_response(request, record, InternalError(record.request_id))


@web.middleware
async def admit(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuse what may not come in, and answer preflights; see `guard`."""
    services = services_of(request)
    if services.lifecycle.is_stopping:
        raise StoppingError
    origin = request.headers.get(hdrs.ORIGIN)
    # No web page reaches a Unix socket, and no name leads there.
    if peer_uid(request) is None:
        services.guard.check(host=request.headers.get(hdrs.HOST), origin=origin)
    if request.method == hdrs.METH_OPTIONS and origin is not None:
        wanted = request.headers.get(hdrs.ACCESS_CONTROL_REQUEST_HEADERS, "")
        return web.Response(status=204, headers=cors_headers(origin, wanted))
    key = services.gate.check(request)
    record_of(request).key = None if key is None else key.id
    return await handler(request)


def _error_response(request: web.Request, record: Record, error: ShimpyError) -> web.Response:
    record.outcome, record.error = error.code, error.message
    headers = {hdrs.CONTENT_TYPE: JSON, **headers_of(error)}
    status = status_at(request.path, error)
    response = web.Response(body=error_body(request.path, error), status=status, headers=headers)
    if not request.body_exists or request.content.at_eof():
        return response
    # The rest of a refused body would be read as the next request.
    response.force_close()
    return response


async def _add_headers(request: web.Request, response: web.StreamResponse) -> None:
    services = services_of(request)
    origin = request.headers.get(hdrs.ORIGIN)
    if origin is not None and services.guard.allows_origin(origin):
        response.headers.update(cors_headers(origin, None))
    request_id = record_of(request).request_id
    response.headers[REQUEST_ID_HEADER] = request_id
    if is_anthropic(request.path):
        # Where Anthropic's SDKs look for it.
        response.headers["request-id"] = request_id
    response.headers[hdrs.SERVER] = f"shimpy/{shimpy.__version__}"


def _log_request(request: web.Request, record: Record, total_s: float) -> None:
    resource = request.match_info.route.resource
    services_of(request).metrics.on_request(
        method=request.method if request.method in hdrs.METH_ALL else "other",
        route=resource.canonical if resource is not None else "unknown",
        record=record,
        total_s=total_s,
    )
    _log.info(
        "request",
        request=record.request_id,
        method=request.method,
        path=request.path,
        total_s=round(total_s, 4),
        **record.fields(),
    )
