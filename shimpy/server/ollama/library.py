"""Ollama's routes that change which models there are: create, copy, delete, and blobs."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncGenerator
from functools import partial
from typing import Any, Final

import msgspec
from aiohttp import web

from shimpy.errors import DiskFullError, UnsupportedError, UserError
from shimpy.parameters import check_parameters
from shimpy.registry.blobs import BlobWriter
from shimpy.registry.manifest import Manifest, parse_digest
from shimpy.registry.model import Model
from shimpy.registry.settings import ModelSettings, Turn
from shimpy.registry.store import Store
from shimpy.server.bodies import read_body, read_chunk
from shimpy.server.cards import make_card
from shimpy.server.generation import find_model
from shimpy.server.library import (
    check_target,
    copy_model,
    manifest_from,
    manifest_of_blobs,
    remove_model,
)
from shimpy.server.ollama.requests import parse_model
from shimpy.server.record import Record, record_of
from shimpy.server.services import Services, services_of
from shimpy.server.streaming import NDJSON, StreamForm, json_response, ndjson_line, stream_chunks
from shimpy.units import format_bytes

# Written at once: each write is a trip to a thread.
_CHUNK: Final = 4 * 1024 * 1024
# Left free by an upload.
_HEADROOM: Final = 64 * 1024 * 1024

STATUS_FORM: Final = StreamForm(
    content_type=NDJSON, error_chunk=lambda error: ndjson_line({"error": error.message})
)


class NameBody(msgspec.Struct):
    """DELETE /api/delete."""

    model: str | None = None
    name: str | None = None


class CopyBody(msgspec.Struct):
    """POST /api/copy."""

    source: str | None = None
    destination: str | None = None


class CreateBody(msgspec.Struct, rename={"from_": "from"}):
    """POST /api/create: a model from another one, or from files that were uploaded as blobs."""

    model: str | None = None
    name: str | None = None
    from_: str | None = None
    # File names to digests.
    files: dict[str, str] | None = None
    adapters: dict[str, str] | None = None
    template: str | None = None
    license: str | list[str] | None = None
    system: str | None = None
    parameters: dict[str, Any] | None = None
    messages: list[Turn] | None = None
    quantize: str | None = None
    modelfile: str | None = None
    stream: bool | None = None


async def delete(request: web.Request) -> web.Response:
    """DELETE /api/delete: remove a model of the store."""
    body = await read_body(request, NameBody)
    name = parse_model(body.model, body.name)
    await remove_model(services_of(request), name, record_of(request))
    return web.Response()


async def copy(request: web.Request) -> web.Response:
    """POST /api/copy: give a model a second name."""
    body = await read_body(request, CopyBody)
    if not body.source or not body.destination:
        raise UserError("source and destination are required")
    await copy_model(services_of(request), body.source, body.destination, record_of(request))
    return web.Response()


async def head_blob(request: web.Request) -> web.Response:
    """HEAD /api/blobs/:digest: whether a file is there already."""
    digest = parse_digest(request.match_info["digest"])
    is_there = await asyncio.to_thread(services_of(request).store.blobs.__contains__, digest)
    return web.Response(status=200 if is_there else 404)


async def post_blob(request: web.Request) -> web.Response:
    """POST /api/blobs/:digest: upload a file, to be named by a create."""
    blobs = services_of(request).store.blobs
    digest = parse_digest(request.match_info["digest"])
    if await asyncio.to_thread(blobs.__contains__, digest):
        return web.Response(status=200)
    store = services_of(request).store
    await asyncio.to_thread(_check_room, store, request.content_length or 0)
    writer = await asyncio.to_thread(blobs.begin, digest, resume=False)
    try:
        await _receive(request, store, writer)
        await asyncio.to_thread(writer.commit)
    finally:
        await asyncio.to_thread(writer.close)
    return web.Response(status=201)


async def create(request: web.Request) -> web.StreamResponse:
    """POST /api/create: statuses until the model is there."""
    services = services_of(request)
    body = await read_body(request, CreateBody)
    statuses = _create(services, body, record_of(request))
    if body.stream is False:
        async with contextlib.aclosing(statuses):
            last = [status async for status in statuses][-1]
        return json_response({"status": last})
    return await stream_chunks(request, _status_lines(statuses), STATUS_FORM)


async def _create(
    services: Services, body: CreateBody, record: Record
) -> AsyncGenerator[str, None]:
    """Make a model and yield what is being done, "success" last.

    Raises:
        UserError: the body asks for what can't be.
        NotFoundError: the model or a blob to make it from is not there.
        GgufError: the files are no model.
    """
    name = await check_target(services, parse_model(body.model, body.name))
    record.model = str(name)
    given = _parse_settings(body)
    files = body.files or {}
    if body.from_:
        yield "reading model metadata"
        base = await find_model(services, body.from_, record)
        settings = given.over(base.settings.without("aliases"))
        make = partial(manifest_from, services.store, base, name, settings)
    elif files:
        yield "parsing GGUF"
        make = partial(manifest_of_blobs, services.store.blobs, files, name, given)
    else:
        raise UserError('neither "from" nor "files" was specified')
    with services.store.pinned(*map(parse_digest, files.values())):
        manifest = await asyncio.to_thread(make)
        await asyncio.to_thread(_check_template, services.store, manifest, given)
        for file in manifest.files:
            if file.digest:
                yield f"using existing layer {file.digest}"
        yield "writing manifest"
        await asyncio.to_thread(services.store.put_manifest, manifest)
    services.scheduler.unload(str(name))
    await services.registry.scan()
    record.model = str(name)
    yield "success"


def _parse_settings(body: CreateBody) -> ModelSettings:
    if body.modelfile:
        raise UserError("send the Modelfile's parts as fields: from, parameters, system, template")
    if body.adapters:
        raise UnsupportedError("LoRA adapters are not supported")
    if body.quantize:
        raise UnsupportedError("shimpy does not quantize; pull the model quantized")
    text = "\n".join(body.license) if isinstance(body.license, list) else body.license
    return ModelSettings(
        parameters=check_parameters(body.parameters or {}),
        system=body.system or None,
        template=body.template or None,
        messages=tuple(body.messages) if body.messages else None,
        license=text or None,
    )


def _check_template(store: Store, manifest: Manifest, settings: ModelSettings) -> None:
    """Refuse a template that the model can't use, before it is kept; blocking."""
    if not settings.template:
        return
    files = [store.path_of(file) for file in manifest.files if file.role == "model"]
    model = Model(
        name=manifest.model_name,
        files=tuple(files),
        size_bytes=0,
        modified_s=0.0,
        digest="",
        source="",
        shape=None,
    )
    make_card(model).compile_template(settings.template)


