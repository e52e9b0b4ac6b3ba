"""The daemon: everything composed, run until a signal, and taken down in order.

Going down: no new connections; running requests get `drain_timeout`; what still runs then is
cancelled, and its client told; the workers are stopped; the process ends. A second signal
skips the waiting.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from aiohttp import web

from shimpy.config import Config, Tool, config_folder, tool_folders
from shimpy.errors import RegistryError
from shimpy.logs import get_logger
from shimpy.placement.hardware import Hardware
from shimpy.placement.probe import probe_hardware
from shimpy.registry.catalog import FILE_NAME as CATALOG_NAME
from shimpy.registry.catalog import CatalogFile
from shimpy.registry.own import BuiltIn, StoreModels
from shimpy.registry.registry import Registry
from shimpy.registry.store import LEFTOVER_S, Store
from shimpy.registry.tools import tool_sources
from shimpy.scheduler.scheduler import Scheduler
from shimpy.server.app import make_app
from shimpy.server.cards import ModelCards
from shimpy.server.freshness import FreshRegistry
from shimpy.server.guard import Guard
from shimpy.server.listening import open_sockets, split_bind, urls_of
from shimpy.server.machine import Machine, report_hardware
from shimpy.server.metrics import Metrics
from shimpy.server.pulling import make_pulls
from shimpy.server.services import Lifecycle, Services
from shimpy.server.systemd import notify

# How long cancelled requests get to tell their clients.
_FAREWELL_S = 2.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT)

_log = get_logger("server")


async def serve(config: Config, *, announce: Callable[[str], None] | None = None) -> None:
    """Run the daemon until SIGTERM or SIGINT; `announce` is called with its URL once it listens.

    Raises:
        UserError: the address can't be listened on; says why.
        StoreLockedError: another daemon owns the store.
    """
    await asyncio.to_thread(config.state_dir.mkdir, parents=True, exist_ok=True)
    with await asyncio.to_thread(Store, config.data_dir / "store") as store:
        await asyncio.to_thread(_tidy, store)
        await _serve(config, store, announce)
    _log.info("stopped")


def _tidy(store: Store) -> None:
    """Remove what was left unfinished long ago; say what of the store can't be read."""
    try:
        collected = store.gc(min_age_s=LEFTOVER_S)
    except RegistryError as error:
        _log.warning("not_collected", reason=error.message)
    else:
        _log.info("collected", n_files=collected.n_files, freed_bytes=collected.freed_bytes)
    for path, problem in store.damaged.items():
        _log.warning("damaged", path=str(path), reason=problem)


async def _serve(config: Config, store: Store, announce: Callable[[str], None] | None) -> None:
    catalog = await asyncio.to_thread(CatalogFile, config_folder() / CATALOG_NAME)
    fresh = FreshRegistry(make_registry(config, store, catalog, tool_folders()))
    machine = Machine(make_probe(config))
    host, port = split_bind(config.bind)
    sockets = await open_sockets(host, port)
    try:
        async with Scheduler(config, machine.probe) as scheduler, asyncio.TaskGroup() as tasks:
            services = Services(
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
                ),
                scheduler=scheduler,
                cards=ModelCards(),
                machine=machine,
                guard=Guard(host=host),
                lifecycle=Lifecycle(),
                metrics=Metrics(scheduler),
            )
            background = [
                tasks.create_task(fresh.watch()),
                tasks.create_task(services.metrics.follow(scheduler)),
                tasks.create_task(_look_around(machine)),
            ]
            await _run(services, sockets, announce)
            for task in background:
                task.cancel()
    finally:
        for sock in sockets:
            sock.close()


def make_registry(
    config: Config, store: Store, catalog: CatalogFile, folders: Mapping[Tool, Sequence[Path]]
) -> Registry:
    """Return the registry over all sources of models; `folders` are other tools'."""
    return Registry(
        config.model_dirs,
        index_path=config.state_dir / "index.sqlite",
        before=[BuiltIn(), StoreModels(store)],
        after=tool_sources({tool: folders[tool] for tool in config.stores}),
        settings=store.settings,
        defaults=catalog.settings,
    )


def make_probe(config: Config) -> Callable[[], Hardware]:
    """Return what takes a snapshot of this machine, less what the config leaves to others."""
    return partial(probe_hardware, reserve_vram=config.reserve_vram, reserve_ram=config.reserve_ram)


async def _look_around(machine: Machine) -> None:
    """Probe once, so that the first request finds caches warm and the log names idle cards."""
    try:
        report_hardware(await asyncio.to_thread(machine.probe))
    except Exception as error:  # noqa: BLE001 - requests probe again, and tell their clients
        _log.error("probe_failed", exc_info=error)


class StopSignals:
    """Counts the signals that ask the daemon to end: one asks, a second insists."""

    def __init__(self) -> None:
        self._asked = asyncio.Event()
        self._insisted = asyncio.Event()

    def on_signal(self, number: signal.Signals) -> None:
        """Take a signal."""
        _log.info("signal", signal=number.name)
        (self._insisted if self._asked.is_set() else self._asked).set()

    async def wait_asked(self) -> None:
        """Wait for the first signal."""
        await self._asked.wait()

    async def wait_insisted(self) -> None:
        """Wait for the second signal."""
        await self._insisted.wait()


@contextmanager
def _signals() -> Iterator[StopSignals]:
    loop = asyncio.get_running_loop()
    stop = StopSignals()
    for number in _SIGNALS:
        loop.add_signal_handler(number, stop.on_signal, number)
    try:
        yield stop
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)


async def _run(
    services: Services, sockets: Sequence[socket.socket], announce: Callable[[str], None] | None
) -> None:
    """Answer requests until a signal, then drain."""
    runner = web.AppRunner(
        make_app(services),
        handler_cancellation=True,
        access_log=None,
        shutdown_timeout=_FAREWELL_S,
    )
    with _signals() as stop:
        await runner.setup()
        try:
            for sock in sockets:
                await web.SockSite(runner, sock).start()
            _announce(urls_of(sockets), announce)
            await stop.wait_asked()
            await _drain(services, runner, stop)
        finally:
            await runner.cleanup()
            await services.scheduler.drain(0.0)


def _announce(urls: Sequence[str], announce: Callable[[str], None] | None) -> None:
    _log.info("listening", urls=urls)
    if announce is not None:
        announce(urls[0])
    notify(f"READY=1\nSTATUS=listening on {urls[0]}")


async def _drain(services: Services, runner: web.AppRunner, stop: StopSignals) -> None:
    """Take nothing new, let running requests end, then cancel what is left of them."""
    lifecycle, timeout_s = services.lifecycle, services.config.drain_timeout
    notify("STOPPING=1")
    _log.info("draining", n_running=lifecycle.n_running, timeout_s=timeout_s)
    lifecycle.is_stopping = True
    for site in runner.sites:
        await site.stop()
    # They are kept as far as they are; waiting for gigabytes to come is no use.
    await services.pulls.close()
    async with asyncio.TaskGroup() as tasks:
        waits = [
            tasks.create_task(lifecycle.wait_idle()),
            tasks.create_task(stop.wait_insisted()),
        ]
        await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
    n_cancelled = lifecycle.cancel_running()
    if n_cancelled:
        _log.warning("requests_cancelled", n_requests=n_cancelled)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FAREWELL_S):
                await lifecycle.wait_idle()
