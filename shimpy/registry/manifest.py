"""What is installed under a name: its files, where they came from, what it was made with."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final, Literal

import msgspec

from shimpy.errors import InvalidNameError, InvalidOptionError, RegistryError
from shimpy.names import DEFAULT_TAG, ModelName
from shimpy.registry.settings import NO_SETTINGS, ModelSettings

# To be raised when a field comes to mean something else; older ones are read as they are.
MANIFEST_VERSION: Final = 1
FileRole = Literal["model", "projector"]
OriginKind = Literal["huggingface", "ollama", "url", "file", "model"]

# File systems' limit on a name, in bytes; names are ASCII.
_MAX_FILE_NAME: Final = 255 - len(".json")
_DIGEST: Final = re.compile(r"sha256[:-](?P<hex>[0-9a-fA-F]{64})")


class ManifestFile(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A file of a model: a blob of the store, or a file elsewhere that the store only names."""

    role: FileRole = "model"
    # The file's own name, "x-Q4_K_M-00001-of-00002.gguf"; without folders.
    name: str
    size_bytes: int
    # "sha256:<64 hex digits>"; "": not known, for a file elsewhere.
    digest: str = ""
    # Where a file lies that the store does not own: absolute. "": in the store's blobs.
    path: str = ""


class Origin(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Where a model's files came from."""

    kind: OriginKind
    # "org/repo", a name in an Ollama registry, a URL, a path, or another model's name.
    location: str
    # The commit that a repository was at.
    revision: str = ""
    # The host, where it is not the usual one.
    endpoint: str = ""


class Manifest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A model of the store; it exists once its manifest does. Immutable."""

    version: int = MANIFEST_VERSION
    name: str
    tag: str = DEFAULT_TAG
    # All shards of the model in order, then its projector if it has one.
    files: tuple[ManifestFile, ...]
    origin: Origin | None = None
    # What the model came with, the catalog's defaults included.
    settings: ModelSettings = NO_SETTINGS
    # Seconds since the epoch.
    created_s: float = 0.0

    @property
    def model_name(self) -> ModelName:
        """The name that it is listed under."""
        return ModelName(self.name, self.tag)

    @property
    def digests(self) -> frozenset[str]:
        """The blobs of the store that it needs."""
        return frozenset(file.digest for file in self.files if not file.path)


def parse_digest(text: str) -> str:
    """Return a digest in its one form, "sha256:<64 hex digits in lower case>".

    Raises:
        InvalidOptionError: it is none.
    """
    match = _DIGEST.fullmatch(text)
    if match is None:
        raise InvalidOptionError(
            f'invalid digest format: "{text[:100]}"; it is sha256: and 64 hexadecimal digits',
            option="digest",
        )
    return f"sha256:{match['hex'].lower()}"


def digest_of(path: Path) -> str | None:
    """Return the digest that a file is named by (Ollama and Hugging Face do so too), or None."""
    match = _DIGEST.fullmatch(path.name)
    return f"sha256:{match['hex'].lower()}" if match else None


def encode_manifest(manifest: Manifest) -> bytes:
    """Return a manifest's bytes on disk: JSON that people can read."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n"


def decode_manifest(data: bytes, path: Path) -> Manifest:
    """Return the manifest in `data`; `path` is for messages.

    Raises:
        RegistryError: it is damaged, or of a later version.
    """
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RegistryError(f"{path}: the manifest can't be read: {error}") from error
    if manifest.version > MANIFEST_VERSION:
        raise RegistryError(
            f"{path}: the manifest is of version {manifest.version}, this shimpy reads up to "
            f"{MANIFEST_VERSION}: a newer shimpy made it"
        )
    if not any(file.role == "model" for file in manifest.files):
        raise RegistryError(f"{path}: the manifest names no model file")
    return manifest


def file_of(folder: Path, name: ModelName) -> Path:
    """Return the file about a model in a folder of such files: <name>/<tag>.json.

    Raises:
        InvalidNameError: the name is too long for a file system.
    """
    quoted = name.name.replace("/", "%")
    for part in (quoted, name.tag):
        if len(part) > _MAX_FILE_NAME:
            raise InvalidNameError(
                f'the name "{part[:40]}..." has {len(part)} characters; to be stored it may have '
                f"{_MAX_FILE_NAME}"
            )
    return folder / quoted / f"{name.tag}.json"


def name_of_file(path: Path) -> ModelName:
    """Return the model that a file is about: the inverse of `file_of`."""
    return ModelName(path.parent.name.replace("%", "/"), path.name.removesuffix(".json"))
