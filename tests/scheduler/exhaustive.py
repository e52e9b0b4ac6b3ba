"""Every way to place all models of a simulation, to hold the scheduler's search against."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import TYPE_CHECKING

from shimpy.placement.placement import Plan, PlanOptions, Rung
from shimpy.registry.model import Model
from shimpy.scheduler.room import as_it_is, can_shrink
from shimpy.scheduler.states import ModelQueue, Phase
from tests.scheduler.support import taken

if TYPE_CHECKING:
    from tests.scheduler.simulation import Simulation


def all_fit(sim: Simulation) -> str:
    """Return a placement in which what is waited for fits beside all others; "": none.

    A good placement of it, and the others as they are or, where they are idle, with their
    experts in RAM. Nothing is said while workers come or go, or several models are waited for.
    """
    core = sim.core
    waited = [q for q in core.queues.values() if core._books.needs_placing(q)]
    steady = all(resident.phase is Phase.READY for resident in core.residents.values())
    if len(waited) != 1 or not steady or core._books.moving or waited[0].retry is not None:
        return ""
    queue = waited[0]
    options = queue.waiting[0].options
    if any(request.options != options for request in queue.waiting):
        return ""
    others = [r for r in core.residents.values() if r is not queue.resident]
    choices = [list(_good(sim, queue, options))]
    for resident in others:
        choices.append([resident.rung])
        if resident.is_idle and not resident.is_pinned and can_shrink(resident):
            ladder = _plan(sim, resident.model, as_it_is(resident)).ladder
            small = [rung for rung in ladder if rung.placement.mode == "experts-in-ram"]
            choices[-1] += [rung for rung in small if vram_of(rung) < vram_of(resident.rung)]
    for rungs in product(*choices):
        if _fit(sim, rungs):
            return ", ".join(rung.placement.mode for rung in rungs)
    return ""


def vram_of(rung: Rung) -> int:
    """Return the bytes that a rung takes of the one GPU."""
    return sum(device.total_bytes for device in rung.devices)


def _good(sim: Simulation, queue: ModelQueue, options: PlanOptions) -> Iterator[Rung]:
    """Yield the rungs that are fast, or of the best kind that the machine can give."""
    pinned = [r.rung for r in sim.core.residents.values() if r.is_pinned and r.key != queue.key]
    model = queue.waiting[0].model
    best = _plan(sim, model, options, beside=pinned).chosen
    for rung in _plan(sim, model, options).ladder:
        is_best = best is not None and rung.placement.mode == best.placement.mode
        if rung.placement.mode in {"gpu", "experts-in-ram"} or is_best:
            yield rung


def _plan(
    sim: Simulation, model: Model, options: PlanOptions, beside: list[Rung] | None = None
) -> Plan:
    assert model.shape is not None
    rungs = beside or []
    room = taken(
        sim.hardware,
        vram=sim.others_vram + sum(map(vram_of, rungs)),
        ram=sim.others_ram + sum(rung.host.total_bytes for rung in rungs),
    )
    return sim.planner(model.shape, room, options)


def _fit(sim: Simulation, rungs: tuple[Rung, ...]) -> bool:
    margin = max(rung.host.margin_bytes for rung in rungs)
    room = taken(
        sim.hardware,
        vram=sim.others_vram + sum(map(vram_of, rungs)),
        ram=sim.others_ram + sum(rung.host.total_bytes for rung in rungs),
    )
    uses_gpu = any(vram_of(rung) for rung in rungs)
    return room.host.available_bytes >= margin and all(
        gpu.free_bytes >= margin * uses_gpu for gpu in room.gpus
    )
