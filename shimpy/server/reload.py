"""A new config under a running daemon: what can be applied is, and no request notices.

What a setting governs from then on: the next request, load, scan or connection. What is bound
to something that is open for good (addresses, folders of the state) waits for a restart, and
the answer says so. A config that can't be read changes nothing.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from shimpy.config import Config
from shimpy.errors import UserError
from shimpy.logs import get_logger, set_level
from shimpy.placement.probe import probe_hardware
from shimpy.server.systemd import notify, notify_reloading
from shimpy.server.tls import load_certificate

if TYPE_CHECKING:
    from shimpy.server.services import Services

LIVE = frozenset(
    {
        "cpu_moe",
        "default_model",
        "drain_timeout",
        "hang_timeout",
        "keep_alive",
        "kv_type",
        "load_mode",
        "load_timeout",
        "log_level",
        "max_body",
        "max_queue",
        "model_dirs",
        "n_cpu_moe",
        "n_ctx",
        "n_slots",
        "n_threads",
        "origins",
        "parked_cache_size",
        "pinned",
        "prefix_cache_size",
        "replan_interval",
        "reserve_ram",
        "reserve_vram",
        "spare_worker",
        "tls_cert",
        "tls_key",
    }
)

_log = get_logger("server")


class Reloaded(msgspec.Struct, frozen=True, kw_only=True):
    """The settings that have changed: those that hold from now on, and those that don't yet."""

    applied: list[str]
    needs_restart: list[str]


class Reloader(msgspec.Struct, frozen=True, kw_only=True):
    """Reads the config again; `load` blocks, and is None where there is nothing to read."""

    load: Callable[[], Config] | None = None
    tls: ssl.SSLContext | None = None

    async def reload(self, services: Services) -> Reloaded:
        """Apply what has changed, and use renewed certificates.

        Raises:
            UserError: the new config or the certificate can't be used; nothing has changed.
        """
        if self.load is None:
            raise UserError("this daemon was started without a config that could be read again")
        notify_reloading()
        try:
            wanted = await asyncio.to_thread(self.load)
            changed = sorted(
                field.name
                for field in fields(Config)
                if getattr(wanted, field.name) != getattr(services.config, field.name)
            )
            applied = [name for name in changed if self._is_live(name)]
            values = {name: getattr(wanted, name) for name in applied}
            config = replace(services.config, **values)
            self._load_certificate(config)
        finally:
            notify("READY=1")
        await _apply(services, config)
        done = Reloaded(
            applied=applied, needs_restart=[name for name in changed if name not in applied]
        )
        _log.info("reloaded", applied=done.applied, needs_restart=done.needs_restart)
        return done

    def _is_live(self, name: str) -> bool:
        # A port that speaks HTTP does not begin to speak TLS.
        return name in LIVE and (self.tls is not None or not name.startswith("tls_"))

    def _load_certificate(self, config: Config) -> None:
        if self.tls is None:
            return
        if config.tls_cert is None or config.tls_key is None:
            raise UserError("tls_cert and tls_key can't be unset without a restart")
        load_certificate(self.tls, config.tls_cert, config.tls_key)


async def _apply(services: Services, config: Config) -> None:
    has_moved = config.model_dirs != services.config.model_dirs
    services.config = config
    set_level(config.log_level)
    services.guard = msgspec.structs.replace(services.guard, origins=config.origins)
    services.machine.use(
        partial(probe_hardware, reserve_vram=config.reserve_vram, reserve_ram=config.reserve_ram)
    )
    services.scheduler.reconfigure(config)
    if has_moved:
        await services.registry.use_folders(config.model_dirs)
