"""`shimpy pin`: a model that stays."""

from __future__ import annotations

import click

from shimpy.cli.options import complete_model


@click.command(name="pin")
@click.argument("model", shell_complete=complete_model)
def command(model: str) -> None:
    """Keep MODEL loaded, once it is, whoever needs its memory.

    For as long as the daemon runs; the setting `pinned` is for longer.
    """
    from shimpy.cli.output import hint
    from shimpy.client import Client
    from shimpy.config import client_url

    with Client(client_url()) as client:
        state = client.pin(model, pinned=True)
    if not state["loaded"]:
        hint(f"{state['model']} is pinned, and stays once it is loaded")
