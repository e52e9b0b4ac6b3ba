"""`shimpy verify`: read the store's files again and check their digests."""

from __future__ import annotations

from typing import Any

import click

from shimpy.cli.options import complete_model, json_option


@click.command(name="verify")
@click.argument("models", nargs=-1, metavar="[MODEL]...", shell_complete=complete_model)
@json_option
def command(models: tuple[str, ...], *, as_json: bool) -> int:
    """Read MODELs' files again, or all in the store, and check them. Exits 1 for a damaged one."""
    from shimpy.cli.autostart import connect
    from shimpy.cli.output import print_json
    from shimpy.cli.progress import bytes_progress

    found: list[dict[str, Any]] = []
    with connect() as client, bytes_progress() as progress:
        for line in client.verify(models):
            if "completed" in line:
                progress.show(f"{line['model']} {line['file']}", line["completed"], line["total"])
            elif "file" in line:
                found.append(line)
                if not as_json:
                    verdict = line["problem"] or "verified"
                    progress.tell(f"{line['model']} {line['file']}: {verdict}")
    if as_json:
        print_json(found)
    return 1 if any(line["problem"] for line in found) else 0
