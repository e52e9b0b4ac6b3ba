"""`shimpy ps`: the loaded models, where they are placed, and why others are not loaded."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import click

from shimpy.cli.options import json_option

# Of what has happened; `shimpy events` has the rest.
_N_RECENT = 5
_GAP = 2


@click.command(name="ps")
@json_option
def command(*, as_json: bool) -> None:
    """Show the loaded models, where they are placed, and why others are not loaded."""
    from shimpy.cli.output import print_json
    from shimpy.client import Client
    from shimpy.config import client_url

    with Client(client_url()) as client:
        state = client.ps()
    if as_json:
        print_json(state)
        return
    print_state(state)


def print_state(state: dict[str, Any]) -> None:
    """Print what /api/ps answers."""
    from shimpy.cli.events import format_event
    from shimpy.cli.output import print_table, wrapped

    residents = state["models"]
    print_table(
        ("NAME", "STATE", "PLACEMENT", "CONTEXT", "SLOTS", "THREADS", "REQUESTS", "UNTIL"),
        [_row(resident) for resident in residents],
        gap=_GAP,
    )
    if residents:
        click.echo()
        print_table(
            ("MEMORY OF", "DEVICE", "WEIGHTS", "KV", "COMPUTE", "ALL", "PREDICTED", "PROCESS"),
            [row for resident in residents for row in _memory(resident)],
            gap=_GAP,
        )
    for title, lines in (
        ("NOT LOADED", [_waiting(model) for model in state["waiting"]]),
        ("RECENTLY", [format_event(event) for event in state["recent"][:_N_RECENT]]),
    ):
        if lines:
            click.echo("\n" + click.style(title, bold=True))
        for line in lines:
            click.echo(wrapped(line))


def _row(resident: dict[str, Any]) -> tuple[str, ...]:
    placement = resident["placement"]
    return (
        resident["name"],
        _state(resident),
        _placement(placement),
        str(resident["context_length"]),
        str(placement["n_slots"]),
        str(resident["n_threads"]),
        _requests(resident["n_leases"], resident["n_waiting"]),
        "pinned" if resident["pinned"] else _until(resident["expires_at"]),
    )


def _state(resident: dict[str, Any]) -> str:
    if resident["state"] == "loading":
        return f"loading {resident['load_fraction']:.0%}"
    return str(resident["state"])


def _placement(placement: dict[str, Any]) -> str:
    mode = placement["mode"]
    if mode == "experts-in-ram":
        of = placement["n_layers"]
        return f"GPU, experts {placement['moe_layers_in_ram']}/{of} in RAM"
    if mode == "partial-gpu":
        return f"{placement['n_gpu_layers']}/{placement['n_layers'] + 1} layers on GPU"
    return {"gpu": "GPU", "cpu": "CPU"}[mode]


def _requests(n_running: int, n_waiting: int) -> str:
    return f"{n_running}, {n_waiting} wait" if n_waiting else str(n_running)


def _until(expires_at: str) -> str:
    from shimpy.units import format_duration

    seconds = (datetime.fromisoformat(expires_at) - datetime.now(UTC)).total_seconds()
    # Ollama's clients know "forever" as a date centuries away.
    if seconds > 100 * 365 * 86400:
        return "forever"
    return f"in {format_duration(seconds)}" if seconds > 0 else "now"


def _memory(resident: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Yield a row for each device: its buffers there, as they are and as they were predicted.

    What the process takes beside them (a CUDA context, Python) is known to the plan alone. Parked
    caches, if there are any, have a row of their own: they leave when the RAM is wanted.
    """
    from shimpy.units import format_bytes

    placement = resident["placement"]
    for use in (*placement["devices"], {**placement["host"], "name": "RAM"}):
        real = use["real"] or {}
        if not use["total_bytes"] and not real.get("total_bytes"):
            continue
        sizes = (real.get(f"{part}_bytes") for part in ("weights", "kv", "compute", "total"))
        shown = ("-" if size is None else format_bytes(size) for size in sizes)
        predicted = format_bytes(use["total_bytes"] - use["overhead_bytes"])
        if placement.get("figures") == "exact":
            # By llama.cpp's own simulation.
            predicted += ", exact"
        process = f"+ {format_bytes(use['overhead_bytes'])}"
        yield resident["name"], use["name"], *shown, predicted, process
    if resident["parked_bytes"]:
        parked = format_bytes(resident["parked_bytes"])
        yield resident["name"], "RAM", "-", parked, "-", parked, "parked caches", "-"


def _waiting(model: dict[str, Any]) -> str:
    from shimpy.units import format_duration

    if model["held_until_s"] is None:
        n_waiting = model["n_waiting"]
        requests = "1 request waits" if n_waiting == 1 else f"{n_waiting} requests wait"
        return f"{model['name']}  {requests}: {model['reason']}"
    left_s = max(0.0, model["held_until_s"] - datetime.now(UTC).timestamp())
    held = click.style(f"held back for {format_duration(left_s)}", fg="red")
    deaths = f"{model['n_deaths']} deaths, the last worker {model['last_death']}"
    return f"{model['name']}  {held}: {deaths}"
