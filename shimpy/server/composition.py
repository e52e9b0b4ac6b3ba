"""What the routes work with, composed: for the daemon, and for tests over a made-up machine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial

from shimpy.config import Config
from shimpy.placement.hardware import Hardware
from shimpy.placement.speeds import FOLDER as SPEEDS_NAME
from shimpy.placement.speeds import Speeds
from shimpy.registry.attempts import Retries
from shimpy.registry.catalog import CatalogFile
from shimpy.registry.registry import Registry
from shimpy.registry.store import Store
from shimpy.scheduler.overheads import FILE_NAME as OVERHEADS_NAME
from shimpy.scheduler.overheads import Overheads
from shimpy.scheduler.scheduler import Scheduler
from shimpy.scheduler.simulations import FILE_NAME as SIMULATIONS_NAME
from shimpy.scheduler.simulations import Simulations
from shimpy.scheduler.worker import ENGINE_ARGV
from shimpy.server.cards import ModelCards
from shimpy.server.freshness import FreshRegistry
from shimpy.server.gate import Gate
from shimpy.server.guard import Guard
from shimpy.server.machine import Machine
from shimpy.server.metrics import Metrics
from shimpy.server.pulling import make_pulls
from shimpy.server.reload import Reloader
from shimpy.server.services import Lifecycle, Services


@asynccontextmanager
async def composed(
    config: Config,
    *,
    store: Store,
    catalog: CatalogFile,
    registry: Registry,
    probe: Callable[[], Hardware],
    gate: Gate,
    guard: Guard,
    reloader: Reloader | None = None,
    engine_argv: Sequence[str] = ENGINE_ARGV,
    retries: Retries | None = None,
) -> AsyncIterator[Services]:
    """Make the services; leaving the block ends their workers and tasks.

    Args:
        config: the settings to begin with.
        store: it is its caller's to close.
        catalog: models by short names.
        registry: over all sources of models.
        probe: takes a snapshot of the machine; blocking.
        gate: who may come in.
        guard: which pages and hosts may.
        reloader: reads the settings again.
        engine_argv: starts a worker.
        retries: of downloads that fail in passing.
    """
    fresh = FreshRegistry(registry)
    overheads = Overheads(config.state_dir / OVERHEADS_NAME)
    machine = Machine(probe, overheads)
    speeds = Speeds(config.state_dir / SPEEDS_NAME)
    async with (
        Scheduler(
            config,
            partial(_probe, machine, speeds),
            engine_argv=engine_argv,
            simulations=Simulations(config.state_dir / SIMULATIONS_NAME, speeds=speeds),
            overheads=overheads,
        ) as scheduler,
        asyncio.TaskGroup() as tasks,
    ):
        yield Services(
            config=config,
            registry=fresh,
            store=store,
            catalog=catalog,
            pulls=make_pulls(
                config,
                tasks=tasks,
                store=store,
                catalog=catalog,
                registry=fresh,
                machine=machine,
                scheduler=scheduler,
                retries=retries,
            ),
            scheduler=scheduler,
            cards=ModelCards(),
            machine=machine,
            guard=guard,
            gate=gate,
            lifecycle=Lifecycle(),
            metrics=Metrics(scheduler),
            reloader=reloader or Reloader(),
        )


def _probe(machine: Machine, speeds: Speeds) -> Hardware:
    """Return what a load has before it: this machine now, and what was measured until now."""
    speeds.refresh()
    return machine.probe()
