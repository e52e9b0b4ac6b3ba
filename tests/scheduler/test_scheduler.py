"""The scheduler's shell with real processes of tests/fake_engine.py."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from shimpy.config import Config
from shimpy.errors import (
    CapacityError,
    ContextExceededError,
    DoesNotFitError,
    HeldBackError,
    LoadError,
    QueueFullError,
    WorkerDiedError,
)
from shimpy.placement.hardware import Hardware
from shimpy.placement.placement import PlanOptions
from shimpy.protocol.messages import Delta, Done, Prefilled, Submit
from shimpy.registry.model import Model
from shimpy.scheduler.lease import Lease
from shimpy.scheduler.scheduler import Scheduler
from shimpy.scheduler.worker import Deadlines
from tests.fake_engine import Script
from tests.scheduler.support import make_hardware, make_model, make_shape, plan

FAKE_ENGINE = (sys.executable, str(Path(__file__).parents[1] / "fake_engine.py"))
ANY = PlanOptions()


class FakeClock:
    """Time that moves when the test says so."""

    def __init__(self) -> None:
        self.time_s = 1000.0
        self._calls: list[FakeHandle] = []

    def now(self) -> float:
        return self.time_s

    def call_at(self, when_s: float, callback: Callable[[], None]) -> FakeHandle:
        handle = FakeHandle(when_s, callback)
        self._calls.append(handle)
        return handle

    def advance(self, seconds: float) -> None:
        self.time_s += seconds
        due = [call for call in self._calls if call.when_s <= self.time_s]
        self._calls = [call for call in self._calls if call.when_s > self.time_s]
        for call in due:
            if not call.is_cancelled:
                call.callback()


class FakeHandle:
    def __init__(self, when_s: float, callback: Callable[[], None]) -> None:
        self.when_s = when_s
        self.callback = callback
        self.is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True


class Workshop:
    """Makes models with scripts, gates, and schedulers over the fake engine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clock = FakeClock()
        self.hardware = make_hardware()

    def model(self, name: str, *, mib: int = 100, kv_bytes: int = 0, **script: Any) -> Model:
        path = self.folder / f"{name}.gguf"
        path.touch()
        Script(**script).save(path)
        return make_model(name, make_shape(dense_mib=mib, kv_bytes=kv_bytes), path=path)

    def gate(self, name: str) -> str:
        path = self.folder / name
        os.mkfifo(path)
        return str(path)

    def scheduler(self, **settings: Any) -> Scheduler:
        def probe() -> Hardware:
            return self.hardware

        deadlines = Deadlines(load_s=20, shutdown_s=0.5, terminate_s=0.5, linger_s=1)
        return Scheduler(
            Config(**settings),
            probe,
            planner=plan,
            engine_argv=FAKE_ENGINE,
            clock=self.clock,
            deadlines=deadlines,
        )


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path)


async def open_gate(path: str) -> None:
    """Let the worker that waits at the gate pass; waits until one does."""
    await asyncio.to_thread(lambda: Path(path).open("w").close())


async def generate(lease: Lease) -> str:
    async with contextlib.aclosing(lease.generate(Submit(request=0, prompt=[]))) as events:
        return "".join([event.text async for event in events if isinstance(event, Delta)])


async def use(scheduler: Scheduler, model: Model, options: PlanOptions = ANY, **how: Any) -> str:
    async with scheduler.acquire(model, options, **how) as lease:
        return await generate(lease)


async def wait_event(scheduler: Scheduler, kind: str) -> None:
    """Wait until the scheduler has noted an event of a kind, now or before."""
    async with contextlib.aclosing(scheduler.events()) as events:
        pending = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0)
        while not any(event.kind == kind for event in scheduler.history()):
            await pending
            pending = asyncio.ensure_future(anext(events))
            await asyncio.sleep(0)
        pending.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await pending


async def test_loads_on_demand_and_streams(workshop: Workshop) -> None:
    model = workshop.model("a")
    async with workshop.scheduler() as scheduler:
        async with scheduler.acquire(model, ANY) as lease:
            events = [event async for event in lease.generate(Submit(request=0, prompt=[]))]
            assert scheduler.residents()[0].n_leases == 1
        assert [type(event) for event in events][0] is Prefilled
        assert isinstance(events[-1], Done)
        (resident,) = scheduler.residents()
        assert (resident.state, resident.n_leases, resident.n_waiting) == ("ready", 0, 0)
    assert [event.kind for event in scheduler.history()] == ["load", "ready", "unload"]
