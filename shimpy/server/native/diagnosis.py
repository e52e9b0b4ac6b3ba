"""Is it alive, and what does it stand on: for people who look for what is wrong.

Nothing here is secret: settings are shown by a list of those that are harmless.
"""

from __future__ import annotations

import asyncio
import math
import os
import platform
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import msgspec
from aiohttp import web

import shimpy
from shimpy.config import Config
from shimpy.placement.hardware import Hardware
from shimpy.registry.model import Model
from shimpy.server.ollama.residents import resident_entries
from shimpy.server.services import services_of
from shimpy.server.streaming import json_response
from shimpy.units import MIB

_SHOWN_SETTINGS = (
    "bind",
    "model_dirs",
    "stores",
    "default_model",
    "cpu_moe",
    "n_cpu_moe",
    "keep_alive",
    "n_ctx",
    "n_slots",
    "kv_type",
    "load_mode",
    "n_threads",
    "max_queue",
    "max_body",
    "reserve_vram",
    "reserve_ram",
    "log_file",
    "state_dir",
    "data_dir",
)
_PACKAGES = ("llama-cpp-python", "aiohttp", "huggingface_hub")
_N_EVENTS = 20


async def health(_: web.Request) -> web.Response:
    """GET /health: the daemon answers; while it stops, that is a 503."""
    answer = {"status": "ok", "service": "shimpy", "version": shimpy.__version__}
    return json_response(answer)


async def diagnosis(request: web.Request) -> web.Response:
    """GET /diag: versions, devices, settings, problems of the folders, and what is loaded."""
    services = services_of(request)
    hardware = await asyncio.to_thread(services.machine.probe)
    models = await services.registry.models()
    scheduler = services.scheduler
    return json_response(
        {
            "service": "shimpy",
            "versions": await asyncio.to_thread(_versions),
            "os": platform.system().lower(),
            "platform": platform.platform(),
            "cores": os.cpu_count() or 1,
            "mem_total_mb": hardware.host.total_bytes // MIB,
            "hardware": _hardware_entry(hardware),
            "config": _config_entry(services.config),
            "models": _models_entry(models),
            "problems": list(services.registry.problems),
            "residents": resident_entries(scheduler.residents()),
            "waiting": scheduler.waiting(),
            "events": scheduler.history()[-_N_EVENTS:],
        }
    )


ROUTES = [
    web.get("/health", health),
    web.get("/v1/health", health),
    web.get("/diag", diagnosis),
]


def _versions() -> dict[str, str]:
    versions = {"shimpy": shimpy.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _hardware_entry(hardware: Hardware) -> dict[str, Any]:
    entry: dict[str, Any] = msgspec.to_builtins(hardware)
    return entry


def _config_entry(config: Config) -> dict[str, Any]:
    return {name: _shown(getattr(config, name)) for name in _SHOWN_SETTINGS}


def _shown(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_shown(item) for item in value]
    if isinstance(value, float) and math.isinf(value):
        return "forever"
    return value if value is None or isinstance(value, int | float) else str(value)


def _models_entry(models: Sequence[Model]) -> dict[str, Any]:
    broken = [model for model in models if model.error is not None]
    return {
        "total": len(models),
        "usable": len(models) - len(broken),
        "broken": [{"name": str(model.name), "error": model.error} for model in broken],
    }
