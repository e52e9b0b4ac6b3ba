"""RamaLama's store.

    <base>/store/<transport>/<org>/<model>/refs/<tag>.json      hash of a snapshot, and its files
    <base>/store/<transport>/<org>/<model>/snapshots/<hash>/    names -> ../../blobs/<hash>
    <base>/store/<transport>/<org>/<model>/blobs/sha256-<hex>

The organization may be several folders deep.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import msgspec

from shimpy.names import ModelName, name_from_stem, name_part
from shimpy.registry.discovery import FoundModel, Scan
from shimpy.registry.manifest import digest_of
from shimpy.registry.settings import ModelSettings
from shimpy.registry.tools.reading import (
    UnreadableError,
    files_in,
    folders_in,
    look_at,
    read_json,
    read_small,
)

TOOL: Final = "ramalama"
_MAX_DEPTH: Final = 8
_OLLAMA: Final = "ollama"


class _File(msgspec.Struct):
    """A file of a snapshot: "gguf", "mmproj", "chat_template" or something else."""

    name: str
    type: str = ""
    hash: str = ""


class _Ref(msgspec.Struct):
    """What a tag stands for."""

    hash: str
    files: list[_File] = []


class RamaLamaStore:
    """The models in RamaLama's stores; what has been read of them is remembered."""

    def __init__(self, bases: Sequence[Path]) -> None:
        self._bases = tuple(bases)
        # By path and stamp.
        self._refs: dict[tuple[Path, str], _Ref] = {}
        self._templates: dict[tuple[Path, str], str] = {}

    def scan(self) -> Scan:
        """Return all models; those that lack a file are broken, those without one left out."""
        models: list[FoundModel] = []
        problems: list[str] = []
        refs: dict[tuple[Path, str], _Ref] = {}
        for base in self._bases:
            store = base / "store"
            try:
                for folder in _model_folders(store, 0):
                    for path in files_in(folder / "refs"):
                        file = look_at(path)
                        if file is None or path.suffix != ".json":
                            continue
                        key = (path, file.stamp)
                        try:
                            refs[key] = self._refs.get(key) or read_json(path, _Ref)
                            found = self._found(store, folder, path.stem, refs[key])
                        except UnreadableError as error:
                            problems.append(str(error))
                        else:
                            models += [found] if found is not None else []
            except UnreadableError as error:
                problems.append(str(error))
        self._refs = refs
        return Scan(models=tuple(models), readable=self._bases, problems=tuple(problems))

    def _found(self, store: Path, folder: Path, tag: str, ref: _Ref) -> FoundModel | None:
        snapshot = folder / "snapshots" / ref.hash.replace(":", "-").replace("/", "-")
        by_kind: dict[str, list[Path]] = {}
        for file in ref.files:
            # A name leads nowhere but into the snapshot.
            path = snapshot.joinpath(*[part for part in Path(file.name).parts if part != ".."])
            by_kind.setdefault(file.type, []).append(path)
        shards = sorted(by_kind.get("gguf", []))
        files = [look_at(path, digest=digest_of(path.resolve()) or "") for path in shards]
        whole = tuple(file for file in files if file is not None)
        # Not downloaded yet, or not to the end.
        if not whole or len(whole) < len(shards):
            return None
        name, aliases = _names(folder.relative_to(store), tag, shards[0])
        return FoundModel(
            files=whole,
            source=TOOL,
            tool=TOOL,
            name=name,
            aliases=aliases,
            settings=ModelSettings(template=self._template(by_kind.get("chat_template", []))),
            is_listed=True,
            projector=next((p for p in by_kind.get("mmproj", []) if p.is_file()), None),
        )

    def _template(self, paths: Sequence[Path]) -> str | None:
        """Return the last template: one that RamaLama made itself comes after the model's own."""
        for path in reversed(paths):
            file = look_at(path)
            if file is not None:
                key = (path, file.stamp)
                if key not in self._templates:
                    self._templates[key] = read_small(path).decode(errors="replace")
                return self._templates[key]
        return None


def _model_folders(folder: Path, depth: int) -> Iterator[Path]:
    if (folder / "refs").is_dir() and (folder / "snapshots").is_dir():
        yield folder
        return
    if depth < _MAX_DEPTH:
        for below in folders_in(folder):
            yield from _model_folders(below, depth + 1)


def _names(location: Path, tag: str, file: Path) -> tuple[ModelName, tuple[ModelName, ...]]:
    """Return a model's name and aliases by its folder in the store: transport, org, model."""
    transport, *orgs, model = [name_part(part.removesuffix(".gguf")) for part in location.parts]
    path = [*orgs, model]
    alias = ModelName("/".join([transport, *path]), name_part(tag))
    if transport == _OLLAMA:
        shown = [model] if orgs in ([], ["library"]) else path
        return ModelName("/".join(shown), name_part(tag)), (alias,)
    return name_from_stem(file.stem), (alias,)
