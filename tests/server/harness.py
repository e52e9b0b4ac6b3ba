"""An app on a free port, with the real scheduler and workers, and a machine that is made up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import msgspec
from aiohttp import web

from shimpy.config import Config
from shimpy.keys import KEYS_NAME, KeyFile
from shimpy.placement.hardware import Hardware, Host
from shimpy.registry.attempts import Retries
from shimpy.registry.catalog import CatalogFile
from shimpy.registry.own import StoreModels
from shimpy.registry.registry import Registry
from shimpy.registry.store import Store
from shimpy.scheduler.scheduler import ENGINE_ARGV
from shimpy.server.app import make_app
from shimpy.server.composition import composed
from shimpy.server.gate import Gate
from shimpy.server.guard import Guard
from shimpy.server.services import Services
from shimpy.units import GIB

MACHINE = Hardware(
    gpus=(),
    unusable=(),
    host=Host(total_bytes=16 * GIB, available_bytes=12 * GIB, lockable_bytes=None, n_cores=2),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """An app that answers at `url`."""

    url: str
    client: httpx.AsyncClient
    services: Services

    async def lines(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """POST and return all lines of the NDJSON answer."""
        response = await self.client.post(path, json=body)
        assert response.status_code == 200, response.text
        return [msgspec.json.decode(line) for line in response.text.splitlines()]

    async def unload_all(self) -> None:
        """Have no model loaded; the only one that is loaded answers who names none."""
        for model in (await self.client.get("/api/ps")).json()["models"]:
            response = await self.client.post(f"/api/models/{model['name']}/unload")
            assert response.status_code == 200, response.text


@asynccontextmanager
async def open_store(root: Path) -> AsyncIterator[Store]:
    """Own a store; its disk work is not the loop's."""
    with await asyncio.to_thread(Store, root) as store:
        yield store


@asynccontextmanager
async def running_app(
    folder: Path,
    state: Path,
    *,
    engine_argv: Sequence[str] = ENGINE_ARGV,
    **settings: Any,
) -> AsyncIterator[Running]:
    """Run an app over the models in a folder; `settings` are the config's."""
    config = Config(
        **{
            "n_threads": 1,
            "n_ctx": 2048,
            "n_slots": 8,
            "model_dirs": (folder,),
            "state_dir": state,
            "cache_dir": state / "cache",
            "data_dir": state,
        }
        | settings
    )
    catalog = CatalogFile(state / "registry.toml")
    async with (
        open_store(state / "store") as store,
        composed(
            config,
            store=store,
            catalog=catalog,
            registry=Registry(
                config.model_dirs,
                index_path=state / "index.sqlite",
                before=[StoreModels(store)],
                settings=store.settings,
                defaults=catalog.settings,
            ),
            probe=lambda: MACHINE,
            gate=Gate(keys=KeyFile(state / KEYS_NAME)),
            guard=Guard(host="127.0.0.1"),
            engine_argv=engine_argv,
            retries=Retries(most=3, first_pause_s=0.01),
        ) as services,
    ):
        runner = web.AppRunner(
            make_app(services), handler_cancellation=True, access_log=None, shutdown_timeout=1.0
        )
        await runner.setup()
        try:
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            host, port = runner.addresses[0][:2]
            url = f"http://{host}:{port}"
            async with httpx.AsyncClient(base_url=url, timeout=30, trust_env=False) as client:
                yield Running(url=url, client=client, services=services)
        finally:
            await services.pulls.close()
            await runner.cleanup()
            await services.scheduler.drain(0.0)
