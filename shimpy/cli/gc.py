"""`shimpy gc`: remove files that no model needs."""

from __future__ import annotations

import click

from shimpy.cli.options import json_option


@click.command(name="gc")
@click.option("--all", "everything", is_flag=True, help="Also what changed in the last hour.")
@click.option("--prefixes", is_flag=True, help="Also all KV caches of prompts that are kept.")
@json_option
def command(*, everything: bool, prefixes: bool, as_json: bool) -> None:
    """Remove the store's files that no model needs: broken-off pulls, unused uploads."""
    from shimpy.cli.autostart import connect
    from shimpy.cli.output import hint, print_json
    from shimpy.units import format_bytes

    with connect() as client:
        collected = client.collect_garbage(everything=everything, prefixes=prefixes)
    if as_json:
        print_json(collected)
        return
    freed = format_bytes(collected["freed_bytes"])
    click.echo(f"removed {_files(collected['n_files'])}, {freed}")
    if collected["n_kept"]:
        kept = f"{_files(collected['n_kept'])} ({format_bytes(collected['kept_bytes'])})"
        hint(f"kept {kept} that changed in the last hour; --all removes those, too")
    for problem in collected["problems"]:
        hint(problem)


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count} files"
