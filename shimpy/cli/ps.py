"""`shimpy ps`: the loaded models and where they are placed."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import click

from shimpy.cli.options import json_option


@click.command(name="ps")
@json_option
def command(*, as_json: bool) -> None:
    """Show the loaded models and where they are placed."""
    from shimpy.cli.output import print_json, print_table
    from shimpy.client import Client
    from shimpy.config import client_url

    with Client(client_url()) as client:
        residents = client.residents()
    if as_json:
        print_json(residents)
        return
    print_table(
        ("NAME", "STATE", "PLACEMENT", "VRAM", "RAM", "CONTEXT", "REQUESTS", "UNTIL"),
        [_row(resident) for resident in residents],
    )


def _row(resident: dict[str, Any]) -> tuple[str, ...]:
    from shimpy.units import format_bytes

    vram = resident["size_vram"]
    return (
        resident["name"],
        resident.get("state", "ready"),
        _placement(resident.get("placement")),
        format_bytes(vram) if vram else "-",
        format_bytes(resident["size"] - vram),
        str(resident["context_length"]),
        _requests(resident),
        _until(resident["expires_at"]),
    )


def _placement(placement: dict[str, Any] | None) -> str:
    if not placement:
        return "-"
    mode = placement["mode"]
    if mode == "experts-in-ram":
        return f"GPU, experts of {placement['moe_layers_in_ram']} layers in RAM"
    if mode == "partial-gpu":
        return f"{placement['n_gpu_layers']} of {placement['n_layers'] + 1} layers on GPU"
    return {"gpu": "GPU", "cpu": "CPU"}[mode]


def _requests(resident: dict[str, Any]) -> str:
    running, waiting = resident.get("n_leases", 0), resident.get("n_waiting", 0)
    return f"{running}, {waiting} waiting" if waiting else str(running)


def _until(expires_at: str) -> str:
    from shimpy.units import format_duration

    seconds = (datetime.fromisoformat(expires_at) - datetime.now(UTC)).total_seconds()
    # Ollama's clients know "forever" as a date centuries away.
    if seconds > 100 * 365 * 86400:
        return "forever"
    return f"in {format_duration(seconds)}" if seconds > 0 else "now"
