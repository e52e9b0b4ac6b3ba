"""`shimpy events`: what the daemon loads, unloads and evicts, and why."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import click

from shimpy.cli.options import complete_model

# How each kind of event is coloured; the others are plain.
_COLOURS = {
    "ready": "green",
    "moved_up": "green",
    "evict": "yellow",
    "reload": "yellow",
    "retry": "yellow",
    "shrunk": "yellow",
    "wait": "yellow",
    "load_failed": "red",
    "died": "red",
    "held": "red",
    "refused": "red",
}
_KIND_WIDTH = 11
_NAME_WIDTH = 22


@click.command(name="events")
@click.argument("model", required=False, shell_complete=complete_model)
@click.option(
    "--since",
    default="10m",
    show_default=True,
    metavar="TIME",
    help="Begin with what happened so long ago, or since these seconds of the epoch.",
)
@click.option("--follow/--no-follow", default=True, help="Go on with what comes (the default).")
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON for each event.")
def command(model: str | None, since: str, *, follow: bool, as_json: bool) -> None:
    """Show what is loaded, unloaded and evicted, and why; with MODEL, of that one alone."""
    from shimpy.cli.output import wrapped
    from shimpy.client import Client
    from shimpy.config import client_url

    with Client(client_url()) as client:
        for event in client.events(since=since, follow=follow):
            if model is None or event["model"] in {model, f"{model}:latest"}:
                click.echo(json.dumps(event) if as_json else wrapped(format_event(event)))


def format_event(event: dict[str, Any]) -> str:
    """Return an event as a line: time, kind, model, and the reason."""
    time = datetime.fromtimestamp(event["at_s"]).astimezone()
    kind = click.style(f"{event['kind']:<{_KIND_WIDTH}}", fg=_COLOURS.get(event["kind"]))
    day = f"{time:%Y-%m-%d} " if time.date() != datetime.now(time.tzinfo).date() else ""
    return f"{day}{time:%H:%M:%S}  {kind}  {event['model']:<{_NAME_WIDTH}}  {event['reason']}"
