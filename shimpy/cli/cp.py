"""`shimpy cp`: give a model a second name."""

from __future__ import annotations

import click

from shimpy.cli.options import complete_model


@click.command(name="cp")
@click.argument("source", shell_complete=complete_model)
@click.argument("destination")
def command(source: str, destination: str) -> None:
    """Give SOURCE the second name DESTINATION; no file is copied."""
    from shimpy.cli.autostart import connect

    with connect() as client:
        client.copy(source, destination)
    click.echo(f"copied '{source}' to '{destination}'")
