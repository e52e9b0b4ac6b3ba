"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

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
