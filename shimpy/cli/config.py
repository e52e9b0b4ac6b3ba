"""`shimpy config`: every setting, its value, and where that came from."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

from shimpy.cli.options import config_option, json_option


@click.command(name="config")
@config_option
@json_option
def command(config_file: Path | None, *, as_json: bool) -> None:
    """Show every setting and where its value comes from."""
    from shimpy.cli.output import print_json, print_table
    from shimpy.config import METAVARS, SETTINGS, load_config

    loaded = load_config(file=config_file)
    values = {name: _plain(getattr(loaded.config, name)) for name in SETTINGS}
    if as_json:
        print_json(
            {name: {"value": values[name], "origin": loaded.origins[name]} for name in SETTINGS}
        )
        return
    print_table(
        ("SETTING", "VALUE", "ORIGIN"),
        [(name, _shown(values[name], METAVARS[name]), loaded.origins[name]) for name in SETTINGS],
    )


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [str(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and math.isinf(value):
        return -1
    return value


def _shown(value: Any, metavar: str) -> str:
    from shimpy.units import FOREVER_S, format_bytes, format_duration

    if value is None:
        return "-"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list):
        return ", ".join(value) or "none"
    if metavar == "SIZE":
        return format_bytes(value)
    if metavar == "TIME":
        return format_duration(FOREVER_S if value < 0 else value)
    return str(value) or "none"
