"""llama.cpp's reports: what the model is and how it is loaded, and what its slots do."""

from __future__ import annotations

from typing import Any

from aiohttp import web

import shimpy
from shimpy.errors import QueueFullError
from shimpy.registry.model import Model
from shimpy.scheduler.reports import ResidentInfo
from shimpy.server.choosing import ANYTHING, choose_model
from shimpy.server.generation import find_model
from shimpy.server.llamacpp.options import settings_entry
from shimpy.server.planning import plan_model
from shimpy.server.record import record_of
from shimpy.server.services import Services, services_of
from shimpy.server.settings import options_of
from shimpy.server.streaming import json_response


async def props(request: web.Request) -> web.Response:
    """GET /props: the model's template and context; `model` in the query names it."""
    services = services_of(request)
    name = await choose_model(services, request.query.get("model"), ANYTHING)
    model = await find_model(services, name, record_of(request))
    card = await services.cards.get(model)
    n_ctx, n_slots = await _context(services, model)
    options = options_of(model.settings)
    return json_response(
        {
            "default_generation_settings": {
                "params": settings_entry(options, options.sampling()),
                "n_ctx": n_ctx,
            },
            "total_slots": n_slots,
            "model_alias": str(model.name),
            "model_path": str(model.path),
            "modalities": {"vision": False, "audio": False},
            "endpoint_slots": True,
            "endpoint_props": False,
            "endpoint_metrics": True,
            "chat_template": card.template.source,
            "bos_token": card.bos_text,
            "eos_token": card.eos_text,
            "build_info": f"shimpy-{shimpy.__version__}",
            "is_sleeping": _resident(services, model) is None,
        }
    )


async def slots(request: web.Request) -> web.Response:
    """GET /slots: those of the loaded models, or of the one that `model` in the query names.

    With `fail_on_no_slot` it is a 503 when none is free.
    """
    services = services_of(request)
    residents = [one for one in services.scheduler.residents() if one.state != "stopping"]
    name = request.query.get("model")
    if name:
        model = await find_model(services, name, record_of(request))
        residents = [one for one in residents if one.model.name == model.name]
    entries = [slot for resident in residents for slot in slot_entries(resident)]
    is_full = bool(entries) and all(slot["is_processing"] for slot in entries)
    if is_full and "fail_on_no_slot" in request.query:
        raise QueueFullError("no slot available")
    return json_response(entries)


ROUTES = [web.get("/props", props), web.get("/slots", slots)]


def slot_entries(resident: ResidentInfo) -> list[dict[str, Any]]:
    """Return a loaded model's slots; which of them are busy is not known, only how many."""
    placement = resident.rung.placement
    n_ctx = placement.n_ctx if resident.ready is None else resident.ready.n_ctx
    n_busy = 0 if resident.stats is None else resident.stats.n_busy
    return [
        {
            "id": index,
            "n_ctx": n_ctx,
            "speculative": False,
            "is_processing": index < n_busy,
            "model": str(resident.model.name),
        }
        for index in range(placement.n_slots)
    ]


async def _context(services: Services, model: Model) -> tuple[int, int]:
    """Return the context and the slots of a model as it is loaded, or as it would be."""
    resident = _resident(services, model)
    if resident is not None:
        placement = resident.rung.placement
        n_ctx = placement.n_ctx if resident.ready is None else resident.ready.n_ctx
        return n_ctx, placement.n_slots
    plan = await plan_model(services, model) or {}
    placed = plan.get("placement") or {}
    trained = 0 if model.shape is None else model.shape.n_ctx_train
    return placed.get("n_ctx", trained), placed.get("n_slots", 1)


def _resident(services: Services, model: Model) -> ResidentInfo | None:
    found = (one for one in services.scheduler.residents() if one.model.name == model.name)
    return next((one for one in found if one.state != "stopping"), None)
