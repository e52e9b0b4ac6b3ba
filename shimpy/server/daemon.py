"""The daemon: everything composed, run until a signal, and taken down in order.

Going down: no new connections; running requests get `drain_timeout`; what still runs then is
cancelled, and its client told; the workers are stopped; the process ends. A second signal
skips the waiting.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import math
import signal
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path

from aiohttp import web

from shimpy.config import Config, config_folder, tool_folders
from shimpy.errors import DiskFullError, RegistryError, ShimpyError, UserError
from shimpy.keys import KEYS_NAME, KeyFile
from shimpy.logs import get_logger
from shimpy.placement.hardware import Hardware
from shimpy.placement.probe import probe_hardware
from shimpy.registry import disk
from shimpy.registry.catalog import FILE_NAME as CATALOG_NAME
from shimpy.registry.catalog import CatalogFile
from shimpy.registry.own import BuiltIn, StoreModels
from shimpy.registry.registry import Registry
from shimpy.registry.store import LEFTOVER_S, Store
from shimpy.registry.tools import tool_sources
from shimpy.scheduler.scheduler import Scheduler
from shimpy.server.app import make_app
from shimpy.server.composition import composed
from shimpy.server.connections import IDLE_TIMEOUT_S, Connections, allow_files, http_logger
from shimpy.server.gate import Gate
from shimpy.server.guard import Guard
from shimpy.server.idling import wait_unneeded
from shimpy.server.listening import exposed_host, open_bind, unix_paths, urls_of
from shimpy.server.machine import Machine, report_hardware
from shimpy.server.prefixes import watch_gone
from shimpy.server.reload import Reloader
from shimpy.server.services import Services
from shimpy.server.systemd import (
    feed_watchdog,
    inherited_sockets,
    notify,
    watchdog_period_s,
)
from shimpy.server.tls import make_tls
from shimpy.units import format_duration
from shimpy.values import Tool

# How long cancelled requests get to tell their clients.
_FAREWELL_S = 2.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT)

_log = get_logger("server")


async def serve(
    config: Config,
    *,
    announce: Callable[[str], None] | None = None,
    load: Callable[[], Config] | None = None,
) -> None:
    """Run the daemon until SIGTERM or SIGINT; SIGHUP reloads its config.

    Args:
        config: the settings to begin with.
        announce: called with the URL once the daemon listens.
        load: reads the settings again.

    Raises:
        UserError: the address can't be listened on, or not without a key; says why.
        StoreLockedError: another daemon owns the store.
        RegistryError: a folder of the daemon's own can't be made or written.
    """
    await asyncio.to_thread(_make_folder, config.state_dir)
    with await asyncio.to_thread(Store, config.data_dir / "store") as store:
        await asyncio.to_thread(_tidy, store)
        await _serve(config, store, announce, load)
    _log.info("stopped")


def _make_folder(folder: Path) -> None:
    with disk.explained(folder):
        disk.make_folder(folder)


def _tidy(store: Store) -> None:
    """Remove what was left unfinished long ago; say what of the store can't be read."""
    try:
        collected = store.gc(min_age_s=LEFTOVER_S)
    except (RegistryError, DiskFullError) as error:
        _log.warning("not_collected", reason=error.message)
    else:
        if collected.n_files:
            n_files, freed_bytes = collected.n_files, collected.freed_bytes
            _log.info("collected", n_files=n_files, freed_bytes=freed_bytes)
    for path, problem in store.damaged.items():
        _log.warning("damaged", path=str(path), reason=problem)


async def _serve(
    config: Config,
    store: Store,
    announce: Callable[[str], None] | None,
    load: Callable[[], Config] | None,
) -> None:
    catalog = await asyncio.to_thread(CatalogFile, config_folder() / CATALOG_NAME)
    tls = await asyncio.to_thread(make_tls, config.tls_cert, config.tls_key)
    inherited = inherited_sockets()
    sockets = inherited or await open_bind(config.bind)
    # Those of a socket unit stay: systemd listens on them while there is no daemon.
    leftovers = [] if inherited else unix_paths(sockets)
    try:
        exposed = exposed_host(sockets)
        gate = Gate(
            keys=KeyFile(config.state_dir / KEYS_NAME),
            is_exposed=exposed is not None and not config.insecure,
        )
        _check_exposure(gate, exposed, has_tls=tls is not None)
        async with (
            composed(
                config,
                store=store,
                catalog=catalog,
                registry=make_registry(config, store, catalog, tool_folders()),
                probe=make_probe(config),
                gate=gate,
                guard=Guard(host=exposed or "localhost", origins=config.origins),
                reloader=Reloader(load=load, tls=tls),
            ) as services,
            asyncio.TaskGroup() as tasks,
        ):
            background = [
                tasks.create_task(services.registry.watch()),
                tasks.create_task(services.metrics.follow(services.scheduler)),
                tasks.create_task(watch_gone(config.prefix_dir, services.registry)),
                tasks.create_task(_look_around(services.machine, services.scheduler)),
            ]
            await _run(services, sockets, tls, announce)
            for task in background:
                task.cancel()
    finally:
        for sock in sockets:
            sock.close()
        for path in leftovers:
            path.unlink(missing_ok=True)


