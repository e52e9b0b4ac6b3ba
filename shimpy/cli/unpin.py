"""`shimpy unpin`: a model that need not stay."""

from __future__ import annotations

import click

from shimpy.cli.options import complete_model


@click.command(name="unpin")
@click.argument("model", shell_complete=complete_model)
def command(model: str) -> None:
    """Let a pinned MODEL leave again as others do."""
    from shimpy.client import Client
    from shimpy.config import client_url

    with Client(client_url()) as client:
        client.pin(model, pinned=False)
