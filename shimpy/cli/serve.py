"""`shimpy serve`: the daemon in the foreground."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shimpy.cli.options import config_option
from shimpy.cli.quick import quick_imports
from shimpy.config import HELP, METAVARS

if TYPE_CHECKING:
    from shimpy.config import Config

# Flags whose form differs from `--name VALUE`.
_FORMS: dict[str, dict[str, Any]] = {
    "model_dirs": {"multiple": True},
    # Bare `--cpu-moe` means on, as llama.cpp's own flag does.
    "cpu_moe": {"is_flag": False, "flag_value": "on"},
    "insecure": {"is_flag": False, "flag_value": "on"},
    "offline": {"is_flag": False, "flag_value": "on"},
}


def _setting_options(function: Callable[..., Any]) -> Callable[..., Any]:
    for name in reversed(list(HELP)):
        flag = f"--{name.replace('_', '-')}"
        function = click.option(
            flag, name, metavar=METAVARS[name], help=HELP[name], **_FORMS.get(name, {})
        )(function)
    return function


@click.command(name="serve")
@_setting_options
@config_option
def command(config_file: Path | None, **flags: Any) -> None:
    """Run the daemon."""
    import asyncio

    from shimpy.config import load_config

    flags["model_dirs"] = flags["model_dirs"] or None

    def load() -> Config:
        return load_config(flags=flags, file=config_file).config

    config = load()

    with quick_imports():
        from shimpy.logs import setup_logging
        from shimpy.server.daemon import serve

    try:
        setup_logging(config.log_level, config.log_format, config.log_file)
    except OSError as error:
        from shimpy.errors import InvalidOptionError

        reason = f"can't write {config.log_file}: {error.strerror or error}"
        raise InvalidOptionError(f"log_file: {reason}", option="log_file") from error
    asyncio.run(serve(config, load=load))
