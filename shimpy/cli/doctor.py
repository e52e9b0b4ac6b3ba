"""`shimpy doctor`: what is wrong with this machine, and the line that mends it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
from msgspec.structs import asdict

from shimpy.cli.options import config_option, json_option

if TYPE_CHECKING:
    from shimpy.cli.checks import Finding

_MARKS = {"ok": "ok", "warning": "!", "failed": "FAILED"}
_SERVICE_HOME = "/var/lib/shimpy"


@click.command(name="doctor")
@click.option(
    "--as",
    "user",
    metavar="USER",
    help="Look with this user's eyes; for root the service's user, where there is one.",
)
@config_option
@json_option
def command(user: str | None, config_file: Path | None, *, as_json: bool) -> None:
    """Test folders, disk, GPU, memory limits, address and hub as the daemon would see them."""
    user = user or _service_user()
    if user is not None and os.geteuid() == 0 and user != "root":
        raise SystemExit(_run_as(user))
    from shimpy.cli.checks import check_all
    from shimpy.cli.output import print_json
    from shimpy.config import load_config

    findings = list(check_all(load_config(file=config_file).config))
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        _print(findings)
    if any(finding.verdict == "failed" for finding in findings):
        raise SystemExit(1)


def _print(findings: list[Finding]) -> None:
    width = max(len(finding.check) for finding in findings)
    for finding in findings:
        mark = _MARKS[finding.verdict]
        click.echo(f"{mark:<7} {finding.check:<{width}}  {finding.detail}")
        if finding.remedy:
            click.echo(f"{'':<7} {'':<{width}}  -> {finding.remedy}")


def _service_user() -> str | None:
    import pwd

    from shimpy.cli.checks import SERVICE_USER

    if os.geteuid() != 0 or not Path("/etc/systemd/system/shimpy.service").exists():
        return None
    try:
        return pwd.getpwnam(SERVICE_USER).pw_name
    except KeyError:
        return None


def _run_as(name: str) -> int:
    """Run this very command as another user, with the service's folders if it is the service's."""
    import pwd
    import subprocess

    from shimpy.cli.checks import SERVICE_USER
    from shimpy.errors import NotFoundError

    try:
        user = pwd.getpwnam(name)
    except KeyError:
        raise NotFoundError(f"there is no user {name!r} on this machine") from None
    env = {**os.environ, "HOME": user.pw_dir, "USER": name, "LOGNAME": name}
    if name == SERVICE_USER:
        env.setdefault("SHIMPY_HOME", _SERVICE_HOME)
    done = subprocess.run(  # noqa: S603 - this very program
        [sys.executable, "-m", "shimpy", *sys.argv[1:]],
        check=False,
        env=env,
        user=user.pw_uid,
        group=user.pw_gid,
        extra_groups=os.getgrouplist(name, user.pw_gid),
        cwd="/",
    )
    return done.returncode
