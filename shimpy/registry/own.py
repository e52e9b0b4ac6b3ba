"""shimpy's own models as sources of the registry: those in the store, and the one it comes with."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from shimpy.demo import MODEL_PATH
from shimpy.names import ModelName
from shimpy.registry.discovery import STORE, FoundFile, FoundModel, Scan, found_file
from shimpy.registry.manifest import Manifest, ManifestFile, name_of_file
from shimpy.registry.store import Store

BUILT_IN: Final = "built-in"
DEMO: Final = ModelName("demo")


class StoreModels:
    """The models of the store, by their manifests."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def scan(self) -> Scan:
        """Return all models, those with missing files or damaged manifests as broken."""
        models = [self._found(manifest) for manifest in self._store.manifests()]
        problems = []
        for path, problem in self._store.damaged.items():
            name = name_of_file(path)
            if path.is_relative_to(self._store.manifest_folder) and path.exists():
                models.append(_broken(path, problem, name))
            else:
                problems.append(problem)
        return Scan(models=tuple(models), readable=(self._store.root,), problems=tuple(problems))

    def _found(self, manifest: Manifest) -> FoundModel:
        shards = [file for file in manifest.files if file.role == "model"]
        projectors = [file for file in manifest.files if file.role == "projector"]
        try:
            files = tuple(self._found_file(file) for file in shards)
        except FileNotFoundError as error:
            problem = f"{error.filename}: is gone; pull or create {manifest.model_name} again"
            return _broken(self._store.path_of_manifest(manifest), problem, manifest.model_name)
        return FoundModel(
            files=files,
            source=STORE,
            tool=STORE,
            name=manifest.model_name,
            settings=manifest.settings,
            is_listed=True,
            projector=self._store.path_of(projectors[0]) if projectors else None,
        )

    def _found_file(self, file: ManifestFile) -> FoundFile:
        path = self._store.path_of(file)
        return found_file(path, path.stat(), digest=file.digest)


class BuiltIn:
    """The model that comes with shimpy, where it does."""

    def __init__(self, path: Path = MODEL_PATH) -> None:
        self._path = path

    def scan(self) -> Scan:
        """Return the demo model; nothing where the package was built without it."""
        try:
            file = found_file(self._path, self._path.stat())
        except OSError:
            return Scan(models=(), readable=(), problems=())
        found = FoundModel(files=(file,), source=BUILT_IN, tool=BUILT_IN, name=DEMO)
        return Scan(models=(found,), readable=(self._path,), problems=())


def _broken(path: Path, problem: str, name: ModelName) -> FoundModel:
    return FoundModel(
        files=(found_file(path, path.stat()),),
        source=STORE,
        tool=STORE,
        name=name,
        is_listed=True,
        problem=problem,
    )
