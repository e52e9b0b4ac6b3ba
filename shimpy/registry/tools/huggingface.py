"""The cache of huggingface_hub, which llama.cpp and many others share.

<hub>/models--<org>--<repo>/refs/<branch>                  a commit
<hub>/models--<org>--<repo>/snapshots/<commit>/<path>      -> ../../blobs/<etag>
<hub>/models--<org>--<repo>/blobs/<etag>                   sha256 of large files
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from msgspec.structs import replace

from shimpy.names import ModelName, name_from_stem, name_part
from shimpy.registry.discovery import FoundFile, FoundModel, Scan, scan_folders
from shimpy.registry.naming import is_projector_name
from shimpy.registry.tools.reading import UnreadableError, folders_in, modified_s, read_small

TOOL: Final = "huggingface"
_PREFIX: Final = "models--"
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_GGUF_MARK: Final = re.compile(r"[-_.]?gguf$")


class HubCache:
    """The GGUF files in caches of huggingface_hub."""

    def __init__(self, hubs: Sequence[Path]) -> None:
        self._hubs = tuple(hubs)

    def scan(self) -> Scan:
        """Return each repository's models as of its main branch, then what older commits add."""
        models: list[FoundModel] = []
        problems: list[str] = []
        for hub in self._hubs:
            try:
                for repo in folders_in(hub):
                    if repo.name.startswith(_PREFIX):
                        found, trouble = _scan_repo(repo)
                        models += found
                        problems += trouble
            except UnreadableError as error:
                problems.append(str(error))
        return Scan(models=tuple(models), readable=self._hubs, problems=tuple(problems))


def _scan_repo(repo: Path) -> tuple[list[FoundModel], list[str]]:
    by_path: dict[str, FoundModel] = {}
    problems: list[str] = []
    for snapshot in _snapshots(repo):
        scan = scan_folders([snapshot])
        problems += scan.problems
        for model in scan.models:
            by_path.setdefault(str(model.path.relative_to(snapshot)), model)
    names = _names(repo, [model.path for model in by_path.values()])
    return [_described(model, *names[model.path]) for model in by_path.values()], problems


def _snapshots(repo: Path) -> list[Path]:
    """Return a repository's snapshots, main's first, then the newest."""
    found = folders_in(repo / "snapshots")
    try:
        main = read_small(repo / "refs" / "main").decode(errors="replace").strip()
    except UnreadableError:
        main = ""
    return sorted(found, key=lambda path: (path.name != main, -modified_s(path)))


def _names(repo: Path, paths: Sequence[Path]) -> dict[Path, tuple[ModelName, list[ModelName]]]:
    """Return for each file its name, and what else its users call it.

    It is named by the repository and its quantization; where the repository holds several
    models of one quantization, by its file's name.
    """
    location = repo.name.removeprefix(_PREFIX).replace("--", "/")
    org, _, title = location.rpartition("/")
    base = _GGUF_MARK.sub("", name_part(title)) or name_part(title)
    tags = {path: name_from_stem(path.stem).tag for path in paths}
    n_models = Counter(tag for path, tag in tags.items() if not is_projector_name(path))
    address = "/".join(["hf.co", *([name_part(org)] if org else []), name_part(title)])
    names: dict[Path, tuple[ModelName, list[ModelName]]] = {}
    for path, tag in tags.items():
        plain = name_from_stem(path.stem)
        if n_models[tag] > 1:
            names[path] = (plain, [])
        else:
            names[path] = (ModelName(base, tag), [ModelName(address, tag), plain])
    return names


def _described(model: FoundModel, name: ModelName, aliases: list[ModelName]) -> FoundModel:
    return replace(
        model,
        files=tuple(_with_digest(file) for file in model.files),
        source=TOOL,
        tool=TOOL,
        name=name,
        aliases=tuple(alias for alias in dict.fromkeys(aliases) if alias != name),
    )


def _with_digest(file: FoundFile) -> FoundFile:
    blob = file.path.resolve().name
    return replace(file, digest=f"sha256:{blob}") if _SHA256.fullmatch(blob) else file
