"""`shimpy service`: the daemon under systemd."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

import click

from shimpy.cli.output import hint

# For the system's systemd, and for one's own.
_NOT_RUNNING = {
    False: "systemd does not run here: start `shimpy serve` by what starts services on this "
    "machine, or let --no-start put the files in place for later",
    True: "your own systemd does not run here: log in as yourself, not through su or sudo, or let "
    "--no-start put the files in place for later",
}

_user_option = click.option(
    "--user", "for_user", is_flag=True, help="Under your own systemd, with your own models."
)


@click.group(name="service")
def command() -> None:
    """Install the daemon as a service of systemd, remove it, see how it is."""


@command.command(name="install")
@_user_option
@click.option("--socket", is_flag=True, help="Start with the first connection, by a socket unit.")
@click.option("--no-start", is_flag=True, help="Put the files in place and start nothing.")
def install(*, for_user: bool, socket: bool, no_start: bool) -> None:
    """Put the units in place and start the service."""
    from shimpy.cli.units import find_program, read_unit
    from shimpy.errors import UserError

    if socket and for_user:
        raise UserError("there is a socket unit for the system's service only")
    places = _places(for_user=for_user)
    runs = _systemd_runs(for_user=for_user)
    if not runs and not no_start:
        raise UserError(_NOT_RUNNING[for_user])
    program = find_program()
    for name, path in places.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(read_unit(name, program), encoding="utf-8")
        hint(f"wrote {path}")
    if not for_user:
        _call("systemd-sysusers", "/etc/sysusers.d/shimpy.conf")
        _call("systemd-tmpfiles", "--create", "/etc/tmpfiles.d/shimpy.conf")
        _warn_of_home(program)
    if runs:
        _systemctl("daemon-reload", for_user=for_user)
    if no_start:
        return
    unit = "shimpy.socket" if socket else "shimpy.service"
    _systemctl("enable", "--now", unit, for_user=for_user)
    hint(f"{unit} runs; `shimpy service status` shows how, `shimpy doctor` whether all is well")


@command.command(name="uninstall")
@_user_option
def uninstall(*, for_user: bool) -> None:
    """Stop the service and remove its units; models and settings stay."""
    places = _places(for_user=for_user)
    units = [path.name for path in places.values() if path.suffix in {".service", ".socket"}]
    runs = _systemd_runs(for_user=for_user)
    if runs:
        _systemctl("disable", "--now", *units, for_user=for_user, check=False)
    for path in places.values():
        if path.exists():
            path.unlink()
            hint(f"removed {path}")
    if runs:
        _systemctl("daemon-reload", for_user=for_user)
    if not for_user:
        hint("kept: /var/lib/shimpy (models, keys), /etc/shimpy (settings), and the user shimpy")


@command.command(name="status")
@_user_option
def status(*, for_user: bool) -> None:
    """Show what systemd says of the service."""
    arguments = ["--user"] if for_user else []
    done = _run("systemctl", *arguments, "--no-pager", "--lines=5", "status", "shimpy.service")
    if done.returncode:
        raise SystemExit(done.returncode)


def _systemd_runs(*, for_user: bool) -> bool:
    """Whether there is a systemd to start services; in containers and images there is none."""
    scope = ["--user"] if for_user else []
    done = _run("systemctl", *scope, "is-system-running", capture_output=True)
    # A machine on which something failed is "degraded", with a status, too.
    return done.returncode == 0 or done.stdout.strip() not in {b"", b"offline"}


def _places(*, for_user: bool) -> Mapping[str, Path]:
    from shimpy.cli.units import SYSTEM_UNITS, USER_UNITS
    from shimpy.config import user_config_home
    from shimpy.errors import UserError

    if for_user:
        home = user_config_home()
        return {name: home / path for name, path in USER_UNITS.items()}
    if os.geteuid() != 0:
        raise UserError(
            "the system's service is root's to change: use sudo, or --user for one of your own"
        )
    return SYSTEM_UNITS


def _warn_of_home(program: str) -> None:
    path = Path(program.split(maxsplit=1)[0])
    if path.is_relative_to("/root") or path.is_relative_to("/home"):
        hint(
            f"the service's user has to be able to run {path}, which lies in somebody's home; "
            "`shimpy doctor` tells whether it can"
        )


def _systemctl(*arguments: str, for_user: bool, check: bool = True) -> None:
    _call("systemctl", *(["--user"] if for_user else []), *arguments, check=check)


def _call(*argv: str, check: bool = True) -> None:
    from shimpy.errors import ShimpyError

    done = _run(*argv)
    if check and done.returncode:
        raise ShimpyError(f"`{' '.join(argv)}` ended with status {done.returncode}")


def _run(*argv: str, capture_output: bool = False) -> subprocess.CompletedProcess[bytes]:
    from shimpy.errors import UserError

    try:
        return subprocess.run(argv, check=False, capture_output=capture_output)  # noqa: S603 - systemd's own tools
    except FileNotFoundError:
        raise UserError(f"there is no {argv[0]} here: this machine does not run systemd") from None
