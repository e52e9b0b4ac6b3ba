"""Schedulers over real processes of the fake engine, on a clock that the test moves."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from shimpy.config import Config
from shimpy.placement.hardware import Hardware
from shimpy.placement.placement import PlanOptions
from shimpy.protocol.messages import Delta, Submit
from shimpy.registry.model import Model
from shimpy.scheduler.lease import Lease
from shimpy.scheduler.policy import Planner
from shimpy.scheduler.scheduler import Scheduler
from shimpy.scheduler.worker import Deadlines
from tests.fake_engine import Script
from tests.scheduler.support import make_hardware, make_model, make_shape, plan

FAKE_ENGINE = (sys.executable, str(Path(__file__).parents[1] / "fake_engine.py"))
ANY = PlanOptions()
SUBMIT = Submit(request=0, prompt=[])


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

    def model(
        self, name: str, *, mib: int = 100, expert_mib: int = 0, kv_bytes: int = 0, **script: Any
    ) -> Model:
        path = self.folder / f"{name}.gguf"
        path.touch()
        Script(**script).save(path)
        shape = make_shape(dense_mib=mib, expert_mib=expert_mib, kv_bytes=kv_bytes)
        return make_model(name, shape, path=path)

    def gate(self, name: str) -> str:
        path = self.folder / name
        os.mkfifo(path)
        return str(path)

    def scheduler(
        self, *, deadlines: Deadlines | None = None, planner: Planner = plan, **settings: Any
    ) -> Scheduler:
        def probe() -> Hardware:
            return self.hardware

        deadlines = deadlines or Deadlines(load_s=20, shutdown_s=0.3, terminate_s=0.3, linger_s=0.5)
        return Scheduler(
            Config(**settings),
            probe,
            planner=planner,
            engine_argv=FAKE_ENGINE,
            clock=self.clock,
            deadlines=deadlines,
        )


async def open_gate(path: str) -> None:
    """Let the worker that waits at the gate pass; waits until one does."""
    await asyncio.to_thread(lambda: Path(path).open("w").close())


async def generate(lease: Lease) -> str:
    async with contextlib.aclosing(lease.generate(SUBMIT)) as events:
        return "".join([event.text async for event in events if isinstance(event, Delta)])


async def use(scheduler: Scheduler, model: Model, options: PlanOptions = ANY, **how: Any) -> str:
    async with scheduler.acquire(model, options, **how) as lease:
        return await generate(lease)


@contextlib.asynccontextmanager
async def held(scheduler: Scheduler, model: Model) -> AsyncIterator[asyncio.Event]:
    """Hold a lease in another task until the event is set."""
    release, has_it = asyncio.Event(), asyncio.Event()

    async def hold() -> None:
        async with scheduler.acquire(model, ANY):
            has_it.set()
            await release.wait()

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(hold())
        await has_it.wait()
        yield release
        release.set()


async def hear(path: str) -> None:
    """Wait until the worker has told something."""
    await asyncio.to_thread(Path(path).read_bytes)


async def wait_until(scheduler: Scheduler, condition: Callable[[], bool]) -> None:
    """Wait until a condition holds; looked at after each of the scheduler's events."""
    async with contextlib.aclosing(scheduler.events()) as events:
        following = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0)  # it listens now
        while not condition():
            await following
            following = asyncio.ensure_future(anext(events))
            await asyncio.sleep(0)
        following.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await following


async def wait_event(scheduler: Scheduler, kind: str, count: int = 1) -> None:
    """Wait until the scheduler has noted so many events of a kind."""
    await wait_until(scheduler, lambda: kinds(scheduler).count(kind) >= count)


def kinds(scheduler: Scheduler) -> list[str]:
    return [event.kind for event in scheduler.history()]


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
