"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from shimpy.units import parse_bytes

# protocol.messages.KvType, without the import: `--help` stays quick.
KV_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")

F = TypeVar("F", bound=Callable[..., Any])


def json_option(function: F) -> F:
    """Add `--json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(function)


def config_option(function: F) -> F:
    """Add `--config FILE`."""
    return click.option(
        "--config",
        "config_file",
        type=click.Path(path_type=Path),
        envvar="SHIMPY_CONFIG",
        help="Read this config file instead of the usual ones.",
    )(function)


def kv_type_option(function: F) -> F:
    """Add `--kv-type TYPE`."""
    option = click.option("--kv-type", type=click.Choice(KV_TYPES), help="Type of the KV cache.")
    return option(function)


def parse_size(_ctx: click.Context, param: click.Parameter, value: Any) -> Any:
    """Return bytes for a size like 8GiB, or for each of several."""
    if value is None:
        return None
    try:
        return tuple(parse_bytes(text) for text in value) if param.multiple else parse_bytes(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def hint_if_idle(name: str) -> None:
    """Tell the user of a parameter of Ollama's that shimpy takes and does nothing with."""
    from shimpy.cli.output import hint
    from shimpy.parameters import WITHOUT_EFFECT

    if name in WITHOUT_EFFECT:
        hint(f"{name} has no effect in shimpy, which sees to that by itself")
