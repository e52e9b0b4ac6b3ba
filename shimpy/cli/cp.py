"""`shimpy cp`: give a model a second name."""

from __future__ import annotations

import click


@click.command(name="cp")
@click.argument("source")
@click.argument("destination")
def command(source: str, destination: str) -> None:
    """Give SOURCE the second name DESTINATION; no file is copied."""
    from shimpy.cli.autostart import connect

    with connect() as client:
        client.copy(source, destination)
    click.echo(f"copied '{source}' to '{destination}'")
