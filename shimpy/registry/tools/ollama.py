"""Ollama's store: a manifest for each name, and blobs that several of them may share.

    <models>/manifests/<host>/<namespace>/<model>/<tag>    JSON: config and layers by digest
    <models>/blobs/sha256-<hex>                            ("sha256:<hex>" in old stores)

The layers' media types tell what they are: the model's file, a projector, a template in Go's
language, a system message, parameters, messages, licences.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from shimpy.names import DEFAULT_TAG, ModelName, name_part
from shimpy.registry.discovery import FoundFile, FoundModel, Scan
from shimpy.registry.settings import ModelSettings, Turn
from shimpy.registry.tools.reading import (
    UnreadableError,
    files_in,
    folders_in,
    look_at,
    read_json,
    read_small,
)

TOOL: Final = "ollama"
MEDIA: Final = "application/vnd.ollama.image."
# The kinds of layers that are texts about the model.
SETTING_LAYERS: Final = ("params", "system", "template", "messages", "license")
# What a name leaves out: the registry that Ollama itself pulls from.
_USUAL_HOST: Final = "registry.ollama.ai"
_USUAL_NAMESPACE: Final = "library"


class Layer(msgspec.Struct, rename="camel"):
    """A part of a model."""

    media_type: str
    digest: str
    size: int = 0


class LayerManifest(msgspec.Struct):
    """What Ollama keeps under a name: Docker's manifest, version 2."""

    layers: list[Layer] | None = None


class OllamaStore:
    """The models in Ollama's stores; what has been read of them is remembered."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = tuple(folders)
        # By path and stamp: manifests change by being replaced.
        self._manifests: dict[tuple[Path, str], LayerManifest] = {}
        # By blob: they never change.
        self._blobs: dict[Path, bytes] = {}

    def scan(self) -> Scan:
        """Return all models; those that lack a file are broken, those without one left out."""
        models: list[FoundModel] = []
        problems: list[str] = []
        manifests: dict[tuple[Path, str], LayerManifest] = {}
        for root in self._folders:
            try:
                for path, name in _manifest_paths(root / "manifests"):
                    file = look_at(path)
                    if file is None:
                        continue
                    key = (path, file.stamp)
                    try:
                        manifests[key] = self._manifests.get(key) or read_json(path, LayerManifest)
                        found = self._found(root, file, name, manifests[key].layers or [])
                    except UnreadableError as error:
                        found = _broken(file, name, str(error))
                    models += [found] if found is not None else []
            except UnreadableError as error:
                problems.append(str(error))
        self._manifests = manifests
        return Scan(models=tuple(models), readable=self._folders, problems=tuple(problems))

    def _found(
        self, root: Path, manifest: FoundFile, name: ModelName, layers: Sequence[Layer]
    ) -> FoundModel | None:
        """Return the model that some layers make; None: none that is on this machine."""
        by_kind: dict[str, list[Path]] = {}
        digests: dict[Path, str] = {}
        for layer in layers:
            path = _blob_path(root, layer.digest)
            by_kind.setdefault(layer.media_type.removeprefix(MEDIA), []).append(path)
            digests[path] = layer.digest.replace("-", ":")
        models = by_kind.get("model", [])
        if not models:
            return None
        if "adapter" in by_kind:
            return _broken(manifest, name, f"{name}: uses a LoRA adapter; shimpy applies none yet")
        files = [look_at(path, digest=digests[path]) for path in models]
        missing = [path for path, file in zip(models, files, strict=True) if file is None]
        if missing:
            return _broken(
                manifest, name, f"{missing[0]}: is missing; `ollama pull {name}` brings it back"
            )
        return FoundModel(
            files=tuple(file for file in files if file is not None),
            source=TOOL,
            tool=TOOL,
            name=name,
            settings=self._settings(by_kind),
            is_listed=True,
            projector=next((p for p in by_kind.get("projector", []) if p.is_file()), None),
        )

    def _settings(self, by_kind: dict[str, list[Path]]) -> ModelSettings:
        texts = {
            kind: [self._text(path) for path in by_kind.get(kind, [])] for kind in SETTING_LAYERS
        }
        return layer_settings(texts)

    def _text(self, path: Path) -> str:
        if path not in self._blobs:
            self._blobs[path] = read_small(path)
        return self._blobs[path].decode(errors="replace")


def layer_settings(texts: Mapping[str, Sequence[str]]) -> ModelSettings:
    """Return what a model's small layers say, given as texts by their kind in SETTING_LAYERS."""

    def first(kind: str) -> str | None:
        return next(iter(texts.get(kind, [])), None)

    licenses = texts.get("license", [])
    return ModelSettings(
        parameters=_decoded(first("params"), dict[str, Any]) or {},
        system=first("system"),
        template=first("template"),
        messages=_decoded(first("messages"), tuple[Turn, ...]),
        license="\n".join(licenses) if licenses else None,
    )


def _manifest_paths(root: Path) -> Iterator[tuple[Path, ModelName]]:
    for host in folders_in(root):
        for namespace in folders_in(host):
            for model in folders_in(namespace):
                for path in files_in(model):
                    yield path, _name(host.name, namespace.name, model.name, path.name)


def _name(host: str, namespace: str, model: str, tag: str) -> ModelName:
    """Return the name by which Ollama lists a model."""
    parts = [host, namespace, model]
    if host == _USUAL_HOST:
        parts = [model] if namespace == _USUAL_NAMESPACE else [namespace, model]
    return ModelName("/".join(map(name_part, parts)), name_part(tag) if tag else DEFAULT_TAG)


def _blob_path(root: Path, digest: str) -> Path:
    """Return a blob's path; digests are data from elsewhere, and must not lead out of the store."""
    name = digest.replace(":", "-").replace("/", "-")
    path = root / "blobs" / name
    old = root / "blobs" / name.replace("sha256-", "sha256:")
    return old if not path.exists() and old.exists() else path


def _broken(manifest: FoundFile, name: ModelName, problem: str) -> FoundModel:
    return FoundModel(
        files=(manifest,), source=TOOL, tool=TOOL, name=name, is_listed=True, problem=problem
    )


def _decoded(text: str | None, wanted: Any) -> Any:
    """Return JSON as what it should be; None: it is something else, and does without."""
    try:
        return None if text is None else msgspec.json.decode(text, type=wanted)
    except msgspec.DecodeError:
        return None
