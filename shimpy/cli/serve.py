"""`shimpy serve`: the daemon in the foreground."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shimpy.cli.options import config_option
from shimpy.cli.quick import quick_imports
from shimpy.config import HELP, METAVARS
from shimpy.values import DEFAULT_BIND

if TYPE_CHECKING:
    from shimpy.config import Config
    from shimpy.errors import StoreLockedError

# How long a daemon takes to end, at most, once its requests have; and between looks.
_END_S = 15.0
_LOOK_S = 0.1

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


def _other_names(function: Callable[..., Any]) -> Callable[..., Any]:
    """Answer the options that other servers have for the address with ours."""
    for flag in ("--host", "--port"):
        function = click.option(flag, hidden=True, expose_value=False, callback=_tell_of_bind)(
            function
        )
    return function


def _tell_of_bind(context: click.Context, option: click.Parameter, value: str | None) -> None:
    if value is not None:
        raise click.UsageError(
            f"No such option: {option.opts[0]}. Address and port are one: --bind {DEFAULT_BIND}",
            ctx=context,
        )


@click.command(name="serve")
@_setting_options
@_other_names
@config_option
# Started by a command that found no daemon.
@click.option("--background", is_flag=True, hidden=True)
def command(config_file: Path | None, *, background: bool, **flags: Any) -> None:
    """Run the daemon."""
    import asyncio

    from shimpy.config import load_config
    from shimpy.errors import StoreLockedError

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
    deadline_s = 0.0
    while True:
        try:
            asyncio.run(serve(config, load=load))
        except StoreLockedError as error:
            if not deadline_s and not background and _gives_way(config, error):
                deadline_s = time.monotonic() + config.drain_timeout + _END_S
            if time.monotonic() > deadline_s:
                raise
            time.sleep(_LOOK_S)
        else:
            break


def _gives_way(config: Config, error: StoreLockedError) -> bool:
    """Whether the store's owner is a daemon that nobody asked for; it is told to end."""
    import os
    import signal

    from shimpy.cli.autostart import is_background
    from shimpy.cli.output import hint

    if error.owner is None or not is_background(config, error.owner):
        return False
    hint(f"the daemon in the background (process {error.owner}) gives way to this one")
    try:
        os.kill(error.owner, signal.SIGTERM)
    except PermissionError:
        return False
    except ProcessLookupError:
        pass
    return True
