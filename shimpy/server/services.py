"""What the routes work with: made by `daemon`, handed to every handler through the app."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
from aiohttp import web

from shimpy.config import Config
from shimpy.registry.catalog import CatalogFile
from shimpy.registry.store import Store
from shimpy.scheduler.scheduler import Scheduler
from shimpy.server.cards import ModelCards
from shimpy.server.freshness import FreshRegistry
from shimpy.server.gate import Gate
from shimpy.server.guard import Guard
from shimpy.server.machine import Machine
from shimpy.server.metrics import Metrics
from shimpy.server.openai.responses.store import ResponseStore
from shimpy.server.pulls import Pulls
from shimpy.server.reload import Reloader


class Lifecycle(msgspec.Struct):
    """Which requests run, and whether the daemon is going down."""

    is_stopping: bool = False
    # Set when the daemon begins to stop: those that only wait for their client end then.
    stopping: asyncio.Event = msgspec.field(default_factory=asyncio.Event)
    # Requests that have come since the start.
    n_begun: int = 0
    _running: set[asyncio.Task[object]] = msgspec.field(default_factory=set)
    _idle: asyncio.Event = msgspec.field(default_factory=asyncio.Event)

    @property
    def n_running(self) -> int:
        """How many requests run."""
        return len(self._running)

    def begin_stop(self) -> None:
        """Take nothing new from now on."""
        self.is_stopping = True
        self.stopping.set()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the current task's request as running."""
        task = asyncio.current_task()
        assert task is not None, "requests run in tasks"
        self.n_begun += 1
        self._running.add(task)
        try:
            yield
        finally:
            self._running.discard(task)
            if not self._running:
                self._idle.set()

    async def wait_idle(self) -> None:
        """Wait until no request runs."""
        while self._running:
            self._idle.clear()
            await self._idle.wait()

    def cancel_running(self) -> int:
        """Cancel all running requests and return how many there were."""
        for task in self._running:
            task.cancel()
        return len(self._running)


class Services(msgspec.Struct, kw_only=True):
    """Everything that a handler may need; all of it belongs to the event loop's thread.

    A reload puts new frozen values (the config, the guard) in place of the old ones.
    """

    config: Config
    registry: FreshRegistry
    store: Store
    catalog: CatalogFile
    pulls: Pulls
    scheduler: Scheduler
    cards: ModelCards
    machine: Machine
    guard: Guard
    gate: Gate
    lifecycle: Lifecycle
    metrics: Metrics
    reloader: Reloader = msgspec.field(default_factory=Reloader)
    responses: ResponseStore = msgspec.field(default_factory=ResponseStore)


SERVICES = web.AppKey("services", Services)


def services_of(request: web.Request) -> Services:
    """Return the services of the app that a request came to."""
    return request.app[SERVICES]
