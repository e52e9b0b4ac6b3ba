"""Changes to the models of this machine: all of them go through the store, and only the daemon's.

Each change is made in a thread, then the registry looks again, so that the next request sees
it. What the store does not own is never touched.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from shimpy.errors import GgufError, NotFoundError, UserError
from shimpy.gguf.arch import NotAModelError, describe_model
from shimpy.gguf.reader import read_files
from shimpy.names import DEFAULT_TAG, ModelName, parse_model_name, parse_shard
from shimpy.registry.blobs import Blobs
from shimpy.registry.discovery import STORE
from shimpy.registry.manifest import (
    FileRole,
    Manifest,
    ManifestFile,
    Origin,
    digest_of,
    parse_digest,
)
from shimpy.registry.model import Model
from shimpy.registry.own import BUILT_IN, DEMO
from shimpy.registry.settings import ModelSettings
from shimpy.registry.store import Store
from shimpy.server.generation import find_model
from shimpy.server.prefixes import sweep_gone
from shimpy.server.record import Record
from shimpy.server.services import Services

# How each tool removes a model of its own.
_REMOVERS: Final = {
    "ollama": "`ollama rm {name}` removes it",
    "huggingface": "`hf cache rm` or `huggingface-cli delete-cache` removes it",
    "lmstudio": "remove it in LM Studio",
    "llama.cpp": "remove {path} from llama.cpp's cache",
    "ramalama": "`ramalama rm` removes it",
}


async def remove_model(services: Services, text: str, record: Record) -> ModelName:
    """Remove a model of the store, once its last request has ended; return its name.

    Raises:
        NotFoundError: there is no such model.
        UserError: it is not the store's; says whose it is.
    """
    name = parse_model_name(text)
    if services.store.manifest(name) is None and not services.store.is_damaged(name):
        model = await find_model(services, text, record)
        name = _removable(model, name)
    services.scheduler.unload(str(name))
    await asyncio.to_thread(services.store.remove, name)
    await services.registry.scan()
    await sweep_gone(services.config.prefix_dir, services.registry)
    record.model = str(name)
    return name


async def copy_model(services: Services, source: str, target: str, record: Record) -> None:
    """Give a model another name; a model that is not the store's keeps its files where they are.

    Raises:
        NotFoundError: there is no `source`.
        UserError: `target` is no name, or a model has it that is not the store's.
    """
    name = await check_target(services, target)
    model = await find_model(services, source, record)
    if services.store.manifest(model.name) is not None:
        await asyncio.to_thread(services.store.copy, model.name, name)
    else:
        settings = model.settings.without("aliases")
        manifest = await asyncio.to_thread(manifest_from, services.store, model, name, settings)
        await asyncio.to_thread(services.store.put_manifest, manifest)
    services.scheduler.unload(str(name))
    await services.registry.scan()


async def check_target(services: Services, text: str) -> ModelName:
    """Return the name that a model of the store is to have.

    Raises:
        UserError: it is no name, or that of a model which the store does not own.
    """
    name = parse_model_name(text)
    if name == DEMO:
        raise UserError(f'"{name}" is the model that comes with shimpy; take another name')
    for model in await services.registry.models():
        if model.name == name and model.tool != STORE:
            raise UserError(f'"{name}" is a model of {model.source}; take another name')
    return name


def manifest_from(store: Store, model: Model, name: ModelName, settings: ModelSettings) -> Manifest:
    """Return the manifest of a model that is made from another one, with its files; blocking.

    Raises:
        NotFoundError: a file of it went away a moment ago.
    """
    own = store.manifest(model.name)
    if own is not None:
        files = own.files
    else:
        files = tuple(_outside(path, "model") for path in model.files)
        if model.projector is not None:
            files += (_outside(model.projector, "projector"),)
    return Manifest(
        name=name.name,
        tag=name.tag,
        files=files,
        origin=Origin(kind="model", location=str(model.name)),
        settings=settings,
        created_s=time.time(),
    )


def manifest_of_blobs(
    blobs: Blobs, files: Mapping[str, str], name: ModelName, settings: ModelSettings
) -> Manifest:
    """Return the manifest of a model that was uploaded: file names to digests; blocking.

    Raises:
        NotFoundError: a blob is not there.
        GgufError: they are no model.
        UserError: it is another kind of file.
    """
    entries = []
    for file_name, text in files.items():
        digest = parse_digest(text)
        short = Path(file_name).name
        if Path(short).suffix.lower() != ".gguf":
            raise UserError(f'"{short}" is no GGUF file; shimpy converts no other format')
        size = blobs.size(digest)
        role: FileRole = "projector" if _is_projector(blobs.path(digest), short) else "model"
        entries.append(ManifestFile(role=role, name=short, size_bytes=size, digest=digest))
    shards = sorted((e for e in entries if e.role == "model"), key=_shard_index)
    projectors = [entry for entry in entries if entry.role == "projector"]
    if not shards:
        raise UserError("there is no model among the files")
    describe_model(read_files([blobs.path(entry.digest) for entry in shards]))
    return Manifest(
        name=name.name,
        tag=name.tag,
        files=(*shards, *projectors[:1]),
        origin=Origin(kind="file", location=shards[0].name),
        settings=settings,
        created_s=time.time(),
    )


async def put_settings(services: Services, model: Model, settings: ModelSettings) -> Model:
    """Keep what the user sets about a model of whatever source; return it as it is now.

    Raises:
        UserError: an alias is the name of another model.
    """
    await _check_aliases(services, model, settings.aliases or ())
    await asyncio.to_thread(services.store.put_settings, model.name, settings)
    await services.registry.scan()
    return await services.registry.resolve(str(model.name))


def _removable(model: Model, asked: ModelName) -> ModelName:
    """Return the name of a model that may be removed, which was asked for by another."""
    if model.name != asked and asked in model.aliases:
        raise UserError(f'"{asked}" is another name of "{model.name}"; remove it by that')
    if model.tool == STORE:
        # Asked for without its tag, and the only one.
        assert asked.tag == DEFAULT_TAG
        return model.name
    if model.tool == BUILT_IN:
        raise UserError(f'"{model.name}" comes with shimpy and can\'t be removed')
    how = _REMOVERS.get(model.tool, "remove {path} yourself")
    raise UserError(
        f'"{model.name}" is not in shimpy\'s store but in {_place_of(model)}, which shimpy only '
        f"reads; {how.format(name=model.name, path=model.path)}"
    )


def _place_of(model: Model) -> str:
    return f"that of {model.source}" if model.tool else f"the folder {model.source}"


def _outside(path: Path, role: FileRole) -> ManifestFile:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise NotFoundError(f"{path}: is gone") from error
    return ManifestFile(
        role=role,
        name=path.name,
        size_bytes=size,
        digest=digest_of(path) or "",
        path=str(path),
    )


def _is_projector(path: Path, name: str) -> bool:
    try:
        describe_model(read_files([path]))
    except NotAModelError as error:
        if not error.is_projector:
            raise
        return True
    except GgufError:
        # A shard alone is no whole model; what else is wrong is found with all of them.
        if parse_shard(Path(name).stem) is None:
            raise
    return False


def _shard_index(file: ManifestFile) -> int:
    shard = parse_shard(Path(file.name).stem)
    return shard[1] if shard is not None else 0


async def _check_aliases(services: Services, model: Model, aliases: Sequence[str]) -> None:
    names = {parse_model_name(alias): alias for alias in aliases}
    for other in await services.registry.models():
        if other.name in names and other.name != model.name:
            raise UserError(f'"{names[other.name]}" is the name of a model; it can\'t be an alias')
