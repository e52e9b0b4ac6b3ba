"""`shimpy rm`: remove models from the store."""

from __future__ import annotations

import click

from shimpy.cli.options import complete_model


@click.command(name="rm")
@click.argument(
    "models", nargs=-1, required=True, metavar="MODEL...", shell_complete=complete_model
)
def command(models: tuple[str, ...]) -> int:
    """Remove models, and the files that no other model needs.

    Only models of shimpy's own store: what lies in a folder, or in another tool's store, is
    left alone, and the message says how it is removed there.
    """
    from shimpy.cli.autostart import connect
    from shimpy.cli.output import hint
    from shimpy.errors import ShimpyError

    n_failed = 0
    with connect() as client:
        for model in models:
            try:
                client.delete(model)
            except ShimpyError as error:
                n_failed += 1
                hint(f"Error: {error.message}")
            else:
                click.echo(f"deleted '{model}'")
    return 1 if n_failed else 0
