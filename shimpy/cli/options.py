"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from shimpy.units import parse_bytes

# protocol.messages.KvType, without the import: `--help` stays quick.
KV_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
# protocol.messages.LoadMode.
LOAD_MODES = ("mmap", "locked")

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


def complete_model(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Return the models whose name begins so, for the shell; none where no daemon answers."""
    from collections import Counter

    from shimpy.client import Client
    from shimpy.config import client_url
    from shimpy.errors import ShimpyError

    try:
        with Client(client_url()) as client:
            names = [str(model["name"]) for model in client.models()]
    except ShimpyError:
        return []
    # The only tag can be left out, and bash ends a word at a colon.
    counts = Counter(name.partition(":")[0] for name in names)
    shown = [base if counts[base := name.partition(":")[0]] == 1 else name for name in names]
    return sorted(name for name in shown if name.startswith(incomplete.lower()))


def hint_if_idle(name: str) -> None:
    """Tell the user of a parameter of Ollama's that shimpy takes and does nothing with."""
    from shimpy.cli.output import hint
    from shimpy.parameters import WITHOUT_EFFECT

    if name in WITHOUT_EFFECT:
        hint(f"{name} has no effect in shimpy, which sees to that by itself")