def _check_exposure(gate: Gate, exposed: str | None, *, has_tls: bool) -> None:
    """Refuse to let other machines in when there is no key that they could have.

    Raises:
        UserError: says what to do.
    """
    if exposed is None:
        return
    if gate.is_exposed and not gate.keys.all():
        raise UserError(
            f"other machines reach {exposed}, and there is no API key: make one with `shimpy keys "
            "create`, listen on 127.0.0.1, or let everybody in with --insecure"
        )
    if not gate.is_exposed:
        _log.warning("open_to_everybody", host=exposed)
    elif not has_tls:
        _log.warning("keys_in_clear", host=exposed, remedy="tls_cert and tls_key, or a proxy")


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


async def _look_around(machine: Machine, scheduler: Scheduler) -> None:
    """Probe once, so that the first request finds caches warm and the log names idle cards."""
    try:
        hardware = await asyncio.to_thread(machine.probe)
        report_hardware(hardware)
        scheduler.prepare(hardware)
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

    def ask(self, reason: str) -> None:
        """Ask from within."""
        _log.info("stop_asked", reason=reason)
        self._asked.set()

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
    services: Services,
    sockets: Sequence[socket.socket],
    tls: ssl.SSLContext | None,
    announce: Callable[[str], None] | None,
) -> None:
    """Answer requests until a signal, then drain."""
    runner = web.AppRunner(
        make_app(services),
        handler_cancellation=True,
        access_log=None,
        logger=http_logger(),
        shutdown_timeout=_FAREWELL_S,
        keepalive_timeout=IDLE_TIMEOUT_S,
    )
    limit = allow_files(services.config.max_connections)
    with _signals() as stop, _hangups() as hangup:
        await runner.setup()
        try:
            connections = Connections(runner, limit=limit, tls=tls)
            await connections.listen(sockets)
            _announce(urls_of(sockets, scheme="https" if tls else "http"), announce)
            # What is here now stays: a full collection would look at all of it, for 15 ms.
            gc.freeze()
            async with _meanwhile(services, hangup, stop):
                await stop.wait_asked()
                await _drain(services, connections, stop)
        finally:
            await runner.cleanup()
            await services.scheduler.drain(0.0)


def _announce(urls: Sequence[str], announce: Callable[[str], None] | None) -> None:
    _log.info("listening", urls=urls)
    if announce is not None:
        announce(urls[0])
    notify(f"READY=1\nSTATUS=listening on {urls[0]}")


@contextmanager
def _hangups() -> Iterator[asyncio.Event]:
    """Set the event at each SIGHUP."""
    loop = asyncio.get_running_loop()
    hangup = asyncio.Event()
    loop.add_signal_handler(signal.SIGHUP, hangup.set)
    try:
        yield hangup
    finally:
        loop.remove_signal_handler(signal.SIGHUP)


@asynccontextmanager
async def _meanwhile(
    services: Services, hangup: asyncio.Event, stop: StopSignals
) -> AsyncIterator[None]:
    """Feed systemd's watchdog, where there is one, and reload at SIGHUP as the block runs."""
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(_reload_at(services, hangup))]
        if not math.isinf(services.config.idle_exit):
            running.append(tasks.create_task(_stop_when_unneeded(services, stop)))
        period_s = watchdog_period_s()
        if period_s is not None:
            running.append(tasks.create_task(feed_watchdog(period_s)))
        yield
        for task in running:
            task.cancel()


async def _stop_when_unneeded(services: Services, stop: StopSignals) -> None:
    idle_s = services.config.idle_exit
    await wait_unneeded(services, idle_s)
    stop.ask(f"nothing to do for {format_duration(idle_s)} (idle_exit)")


async def _reload_at(services: Services, hangup: asyncio.Event) -> None:
    while True:
        await hangup.wait()
        hangup.clear()
        try:
            await services.reloader.reload(services)
        except ShimpyError as error:
            _log.error("not_reloaded", reason=error.message)
        except Exception as error:  # noqa: BLE001 - the daemon goes on as it was
            _log.error("not_reloaded", exc_info=error)


async def _drain(services: Services, connections: Connections, stop: StopSignals) -> None:
    """Take nothing new, let running requests end, then cancel what is left of them."""
    lifecycle, timeout_s = services.lifecycle, services.config.drain_timeout
    notify("STOPPING=1")
    _log.info("draining", n_running=lifecycle.n_running, timeout_s=timeout_s)
    lifecycle.begin_stop()
    connections.stop_listening()
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
