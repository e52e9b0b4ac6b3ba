"""Other tools' stores as sources of models: read where they lie, never written to.

Each module knows one tool's layout on disk and nothing else; where a tool keeps its models on
this machine is found by `config.tool_folders`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from shimpy.registry.discovery import Source
from shimpy.registry.tools.huggingface import HubCache
from shimpy.registry.tools.llama_cpp import LlamaCppCache
from shimpy.registry.tools.lmstudio import LmStudioModels
from shimpy.registry.tools.ollama import OllamaStore
from shimpy.registry.tools.ramalama import RamaLamaStore
from shimpy.values import Tool

__all__ = ["tool_sources"]

_SOURCES: dict[Tool, Callable[[Sequence[Path]], Source]] = {
    "huggingface": HubCache,
    "ollama": OllamaStore,
    "lmstudio": LmStudioModels,
    "llama.cpp": LlamaCppCache,
    "ramalama": RamaLamaStore,
}


def tool_sources(folders: Mapping[Tool, Sequence[Path]]) -> list[Source]:
    """Return a source for each tool, over the folders in which it keeps its models."""
    return [_SOURCES[tool](paths) for tool, paths in folders.items()]
