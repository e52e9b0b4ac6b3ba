"""shimpy's own routes to the store: a model's settings, the garbage collector, and verifying."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import msgspec
from aiohttp import web
from msgspec.structs import replace

from shimpy.errors import NotFoundError, UnsupportedError
from shimpy.names import ModelName
from shimpy.registry.store import YOUNG_S, Store, Verified
from shimpy.server.bodies import read_body
from shimpy.server.cards import make_card
from shimpy.server.generation import find_model
from shimpy.server.library import put_settings
from shimpy.server.native.settings import changed
from shimpy.server.ollama.library import STATUS_FORM
from shimpy.server.ollama.requests import parse_model
from shimpy.server.prefixes import sweep
from shimpy.server.record import record_of
from shimpy.server.services import Services, services_of
from shimpy.server.streaming import json_response, ndjson_line, stream_chunks


class SettingsBody(msgspec.Struct):
    """POST /api/settings: what to set about a model and what to take back; neither: show."""

    model: str | None = None
    name: str | None = None
    set: dict[str, Any] | None = None
    unset: list[str] | None = None


class CollectBody(msgspec.Struct):
    """POST /api/gc."""

    # What is unused but young goes too.
    all: bool | None = None
    # All saved prefixes of prompts go too.
    prefixes: bool | None = None


class VerifyBody(msgspec.Struct):
    """POST /api/verify: some models, or all that are in the store."""

    models: list[str] | None = None


async def settings(request: web.Request) -> web.Response:
    """POST /api/settings: set and unset what lasts about a model, wherever it lies."""
    services = services_of(request)
    body = await read_body(request, SettingsBody)
    model = await find_model(services, parse_model(body.model, body.name), record_of(request))
    own = services.store.settings(model.name)
    if body.set or body.unset:
        own = changed(own, body.set or {}, body.unset or [])
        if body.set and own.template:
            card = await asyncio.to_thread(make_card, model)
            await asyncio.to_thread(card.compile_template, own.template)
        model = await put_settings(services, model, own)
    return json_response({"model": str(model.name), "settings": own, "effective": model.settings})


async def gc(request: web.Request) -> web.Response:
    """POST /api/gc: remove what no model needs."""
    body = msgspec.convert({}, CollectBody)
    if request.body_exists:
        body = await read_body(request, CollectBody)
    services = services_of(request)
    min_age_s = 0.0 if body.all else YOUNG_S
    collected = await asyncio.to_thread(services.store.gc, min_age_s=min_age_s)
    if body.prefixes:
        swept = await asyncio.to_thread(sweep, services.config.prefix_dir, [])
        collected = replace(
            collected,
            n_files=collected.n_files + swept.n_files,
            freed_bytes=collected.freed_bytes + swept.n_bytes,
        )
    return json_response(collected)


async def verify(request: web.Request) -> web.StreamResponse:
    """POST /api/verify: read files again and compare them with their digests, telling progress."""
    services = services_of(request)
    body = msgspec.convert({}, VerifyBody)
    if request.body_exists:
        body = await read_body(request, VerifyBody)
    names = await _names(services, body.models)
    return await stream_chunks(request, _verify(services.store, names), STATUS_FORM)


async def _names(services: Services, wanted: list[str] | None) -> list[ModelName]:
    if not wanted:
        return [manifest.model_name for manifest in services.store.manifests()]
    names = []
    for text in wanted:
        try:
            model = await services.registry.resolve(text)
        except NotFoundError as error:
            raise NotFoundError(f"model '{text}' not found: {error.message}") from error
        if services.store.manifest(model.name) is None:
            raise UnsupportedError(
                f'"{model.name}" is not in the store ({model.source}): nothing tells what its '
                "digest should be"
            )
        names.append(model.name)
    return names


# Progress in smaller steps is not told.
_STEP_BYTES = 64 * 1024 * 1024


class _GoneError(Exception):
    """Nobody waits for the answer any more."""


class _Progress:
    """How far a thread is, told to the loop: the newest only, so that nothing piles up."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        self._latest: tuple[str, int, int] | None = None
        self._next_bytes = _STEP_BYTES
        self.is_wanted = True

    def tell(self, name: str, n_bytes: int, total: int) -> None:
        """Take note of how far a file is; in the thread."""
        if not self.is_wanted:
            raise _GoneError
        if n_bytes < min(self._next_bytes, total):
            return
        self._next_bytes = n_bytes + _STEP_BYTES if n_bytes < total else _STEP_BYTES
        self._latest = (name, n_bytes, total)
        self._loop.call_soon_threadsafe(self._news.set)

    async def wait(self) -> tuple[str, int, int] | None:
        """Wait for news."""
        await self._news.wait()
        self._news.clear()
        return self._latest


async def _verify(store: Store, names: list[ModelName]) -> AsyncGenerator[bytes, None]:
    n_bad = 0
    for name in names:
        found: list[Verified] = []
        async with aclosing(_verify_one(store, name, found)) as lines:
            async for line in lines:
                yield line
        for file in found:
            n_bad += file.problem is not None
            yield ndjson_line(
                {
                    "status": "damaged" if file.problem else "verified",
                    "model": str(name),
                    "file": file.file.name,
                    "digest": file.file.digest,
                    "problem": file.problem,
                }
            )
    yield ndjson_line({"status": "failed" if n_bad else "success"})


async def _verify_one(
    store: Store, name: ModelName, found: list[Verified]
) -> AsyncGenerator[bytes, None]:
    """Yield how far it is, and put what was found into `found`."""
    progress = _Progress()
    work = asyncio.ensure_future(asyncio.to_thread(store.verify, name, on_bytes=progress.tell))
    try:
        while not work.done():
            news = asyncio.ensure_future(progress.wait())
            await asyncio.wait({work, news}, return_when=asyncio.FIRST_COMPLETED)
            latest = news.result() if news.done() else None
            news.cancel()
            if latest is not None:
                file, completed, total = latest
                yield ndjson_line(
                    {
                        "status": f"verifying {name}",
                        "model": str(name),
                        "file": file,
                        "total": total,
                        "completed": completed,
                    }
                )
        found += work.result()
    finally:
        progress.is_wanted = False
        await asyncio.gather(work, return_exceptions=True)


ROUTES = [
    web.post("/api/settings", settings),
    web.post("/api/gc", gc),
    web.post("/api/verify", verify),
]
