"""`shimpy logs`: what the daemon wrote, from the journal or the background daemon's file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import click

from shimpy.cli.options import complete_model

_POLL_S = 0.25
# Fields that begin a line or say nothing.
_PLAIN = ("timestamp", "level", "event", "part")


@click.command(name="logs")
@click.argument("model", required=False, shell_complete=complete_model)
@click.option("-f", "--follow", is_flag=True, help="Go on with what comes.")
@click.option(
    "-n",
    "--lines",
    "n_lines",
    type=click.IntRange(0),
    default=200,
    show_default=True,
    metavar="N",
    help="How many lines.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the lines as they were written.")
def command(model: str | None, n_lines: int, *, follow: bool, as_json: bool) -> None:
    """Show the daemon's log, or the lines in it that are about MODEL."""
    for line in _lines(n_lines, follow=follow):
        fields = parse_line(line)
        if model is not None and not is_about(fields, model):
            continue
        click.echo(line if as_json or fields is None else format_line(fields))


def parse_line(line: str) -> dict[str, Any] | None:
    """Return the fields of a line; None: it is no event, such as a library's own words."""
    try:
        fields = json.loads(line)
    except ValueError:
        return None
    return fields if isinstance(fields, dict) and "event" in fields else None


def is_about(fields: dict[str, Any] | None, model: str) -> bool:
    """Whether a line is about a model, named with or without its tag."""
    if fields is None:
        return False
    names = {str(fields.get("model", "")), str(fields.get("worker", ""))}
    return bool(names & {model, f"{model}:latest"})


def format_line(fields: dict[str, Any]) -> str:
    """Return a line as people read it: time, level, event, then the rest as key=value."""
    rest = " ".join(
        f"{key}={value if isinstance(value, str | int | float) else json.dumps(value)}"
        for key, value in fields.items()
        if key not in _PLAIN and key != "exception"
    )
    level = str(fields.get("level", ""))
    start = f"{fields.get('timestamp', '')} {level:<7} {fields['event']}"
    trace = fields.get("exception")
    return f"{start} {rest}".rstrip() + (f"\n{trace}" if trace else "")


def _lines(n_lines: int, *, follow: bool) -> Iterator[str]:
    from shimpy.cli.autostart import LOG_NAME
    from shimpy.cli.output import hint
    from shimpy.config import load_config
    from shimpy.errors import NotFoundError

    for scope in ([], ["--user"]):
        if _has_unit(scope):
            yield from _journal(scope, n_lines, follow=follow)
            return
    config = load_config().config
    path = config.log_file or config.state_dir / LOG_NAME
    if _logs_elsewhere(path):
        hint("the daemon that runs logs to where it was started; this is what an earlier one wrote")
    if not path.exists():
        raise NotFoundError(
            f"there is no log: no service is installed, and no daemon was started in the "
            f"background ({path}); a `shimpy serve` in the foreground logs to its terminal"
        )
    yield from _file(path, n_lines, follow=follow)


def _logs_elsewhere(path: Path) -> bool:
    """Whether a daemon runs that does not log to this file, which is there."""
    from shimpy.client import Client
    from shimpy.config import client_url
    from shimpy.errors import ShimpyError

    if not path.exists():
        return False
    with Client(client_url()) as client:
        try:
            # Older ones do not tell.
            return bool(client.diagnosis()["config"].get("log_file", str(path)) != str(path))
        except ShimpyError:
            return False


def _has_unit(scope: list[str]) -> bool:
    argv = ["systemctl", *scope, "--quiet", "is-active", "shimpy.service"]
    try:
        done = subprocess.run(argv, check=False, capture_output=True)  # noqa: S603 - fixed words
    except FileNotFoundError:
        return False
    return done.returncode == 0


def _journal(scope: list[str], n_lines: int, *, follow: bool) -> Iterator[str]:
    argv = ["journalctl", *scope, "--unit", "shimpy.service", "--output", "cat"]
    argv += ["--lines", str(n_lines), "--no-pager", *(["--follow"] if follow else [])]
    if scope:
        argv[argv.index("--unit")] = "--user-unit"
        argv.remove("--user")
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as journal:  # noqa: S603
        assert journal.stdout is not None, "it was started with a pipe"
        try:
            for line in journal.stdout:
                yield line.rstrip("\n")
        finally:
            journal.terminate()


def _file(path: Path, n_lines: int, *, follow: bool) -> Iterator[str]:
    from collections import deque

    last: deque[str] = deque(maxlen=n_lines)
    old = path.with_name(f"{path.name}.1")
    if old.exists():
        with old.open(encoding="utf-8", errors="replace") as file:
            last.extend(file)
    with path.open(encoding="utf-8", errors="replace") as file:
        last.extend(file)
        yield from (line.rstrip("\n") for line in last)
        if not follow:
            return
        sys.stdout.flush()
        yield from _followed(path, file)
    while True:
        with path.open(encoding="utf-8", errors="replace") as file:
            yield from _followed(path, file)


def _followed(path: Path, file: TextIO) -> Iterator[str]:
    """Yield a file's further lines as they come, until the daemon has begun a new one."""
    rest = ""
    is_old = False
    while not is_old:
        # Asked before it is read to its end: nothing comes after that.
        is_old = _is_old(path, file)
        for piece in file:
            rest += piece
            if rest.endswith("\n"):
                yield rest.rstrip("\n")
                rest = ""
        if not is_old:
            time.sleep(_POLL_S)


def _is_old(path: Path, file: TextIO) -> bool:
    try:
        return not os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        # Between the old file's new name and the new file.
        return False
