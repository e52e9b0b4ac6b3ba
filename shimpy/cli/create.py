"""`shimpy create`: make a model from a Modelfile."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from shimpy.cli.progress import BytesProgress
    from shimpy.client import Client

_CHUNK = 1024 * 1024


@click.command(name="create")
@click.argument("model")
@click.option(
    "-f",
    "--file",
    "path",
    type=click.Path(path_type=Path),
    default=Path("Modelfile"),
    show_default=True,
    help="The Modelfile.",
)
def command(model: str, path: Path) -> None:
    """Make MODEL from a Modelfile.

    FROM names a model, whose files are shared, or GGUF files, which are taken into the store.
    """
    from shimpy.cli.autostart import connect
    from shimpy.cli.modelfile import parse_modelfile
    from shimpy.cli.output import read_text
    from shimpy.cli.progress import bytes_progress
    from shimpy.errors import NotFoundError

    if not path.exists():
        raise NotFoundError(f"there is no Modelfile {path}; -f names another")
    parts = parse_modelfile(read_text(path))
    with connect() as client, bytes_progress() as progress:
        source = _source(client, parts.sources, path.parent, progress)
        for status in client.create({"model": model, **parts.request(), **source}):
            progress.say(status["status"])


def _source(
    client: Client, sources: list[str], folder: Path, progress: BytesProgress
) -> dict[str, Any]:
    """Return where the model comes from: another one, or files, uploaded."""
    from shimpy.errors import UserError
    from shimpy.gguf.reader import read_header, shard_paths

    files: list[Path] = []
    names: list[str] = []
    for source in sources:
        found = _files(source, folder)
        files += found
        names += [] if found else [source]
    if len(names) > 1 or (names and files):
        raise UserError(f"the Modelfile starts from several models: {', '.join(sources)}")
    if names:
        return {"from": names[0]}
    known = known_as(client, files[0])
    if known is not None:
        return {"from": known}
    # What is no model is told by the name that the user knows, before it is hashed and copied.
    for file in files:
        if shard_paths(file)[0] == file:
            read_header(file)
    return {"files": {file.name: _upload(client, file, progress) for file in files}}


def _files(source: str, folder: Path) -> list[Path]:
    """Return the GGUF files that a FROM line means, all shards of a split one; none: a name."""
    from shimpy.errors import UserError
    from shimpy.gguf.reader import shard_paths

    path = folder / Path(source).expanduser()
    if path.is_dir():
        found = sorted(path.glob("*.gguf"))
        if not found:
            raise UserError(f"there is no GGUF file in {path}; shimpy converts no other format")
        return found
    if path.is_file():
        return list(shard_paths(path))
    if source.startswith((".", "/", "~")) or source.lower().endswith(".gguf"):
        raise UserError(f"there is no file {path}")
    return []


def known_as(client: Client, path: Path) -> str | None:
    """Return the model, broken or not, that the daemon knows a file as; it need not be copied."""
    real = path.resolve()
    for model in client.models():
        # Only a daemon on this machine can mean the same file.
        if Path(model["path"]).resolve() == real:
            return str(model["name"])
    return None


def _upload(client: Client, path: Path, progress: BytesProgress) -> str:
    from shimpy.registry.blobs import hash_file

    size = path.stat().st_size
    digest = hash_file(path, on_bytes=lambda n: progress.show(f"hashing {path.name}", n, size))
    if not client.has_blob(digest):
        client.upload_blob(digest, _chunks(path, size, progress), size)
    return digest


def _chunks(path: Path, size: int, progress: BytesProgress) -> Iterator[bytes]:
    n_sent = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk
            n_sent += len(chunk)
            progress.show(f"copying {path.name}", n_sent, size)
