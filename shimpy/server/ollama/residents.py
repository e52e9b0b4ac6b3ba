"""How /api/ps describes the loaded models: Ollama's fields, and where everything is."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec.structs import fields

from shimpy.placement.explain import figures_word
from shimpy.placement.placement import DeviceUse, HostUse, Rung
from shimpy.protocol.messages import BufferUse
from shimpy.scheduler.reports import HistoryEvent, ResidentInfo
from shimpy.scheduler.states import EventKind
from shimpy.server.ollama.listing import details
from shimpy.server.ollama.wire import FOREVER_S, format_local_time

# llama.cpp's name for host memory.
_HOST = "CPU"
# What took a model's memory or moved it, or kept it from being loaded.
_DEPARTURES: frozenset[EventKind] = frozenset(
    {"unload", "evict", "reload", "shrunk", "moved_up", "retry", "load_failed", "died", "refused"}
)
_N_RECENT = 16


def resident_entries(residents: Sequence[ResidentInfo]) -> list[dict[str, Any]]:
    """Return the loaded models as /api/ps lists them, the longest remaining first."""
    ordered = sorted(residents, key=lambda resident: -resident.expires_at_s)
    return [resident_entry(resident) for resident in ordered]


def recent_entries(history: Sequence[HistoryEvent]) -> list[HistoryEvent]:
    """Return the last unloads, evictions and failures with their reasons, the latest first."""
    left = [event for event in reversed(history) if event.kind in _DEPARTURES]
    return left[:_N_RECENT]


def resident_entry(resident: ResidentInfo) -> dict[str, Any]:
    """Return one loaded model; sizes are what it really took, or is predicted to while it loads."""
    model, ready = resident.model, resident.ready
    placement = resident.rung.placement
    name = str(model.name)
    size_vram = _vram_bytes(resident)
    return {
        "name": name,
        "model": name,
        "size": size_vram + _host_bytes(resident),
        "digest": model.digest,
        "details": details(model),
        "expires_at": format_local_time(min(resident.expires_at_s, time.time() + FOREVER_S)),
        "size_vram": size_vram,
        "context_length": placement.n_ctx if ready is None else ready.n_ctx,
        "state": resident.state,
        "load_fraction": resident.load_fraction,
        "pid": resident.pid,
        "pinned": resident.is_pinned,
        "n_leases": resident.n_leases,
        "n_waiting": resident.n_waiting,
        "n_threads": resident.n_threads,
        "n_kv_used": None if resident.stats is None else resident.stats.n_kv_used,
        "parked_bytes": None if resident.stats is None else resident.stats.parked_bytes,
        "loaded_at": None
        if resident.loaded_at_s is None
        else format_local_time(resident.loaded_at_s),
        "placement": placement_entry(resident.rung, None if ready is None else ready.memory)
        | {"n_tensors_overridden": 0 if ready is None else ready.n_overridden},
    }


def placement_entry(rung: Rung, real: Sequence[BufferUse] | None) -> dict[str, Any]:
    """Return a placement with the bytes it was predicted to take, and those it `real`ly took.

    `real` is null while the model loads.
    """
    entry: dict[str, Any] = msgspec.to_builtins(rung.placement)
    entry["figures"] = figures_word(rung)
    entry["devices"] = [
        _use_entry(use) | {"name": use.name, "real": _real_bytes(real, use.name)}
        for use in rung.devices
    ]
    entry["host"] = _use_entry(rung.host) | {
        "locked": rung.host.locked,
        "real": _real_bytes(real, _HOST),
    }
    return entry


def _use_entry(use: DeviceUse | HostUse) -> dict[str, Any]:
    """Return all sizes of a use, their sum included."""
    sizes = {f.name: getattr(use, f.name) for f in fields(use) if f.name.endswith("_bytes")}
    return sizes | {"total_bytes": use.total_bytes}


def _real_bytes(real: Sequence[BufferUse] | None, device: str) -> dict[str, int] | None:
    if real is None:
        return None
    mine = [use for use in real if use.device == device]
    return {
        "weights_bytes": sum(use.model_bytes for use in mine),
        "kv_bytes": sum(use.context_bytes for use in mine),
        "compute_bytes": sum(use.compute_bytes for use in mine),
        "total_bytes": sum(_total(use) for use in mine),
    }


def _vram_bytes(resident: ResidentInfo) -> int:
    if resident.ready is None:
        return sum(use.total_bytes for use in resident.rung.devices)
    return sum(_total(use) for use in resident.ready.memory if use.device != _HOST)


def _host_bytes(resident: ResidentInfo) -> int:
    if resident.ready is None:
        return resident.rung.host.total_bytes
    return sum(_total(use) for use in resident.ready.memory if use.device == _HOST)


def _total(use: BufferUse) -> int:
    return use.model_bytes + use.context_bytes + use.compute_bytes
