"""LM Studio's models: <models>/<publisher>/<model>/<file>.gguf, as on Hugging Face."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from msgspec.structs import replace

from shimpy.names import ModelName, name_from_stem, name_part
from shimpy.registry.discovery import FoundModel, Scan, scan_folders

TOOL: Final = "lmstudio"


class LmStudioModels:
    """The GGUF files in LM Studio's folders, named by their files' names."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = tuple(folders)

    def scan(self) -> Scan:
        """Return what is in the folders; those that are not there hold nothing."""
        scan = scan_folders([folder for folder in self._folders if folder.is_dir()])
        models = tuple(self._described(model) for model in scan.models)
        return Scan(models=models, readable=scan.readable, problems=scan.problems)

    def _described(self, model: FoundModel) -> FoundModel:
        name = name_from_stem(model.path.stem)
        # Its own name for a model: publisher/model.
        folders = model.path.relative_to(model.source).parts[:-1]
        alias = ModelName("/".join(map(name_part, folders[-2:])), name.tag) if folders else name
        return replace(
            model,
            source=TOOL,
            tool=TOOL,
            name=name,
            aliases=(alias,) if alias != name else (),
        )
