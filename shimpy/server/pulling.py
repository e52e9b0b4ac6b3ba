"""Pulling, composed: the daemon's store, catalog, machine and scheduler behind `Pulls`."""

from __future__ import annotations

import asyncio

from shimpy.config import Config
from shimpy.registry.attempts import Retries
from shimpy.registry.catalog import CatalogFile
from shimpy.registry.manifest import Manifest
from shimpy.registry.pull import Judge, Puller
from shimpy.registry.sources import Sources
from shimpy.registry.store import Store
from shimpy.scheduler.scheduler import Scheduler
from shimpy.server.freshness import FreshRegistry
from shimpy.server.judging import PlanJudge
from shimpy.server.machine import Machine
from shimpy.server.pulls import Pulls

_OFFLINE = "the setting `offline` is on"


def make_pulls(
    config: Config,
    *,
    tasks: asyncio.TaskGroup,
    store: Store,
    catalog: CatalogFile,
    registry: FreshRegistry,
    machine: Machine,
    scheduler: Scheduler,
    retries: Retries | None = None,
) -> Pulls:
    """Return the daemon's pulls, run as tasks of `tasks`."""

    async def make_judge() -> Judge:
        hardware = await asyncio.to_thread(machine.probe)
        # A loaded model leaves for the pulled one; it does not make it too large.
        return PlanJudge(hardware=scheduler.emptied(hardware), config=config)

    async def on_installed(manifest: Manifest) -> None:
        # What is loaded under its name may be an older one.
        scheduler.unload(str(manifest.model_name))
        await registry.scan()

    puller = Puller(
        store,
        Sources(catalog=catalog.current),
        offline=_OFFLINE if config.offline else None,
        retries=retries,
    )
    return Pulls(puller, tasks=tasks, make_judge=make_judge, on_installed=on_installed)
