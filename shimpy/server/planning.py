"""Where a model would be placed, on this machine as it is now or on a supposed one."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec

from shimpy.placement.explain import PlanReport, plan_to_json
from shimpy.placement.hardware import suppose
from shimpy.placement.placement import PlanOptions
from shimpy.registry.model import Model
from shimpy.scheduler.loads import with_defaults
from shimpy.server.services import Services
from shimpy.server.settings import plan_options


class Supposition(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be other than on this machine; None: nothing."""

    # Free bytes of each card; empty: no card.
    vram_bytes: Sequence[int] | None = None
    ram_bytes: int | None = None
    options: PlanOptions = msgspec.field(default_factory=PlanOptions)


async def plan_model(
    services: Services,
    model: Model,
    supposed: Supposition | None = None,
    *,
    exactly: bool = False,
) -> dict[str, Any] | None:
    """Return the JSON of a model's plan; None where its shape is not known.

    `exactly`: llama.cpp is asked what the placement takes, which may last a second; else that is
    told where it is known already.

    Raises:
        InvalidOptionError: an option can't be used with this model.
        WorkerError: the machine can't be asked for its devices.
    """
    if model.shape is None:
        return None
    wish = supposed or Supposition()
    actual = await asyncio.to_thread(services.machine.probe)
    hardware = suppose(actual, vram_bytes=wish.vram_bytes, ram_bytes=wish.ram_bytes)
    options = with_defaults(plan_options(model, wish.options), services.config)
    simulations = services.scheduler.simulations
    if exactly:
        plan = await asyncio.to_thread(simulations.plan_exactly, model, hardware, options)
    else:
        plan = simulations.plan(model.shape, hardware, options)
    name = str(model.name)
    report = PlanReport(model=name, shape=model.shape, hardware=hardware, plan=plan)
    return plan_to_json(report)
