"""llama.cpp's own cache, from before it came to share Hugging Face's.

<cache>/<org>_<repo>_<file>.gguf         the file, folders in its path joined by '_' too
<cache>/<org>_<repo>_<file>.gguf.json    {"url": ..., "etag": ..., "lastModified": ...}
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec
from msgspec.structs import replace

from shimpy.names import ModelName, name_from_stem, name_part
from shimpy.registry.discovery import FoundModel, Scan, scan_folders
from shimpy.registry.tools.reading import UnreadableError, read_json

TOOL: Final = "llama.cpp"
_URL: Final = re.compile(
    r"https?://[^/]+/(?P<org>[^/]+)/(?P<repo>[^/]+)/resolve/[^/]+/(?P<path>[^?#]+)"
)


class _Origin(msgspec.Struct):
    """What llama.cpp notes beside a file."""

    url: str = ""


class LlamaCppCache:
    """The GGUF files in llama.cpp's cache, named by the files that they were downloaded from."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = tuple(folders)

    def scan(self) -> Scan:
        """Return what is in the folders; those that are not there hold nothing."""
        folders = [folder for folder in self._folders if folder.is_dir()]
        # It is flat; folders in it belong to Hugging Face's cache, which may share its place.
        scan = scan_folders(folders, is_flat=True)
        models = tuple(map(_described, scan.models))
        return Scan(models=models, readable=scan.readable, problems=scan.problems)


def _described(model: FoundModel) -> FoundModel:
    name, aliases = _names(model.path)
    return replace(model, source=TOOL, tool=TOOL, name=name, aliases=aliases)


def _names(path: Path) -> tuple[ModelName, tuple[ModelName, ...]]:
    whole = name_from_stem(path.stem)
    try:
        url = read_json(path.with_name(f"{path.name}.json"), _Origin).url
    except UnreadableError:
        url = ""
    match = _URL.fullmatch(url)
    if match is None:
        return whole, ()
    name = name_from_stem(Path(match["path"]).stem)
    address = f"hf.co/{name_part(match['org'])}/{name_part(match['repo'])}"
    return name, (ModelName(address, name.tag), whole)
