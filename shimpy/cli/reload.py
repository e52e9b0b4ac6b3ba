"""`shimpy reload`: the daemon reads its config again."""

from __future__ import annotations

import click

from shimpy.cli.options import json_option


@click.command(name="reload")
@json_option
def command(*, as_json: bool) -> None:
    """Let the daemon read its config again; no request is dropped."""
    from shimpy.cli.output import hint, print_json
    from shimpy.client import Client
    from shimpy.config import client_url

    with Client(client_url()) as client:
        done = client.reload()
    if as_json:
        print_json(done)
        return
    hint(f"applied: {', '.join(done['applied']) or 'nothing has changed'}")
    if done["needs_restart"]:
        hint(f"needs a restart: {', '.join(done['needs_restart'])}")
