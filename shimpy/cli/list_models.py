"""`shimpy list`: the models on this machine."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import click

from shimpy.cli.options import json_option


@click.command(name="list")
@click.argument("prefix", required=False, default="")
@json_option
def command(prefix: str, *, as_json: bool) -> None:
    """List the models on this machine, those whose name begins with PREFIX."""
    from shimpy.cli.autostart import connect
    from shimpy.cli.output import hint, print_json, print_table

    with connect() as client:
        models = [m for m in client.models() if m["name"].startswith(prefix.lower())]
    if as_json:
        print_json(models)
        return
    print_table(("NAME", "SIZE", "EXPERTS", "MODIFIED", "FROM"), [_row(model) for model in models])
    if not models:
        hint(f'no model has a name that begins with "{prefix}"')
    for model in models:
        if model.get("error"):
            hint(f"{model['name']} is broken: {model['error']}")


def _row(model: dict[str, Any]) -> tuple[str, ...]:
    from shimpy.units import format_bytes

    name = f"{model['name']} (broken)" if model.get("error") else model["name"]
    return (
        name,
        format_bytes(model["size"]),
        _experts(model.get("experts")),
        _age(model["modified_at"]),
        model.get("source", ""),
    )


def _experts(experts: dict[str, Any] | None) -> str:
    if not experts or not experts["tensors"]:
        return "-"
    shared = f"+{experts['n_expert_shared']}" if experts["n_expert_shared"] else ""
    return f"{experts['n_expert']}{shared}, {experts['n_expert_used']} active"


def _age(modified_at: str) -> str:
    seconds = (datetime.now(UTC) - datetime.fromisoformat(modified_at)).total_seconds()
    for unit, size in (("day", 86400), ("hour", 3600), ("minute", 60)):
        count = int(seconds // size)
        if count >= 1:
            return f"{count} {unit}{'s' if count > 1 else ''} ago"
    return "just now"
