"""`shimpy unpin`: a model that need not stay."""

from __future__ import annotations

import click


@click.command(name="unpin")
@click.argument("model")
def command(model: str) -> None:
    """Let a pinned MODEL leave again as others do."""
    from shimpy.client import Client
    from shimpy.config import client_url

    with Client(client_url()) as client:
        client.pin(model, pinned=False)
