"""A model as the registry knows it."""

from __future__ import annotations

from pathlib import Path

import msgspec

from shimpy.gguf.arch import ModelShape
from shimpy.names import ModelName
from shimpy.registry.settings import NO_SETTINGS, ModelSettings


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """A registered model with its files; either `shape` or `error` is set."""

    name: ModelName
    # All shards in order; the first is what llama.cpp is given.
    files: tuple[Path, ...]
    # An mmproj file beside it, for images.
    projector: Path | None = None
    size_bytes: int
    # Seconds since the epoch: the newest file's mtime.
    modified_s: float
    # Hex sha256 over the header's bytes and the files' sizes: cheap, and changes with the model.
    digest: str
    # Where it was found, for people: a folder's path, "store", "built-in", or a tool's name.
    source: str
    # The tool whose store it is in: "store" and "built-in" are shimpy's own; "": a plain folder.
    tool: str = ""
    # Further names that it answers to, as long as no model has them for its own.
    aliases: tuple[ModelName, ...] = ()
    # All that is set about it: by the user, over what it came with, over the catalog's defaults.
    settings: ModelSettings = NO_SETTINGS
    shape: ModelShape | None
    # Why the file can't be used; None: it can.
    error: str | None = None

    def __hash__(self) -> int:
        """Hash what tells models apart; settings hold dicts."""
        return hash((self.name, self.digest))

    @property
    def path(self) -> Path:
        """The file that llama.cpp is given."""
        return self.files[0]
