"""`shimpy pull`: a model from the hub, an address or an Ollama registry into the store."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Iterable

    from shimpy.client import Client
    from shimpy.errors import NotFoundError


@click.command(name="pull")
@click.argument("model")
@click.option("--force", is_flag=True, help="Pull it even if it can't run on this machine.")
def command(model: str, *, force: bool) -> None:
    """Pull MODEL, once it is known how it will run here.

    MODEL is a name of `shimpy catalog` (deepseek-moe-16b:q4_k_m), hf.co/org/repo:QUANT,
    org/repo/file.gguf, an address of a .gguf file, or ollama:name:tag. With no tag it is the
    quantization that suits this machine best.
    """
    from shimpy.cli.autostart import connect

    with connect() as client:
        click.echo(show_pull(client.pull(model, force=force)))


def show_pull(lines: Iterable[dict[str, Any]]) -> str:
    """Show on standard error what a pull does, and return the name of its model."""
    from shimpy.cli.progress import bytes_progress

    model = ""
    with bytes_progress() as progress:
        for line in lines:
            if "file" in line:
                completed = line.get("completed", 0)
                progress.show(line["file"], completed, line.get("total", completed))
                continue
            progress.say(line["status"])
            model = line.get("model", model)
    return model


def pull_missing(client: Client, model: str, error: NotFoundError) -> str:
    """Pull what a command was asked to run and is not there; return the name that it got.

    Raises:
        NotFoundError: nothing that could be pulled has that name: `error`.
    """
    from shimpy.cli.output import hint
    from shimpy.errors import NotFoundError

    hint(f"{model} is not on this machine")
    try:
        return show_pull(client.pull(model))
    except NotFoundError as missing:
        # Most often the registry and the catalog mean the same name.
        _, cut, meant = error.message.partition("; ")
        told = missing.message.replace(cut + meant, ".", 1) if meant else missing.message
        raise NotFoundError(f"{error.message}\nit can't be pulled: {told}") from error
