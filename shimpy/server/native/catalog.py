"""GET /api/catalog: the models that can be pulled by a short name."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from aiohttp import web

from shimpy.names import ModelName
from shimpy.registry.catalog import Entry
from shimpy.server.services import services_of
from shimpy.server.streaming import json_response


async def catalog(request: web.Request) -> web.Response:
    """GET /api/catalog: every entry, with what is installed of it."""
    services = services_of(request)
    entries = (await asyncio.to_thread(services.catalog.current)).entries
    models = await services.registry.models()
    names = [model.name for model in models if model.error is None]
    rows = [entry_row(name, entry, names) for name, entry in entries.items()]
    return json_response({"models": rows})


def entry_row(name: str, entry: Entry, names: Sequence[ModelName]) -> dict[str, Any]:
    """Return an entry as the route lists it; `names` are those of all models here."""
    return {
        "name": name,
        "title": entry.title,
        "license": entry.license,
        "repositories": entry.repositories(),
        # None: all that the repository has.
        "tags": list(entry.tags) or None,
        "aliases": list(entry.aliases),
        "options": dict(entry.options),
        "notes": entry.notes,
        "checked": entry.checked,
        "unavailable": entry.unavailable,
        "builtin": entry.builtin,
        "installed": [str(other) for other in names if other.name == name],
    }


ROUTES = [web.get("/api/catalog", catalog)]
