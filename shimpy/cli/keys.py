"""`shimpy keys`: API keys of the daemon on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from shimpy.cli.options import config_option, json_option

if TYPE_CHECKING:
    from shimpy.keys import KeyFile


@click.group(name="keys")
def command() -> None:
    """Make, list and revoke API keys.

    As soon as there is one, every request over the network needs one. They are those of the
    daemon on this machine; for the system's service, run this as root with
    SHIMPY_HOME=/var/lib/shimpy.
    """


@command.command(name="create")
@click.argument("name")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    type=click.Choice(["infer", "manage", "admin"]),
    default=("infer",),
    show_default=True,
    help="What it may: ask models, change what is installed, everything. Repeat for several.",
)
@config_option
@json_option
def create(name: str, scopes: tuple[str, ...], config_file: Path | None, *, as_json: bool) -> None:
    """Make a key called NAME and print it: this once, it is kept nowhere."""
    from shimpy.cli.output import hint, print_json
    from shimpy.keys import SCOPES

    wanted = [scope for scope in SCOPES if scope in scopes]
    key, token = _key_file(config_file).create(name, wanted)
    if as_json:
        print_json({"id": key.id, "name": key.name, "scopes": list(key.scopes), "key": token})
        return
    hint(f"the key {key.name!r} may {', '.join(key.scopes)}; it is shown only now:")
    click.echo(token)


@command.command(name="list")
@config_option
@json_option
def list_keys(config_file: Path | None, *, as_json: bool) -> None:
    """List the keys, without their secrets."""
    from datetime import UTC, datetime

    from shimpy.cli.output import hint, print_json, print_table

    rows = [
        {
            "id": key.id,
            "name": key.name,
            "scopes": list(key.scopes),
            "created": datetime.fromtimestamp(key.created_s, UTC).isoformat(timespec="seconds"),
        }
        for key in _key_file(config_file).all()
    ]
    if as_json:
        print_json(rows)
        return
    if not rows:
        hint("there is no key; `shimpy keys create NAME` makes one")
        return
    print_table(
        ("ID", "NAME", "MAY", "CREATED"),
        [(str(r["id"]), str(r["name"]), ", ".join(r["scopes"]), str(r["created"])) for r in rows],
    )


@command.command(name="revoke")
@click.argument("which", metavar="NAME_OR_ID")
@config_option
def revoke(which: str, config_file: Path | None) -> None:
    """Make a key worthless, from the next request on."""
    from shimpy.cli.output import hint

    key = _key_file(config_file).revoke(which)
    hint(f"revoked the key {key.name!r} ({key.id})")


def _key_file(config_file: Path | None) -> KeyFile:
    from shimpy.config import load_config
    from shimpy.keys import KEYS_NAME, KeyFile

    return KeyFile(load_config(file=config_file).config.state_dir / KEYS_NAME)
