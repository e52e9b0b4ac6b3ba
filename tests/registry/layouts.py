"""The stores of other tools as they write them, over a given model file."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MEDIA = "application/vnd.ollama.image."
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def put(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def hub_repo(
    hub: Path, repo: str, files: Mapping[str, Path], *, commit: str = COMMIT, main: bool = True
) -> Path:
    """A repository in Hugging Face's cache; files by their path in it."""
    folder = hub / f"models--{repo.replace('/', '--')}"
    if main:
        put(folder / "refs" / "main", commit)
    for path, source in files.items():
        blob = folder / "blobs" / sha256(source.read_bytes())
        if not blob.exists():
            blob.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, blob)
        link = folder / "snapshots" / commit / path
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return folder


def ollama_model(
    root: Path,
    name: str,
    model: Path,
    *,
    projector: Path | None = None,
    layers: Mapping[str, Any] | None = None,
    separator: str = "-",
) -> Path:
    """A model in Ollama's store; `name` is host/namespace/model/tag. Returns its manifest."""

    def blob(data: bytes) -> dict[str, Any]:
        digest = sha256(data)
        put(root / "blobs" / f"sha256{separator}{digest}", data)
        return {"digest": f"sha256:{digest}", "size": len(data)}

    parts: list[tuple[str, bytes]] = [("model", model.read_bytes())]
    if projector is not None:
        parts.append(("projector", projector.read_bytes()))
    for kind, value in (layers or {}).items():
        for item in value if kind == "license" else [value]:
            data = item.encode() if isinstance(item, str) else json.dumps(item).encode()
            parts.append((kind, data))
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
        "config": {"mediaType": "application/vnd.docker.container.image.v1+json"} | blob(b"{}"),
        "layers": [{"mediaType": MEDIA + kind, **blob(data)} for kind, data in parts],
    }
    return put(root / "manifests" / name, json.dumps(manifest))


def llama_cpp_file(cache: Path, org: str, repo: str, name: str, model: Path) -> Path:
    """A file in llama.cpp's own cache, with the note beside it."""
    path = cache / f"{org}_{repo}_{name}"
    put(path, model.read_bytes())
    url = f"https://huggingface.co/{org}/{repo}/resolve/main/{name}"
    put(path.with_name(f"{path.name}.json"), json.dumps({"url": url, "etag": '"x"'}))
    put(cache / f"manifest={org}={repo}=latest.json", "{}")
    return path


def ramalama_model(
    base: Path,
    location: str,
    tag: str,
    files: Mapping[str, tuple[str, bytes]],
) -> Path:
    """A model in RamaLama's store: file names to type and content. Returns its reference."""
    folder = base / "store" / location
    snapshot = "sha256-" + sha256(location.encode())
    entries = []
    for name, (kind, data) in files.items():
        blob = put(folder / "blobs" / f"sha256-{sha256(data)}", data)
        link = folder / "snapshots" / snapshot / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
        entries.append({"hash": blob.name, "name": name, "type": kind})
    path = folder / "refs" / f"{tag}.json"
    ref = {"version": "v1.0.1", "hash": snapshot, "path": str(path), "files": entries}
    return put(path, json.dumps(ref))


def fingerprint(root: Path) -> dict[str, tuple[str, int, int, int]]:
    """All that is below a folder: kind or digest, mode, mtime and size by path."""
    found = {}
    for path in sorted([root, *root.rglob("*")]):
        status = path.lstat()
        if path.is_symlink():
            what = str(path.readlink())
        elif path.is_dir():
            what = "folder"
        else:
            what = sha256(path.read_bytes())
        found[str(path)] = (what, status.st_mode, status.st_mtime_ns, status.st_size)
    return found
