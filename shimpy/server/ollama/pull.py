"""POST /api/pull: Ollama's lines, and the plan before the bytes.

{"status":"pulling manifest"}
{"status":"10.1 GiB: will run with ...","model":"name:tag","fits":true,"plan":{...}}
{"status":"pulling 8f1c3c1f2c5d","digest":"sha256:...","total":n,"completed":m}
{"status":"verifying sha256 digest"}
{"status":"writing manifest"}
{"status":"success","model":"name:tag"}
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, assert_never

import msgspec
from aiohttp import web

from shimpy.registry.downloads import Progress
from shimpy.registry.manifest import Manifest
from shimpy.registry.pull import Event, Planned, Step
from shimpy.registry.reference import CatalogReference, Reference, parse_reference
from shimpy.server.bodies import read_body
from shimpy.server.ollama.requests import parse_model
from shimpy.server.record import record_of
from shimpy.server.services import Services, services_of
from shimpy.server.streaming import NDJSON, StreamForm, json_response, ndjson_line, stream_chunks

_FORM = StreamForm(
    content_type=NDJSON, error_chunk=lambda error: ndjson_line({"error": error.message})
)


class PullBody(msgspec.Struct):
    """POST /api/pull; `insecure`, `username` and `password` of Ollama's are passed over."""

    model: str | None = None
    name: str | None = None
    stream: bool | None = None
    # Pull what can't run on this machine too.
    force: bool | None = None


async def pull(request: web.Request) -> web.StreamResponse:
    """POST /api/pull: pull a model, telling what happens; leaving early keeps what came."""
    services = services_of(request)
    body = await read_body(request, PullBody)
    reference = parse_reference(parse_model(body.model, body.name))
    record_of(request).model = str(reference)
    if isinstance(reference, CatalogReference):
        # A name that means nothing is told by the status.
        catalog = await asyncio.to_thread(services.catalog.current)
        catalog.resolve(reference.name)
    lines = _lines(services, reference, force=body.force is True)
    if body.stream is False:
        async with aclosing(lines):
            last = [line async for line in lines][-1]
        return json_response(last)
    return await stream_chunks(request, _encoded(lines), _FORM)


async def _lines(
    services: Services, reference: Reference, *, force: bool
) -> AsyncGenerator[dict[str, Any], None]:
    async with aclosing(services.pulls.follow(reference, force=force)) as events:
        async for event in events:
            yield _line(event)


def _line(event: Event | Manifest) -> dict[str, Any]:
    match event:
        case Step(status=status):
            return {"status": status}
        case Planned(name=name, verdict=verdict):
            return {
                "status": verdict.headline,
                "model": str(name),
                "fits": verdict.fits,
                "plan": verdict.plan,
            }
        case Progress():
            return _progress_line(event)
        case Manifest():
            return {"status": "success", "model": str(event.model_name)}
        case _:
            assert_never(event)


def _progress_line(event: Progress) -> dict[str, Any]:
    what = event.digest.removeprefix("sha256:")[:12] or event.file
    line: dict[str, Any] = {"status": f"pulling {what}", "file": event.file}
    if event.digest:
        line["digest"] = event.digest
    if event.total is not None:
        line["total"] = event.total
    if event.completed:
        line["completed"] = event.completed
    return line


async def _encoded(
    lines: AsyncGenerator[dict[str, Any], None],
) -> AsyncGenerator[bytes, None]:
    async with aclosing(lines):
        async for line in lines:
            yield ndjson_line(line)


ROUTES = [web.post("/api/pull", pull)]
