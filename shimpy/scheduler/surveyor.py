"""Looks at the hardware for the core, and learns what models really take. In threads."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from shimpy.placement.hardware import Hardware
from shimpy.protocol.messages import Ready
from shimpy.scheduler.core import SchedulerCore
from shimpy.scheduler.effects import StartWorker
from shimpy.scheduler.lease import Lease
from shimpy.scheduler.lingering import Lingering
from shimpy.scheduler.overheads import Overheads
from shimpy.scheduler.simulations import ROUNDS, Simulations, needs_check


class Surveyor:
    """Knows the hardware as it was probed last, and keeps what was learnt of models on it."""

    def __init__(
        self,
        probe: Callable[[], Hardware],
        simulations: Simulations,
        overheads: Overheads,
        lingering: Lingering | None = None,
    ) -> None:
        """`probe` may block."""
        self._probe = probe
        self._lingering = lingering or Lingering()
        self._simulations = simulations
        self._overheads = overheads
        self._hardware: Hardware | None = None

    async def survey(self, core: SchedulerCore) -> Hardware:
        """Return a fresh snapshot, on which the figures that the core will go by are exact."""
        if self._lingering.is_expected:
            await asyncio.to_thread(self._lingering.wait)
        if not any(resident.rung.devices for resident in core.residents.values()):
            await asyncio.to_thread(self._overheads.look)
        hardware = await self._check_figures(core, await asyncio.to_thread(self._probe))
        self._hardware = hardware
        return hardware

    async def _check_figures(self, core: SchedulerCore, hardware: Hardware) -> Hardware:
        """Have llama.cpp simulate what is about to be loaded; return a snapshot that is as fresh.

        Bounded in time; what is known, or needs no simulation, costs none.
        """
        if not hardware.library:
            return hardware
        until_s = self._simulations.deadline()
        for _ in range(ROUNDS):
            doubtful = [(m, plan) for m, plan in core.preview(hardware) if needs_check(plan)]
            present = core.present(hardware)
            learnt = [
                await asyncio.to_thread(
                    self._simulations.learn, model, plan.doubts, present, until_s=until_s
                )
                for model, plan in doubtful
            ]
            if not any(learnt):
                break
            hardware = await asyncio.to_thread(self._probe)
        return hardware

    async def on_stop(self, pid: int) -> None:
        """Have the next snapshot wait until the cards are free of a worker that is stopped."""
        await asyncio.to_thread(self._lingering.on_stop, pid)

    def on_exit(self, pid: int) -> None:
        """Note that a worker has gone."""
        self._lingering.on_exit(pid)

    async def observe_load(self, start: StartWorker, ready: Ready) -> None:
        """Have the next plans know what a load really took."""
        if self._hardware is None:
            return
        placement, hardware = start.rung.placement, self._hardware
        await asyncio.to_thread(
            self._simulations.observe, start.model, placement, ready.memory, hardware
        )

    def is_due(self, lease: Lease) -> bool:
        """Whether it is time to `observe_use` of a lease's worker."""
        # Of several devices the driver tells the sum for the process, or less.
        is_on_one = len(lease.rung.placement.devices) == 1
        pid = lease.pid
        return is_on_one and pid is not None and self._overheads.is_due(pid)

    async def observe_use(self, lease: Lease) -> None:
        """Learn what a worker that has answered takes on its card besides its buffers."""
        pid, hardware = lease.pid, self._hardware
        if pid is None or hardware is None:
            return
        (device,) = lease.rung.placement.devices
        await asyncio.to_thread(self._overheads.read, pid, device, lease.ready.memory, hardware)
