"""`shimpy stop`: unload a model."""

from __future__ import annotations

import click

from shimpy.cli.options import complete_model


@click.command(name="stop")
@click.argument("model", shell_complete=complete_model)
def command(model: str) -> None:
    """Unload MODEL once its last request has ended.

    The daemon goes on. `systemctl stop shimpy` ends a service, Ctrl-C one in a terminal; one that a
    command has started ends by itself.
    """
    from shimpy.client import Client
    from shimpy.config import client_url

    with Client(client_url()) as client:
        client.unload(model)
