"""`shimpy catalog`: the models that can be pulled by a short name."""

from __future__ import annotations

from typing import Any

import click

from shimpy.cli.options import json_option


@click.group(name="catalog", invoke_without_command=True)
@json_option
@click.pass_context
def command(context: click.Context, *, as_json: bool) -> None:
    """List the models that can be pulled by a short name.

    A registry.toml of your own in the config folder is laid over the list.
    """
    if context.invoked_subcommand is not None:
        return
    from shimpy.cli.autostart import connect
    from shimpy.cli.output import hint, print_json, print_table

    with connect() as client:
        entries = client.catalog()
    if as_json:
        print_json(entries)
        return
    print_table(("NAME", "TAGS", "LICENSE", "HERE", "WHAT"), [_row(entry) for entry in entries])
    for entry in entries:
        if entry["unavailable"]:
            hint(f"{entry['name']} can't be pulled: {entry['unavailable']}")


@command.command(name="check")
@click.argument("names", nargs=-1)
@json_option
def check(names: tuple[str, ...], *, as_json: bool) -> int:
    """Ask the hub whether it has what the catalog says of NAMES, or of all. Exits 1 if not."""
    import msgspec

    from shimpy.cli.output import print_json
    from shimpy.config import config_folder
    from shimpy.errors import NotFoundError
    from shimpy.registry.catalog import FILE_NAME, load_catalog
    from shimpy.registry.catalog_check import check_entries

    entries = load_catalog(config_folder() / FILE_NAME).entries
    unknown = [name for name in names if name not in entries]
    if unknown:
        raise NotFoundError(
            f"the catalog has no {', '.join(unknown)}; `shimpy catalog` lists what it has"
        )
    wanted = {name: entry for name, entry in entries.items() if not names or name in names}
    found = []
    for checked in check_entries(wanted):
        found.append(checked)
        if not as_json:
            verdict = "; ".join(checked.problems) or "ok"
            click.echo(f"{checked.name}: {verdict} ({', '.join(checked.tags) or 'nothing'})")
    if as_json:
        print_json(msgspec.to_builtins(found))
    return 1 if any(checked.problems for checked in found) else 0


def _row(entry: dict[str, Any]) -> tuple[str, ...]:
    tags = ", ".join(entry["tags"] or ["any"])
    if entry["builtin"]:
        tags = "built in"
    if entry["unavailable"]:
        tags = "none"
    here = ", ".join(name.partition(":")[2] for name in entry["installed"])
    return (entry["name"], tags, entry["license"], here or "-", entry["title"])
