"""A model as the registry knows it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from shimpy.gguf.arch import ModelShape
from shimpy.names import ModelName


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
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
    # Where it was found: a folder's path, or a store's name.
    source: str
    shape: ModelShape | None
    # Why the file can't be used; None: it can.
    error: str | None = None

    @property
    def path(self) -> Path:
        """The file that llama.cpp is given."""
        return self.files[0]
