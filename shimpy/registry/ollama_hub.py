"""Models of an Ollama registry: Docker's protocol, version 2, with Ollama's own media types."""

from __future__ import annotations

import hashlib
from functools import partial
from typing import Final

import msgspec

from shimpy.errors import NotFoundError, RemoteError, ShimpyError, UnsupportedError
from shimpy.registry.manifest import parse_digest
from shimpy.registry.reference import OllamaReference
from shimpy.registry.remote import RemoteFile, TransientError
from shimpy.registry.settings import ModelSettings
from shimpy.registry.tools.ollama import (
    MEDIA,
    SETTING_LAYERS,
    Layer,
    LayerManifest,
    layer_settings,
)
from shimpy.registry.web import Web
from shimpy.units import MIB

_ACCEPT: Final = "application/vnd.docker.distribution.manifest.v2+json"
# Manifests have some kilobytes, and the longest known licence 40 kB.
_MOST_BYTES: Final = 4 * MIB


class OllamaModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model of a registry, as of now."""

    files: tuple[RemoteFile, ...]
    projector: RemoteFile | None
    settings: ModelSettings


def fetch_model(web: Web, reference: OllamaReference) -> OllamaModel:
    """Return a model's files and what it comes with; blocking.

    Raises:
        TransientError: the line broke, or the registry is busy.
        NotFoundError: the registry has no such model.
        RemoteError: it refuses, or its manifest makes no sense.
        UnsupportedError: the model uses what shimpy has not.
    """
    url = f"{reference.address}/manifests/{reference.tag}"
    try:
        data = web.read(url, accept=_ACCEPT, most_bytes=_MOST_BYTES)
    except NotFoundError as error:
        raise NotFoundError(f"{reference.host} has no model {reference}") from error
    try:
        layers = msgspec.json.decode(data, type=LayerManifest).layers or []
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RemoteError(f"{url}: is no manifest: {error}") from error
    by_kind: dict[str, list[Layer]] = {}
    for layer in layers:
        by_kind.setdefault(layer.media_type.removeprefix(MEDIA), []).append(layer)
    if "adapter" in by_kind:
        raise UnsupportedError(f"{reference} uses a LoRA adapter; shimpy applies none yet")
    if "model" not in by_kind:
        raise NotFoundError(f"{reference} has no GGUF file: it runs in its maker's cloud alone")
    texts = {
        kind: [_read_text(web, reference, layer) for layer in by_kind.get(kind, [])]
        for kind in SETTING_LAYERS
    }
    projectors = [_file(web, reference, layer) for layer in by_kind.get("projector", [])]
    return OllamaModel(
        files=tuple(_file(web, reference, layer) for layer in by_kind["model"]),
        projector=projectors[0] if projectors else None,
        settings=layer_settings(texts),
    )


def _file(web: Web, reference: OllamaReference, layer: Layer) -> RemoteFile:
    url, digest = _address(reference, layer)
    return RemoteFile(
        path=f"{reference.name}-{digest[7:19]}.gguf",
        size_bytes=layer.size,
        digest=digest,
        open=partial(web.open, url),
        url=url,
    )


def _read_text(web: Web, reference: OllamaReference, layer: Layer) -> str:
    url, digest = _address(reference, layer)
    data = web.read(url, accept="*/*", most_bytes=_MOST_BYTES)
    if f"sha256:{hashlib.sha256(data).hexdigest()}" != digest:
        raise TransientError(f"{url}: came damaged")
    return data.decode(errors="replace")


def _address(reference: OllamaReference, layer: Layer) -> tuple[str, str]:
    try:
        digest = parse_digest(layer.digest)
    except ShimpyError as error:
        raise RemoteError(f"{reference}: its manifest has an {error.message}") from error
    return f"{reference.address}/blobs/{digest}", digest