async def _status_lines(statuses: AsyncGenerator[str, None]) -> AsyncGenerator[bytes, None]:
    async with contextlib.aclosing(statuses):
        async for status in statuses:
            yield ndjson_line({"status": status})


def _check_room(store: Store, n_bytes: int) -> None:
    """Refuse so many bytes more where the disk can't hold them, and leave some for others."""
    free = shutil.disk_usage(store.root).free
    if n_bytes + _HEADROOM > free:
        raise DiskFullError(
            f"the upload needs {format_bytes(n_bytes)}, and {store.root} has {format_bytes(free)} "
            f"free, of which {format_bytes(_HEADROOM)} stay free; `shimpy rm` and `shimpy gc` "
            "make room"
        )


async def _receive(request: web.Request, store: Store, writer: BlobWriter) -> None:
    """Write a body to disk as it comes."""
    pending = bytearray()
    while True:
        data = await read_chunk(request)
        pending += data
        if len(pending) >= _CHUNK or not data:
            await asyncio.to_thread(_write, store, writer, bytes(pending))
            pending.clear()
        if not data:
            return


def _write(store: Store, writer: BlobWriter, data: bytes) -> None:
    # A body of unknown length must not fill the disk to the brim.
    _check_room(store, len(data))
    writer.write(data)


ROUTES = [
    web.delete("/api/delete", delete),
    web.post("/api/copy", copy),
    web.head("/api/blobs/{digest}", head_blob),
    web.post("/api/blobs/{digest}", post_blob),
    web.post("/api/create", create),
]
