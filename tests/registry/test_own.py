"""shimpy's own models among the others: the built-in one, and the store's."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from shimpy.errors import GgufError
from shimpy.names import ModelName
from shimpy.registry.manifest import Manifest, ManifestFile
from shimpy.registry.own import BuiltIn, StoreModels
from shimpy.registry.registry import Registry
from shimpy.registry.settings import ModelSettings
from shimpy.registry.store import Store
from tests.gguf.build import Gguf, llama, small_model
from tests.registry.storing import digest_of, put_blob


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "store") as owned:
        yield owned


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "models"
    path.mkdir()
    return path


def _registry(store: Store, folder: Path, demo: Path) -> Registry:
    registry = Registry(
        [folder],
        index_path=folder.parent / "index.sqlite",
        before=[BuiltIn(demo), StoreModels(store)],
        settings=store.settings,
        defaults=lambda _name: ModelSettings(system="default", license="MIT"),
    )
    registry.refresh()
    return registry


def _install(store: Store, source: Path, name: str, **settings: str) -> None:
    data = source.read_bytes()
    put_blob(store, data)
    file = ManifestFile(name=source.name, size_bytes=len(data), digest=digest_of(data))
    store.put_manifest(Manifest(name=name, files=(file,), settings=ModelSettings(**settings)))


def test_the_demo_keeps_its_name_whatever_the_folders_hold(
    store: Store, folder: Path, tmp_path: Path
) -> None:
    demo = small_model(tmp_path / "built-in.gguf", **{"general.name": "ours"})
    small_model(folder / "demo.gguf", **{"general.name": "theirs"})
    registry = _registry(store, folder, demo)
    assert [str(m.name) for m in registry.models()] == ["demo:latest", "models/demo:latest"]
    assert (registry.resolve("demo").path, registry.resolve("demo").source) == (demo, "built-in")


def test_a_package_without_the_demo_lists_none(store: Store, folder: Path, tmp_path: Path) -> None:
    registry = _registry(store, folder, tmp_path / "nowhere.gguf")
    assert registry.models() == ()
    assert registry.problems == ()


def test_the_stores_names_go_before_the_folders(store: Store, folder: Path, tmp_path: Path) -> None:
    _install(store, small_model(tmp_path / "x.gguf", **{"general.name": "x"}), "m")
    small_model(folder / "m.gguf")
    registry = _registry(store, folder, tmp_path / "nowhere")
    assert [(str(m.name), m.source) for m in registry.models()] == [
        ("m:latest", "store"),
        ("models/m:latest", str(folder)),
    ]


def test_settings_come_in_layers(store: Store, folder: Path, tmp_path: Path) -> None:
    _install(store, small_model(tmp_path / "x.gguf"), "m", notes="came with it", license="Apache")
    store.put_settings(ModelName("m"), ModelSettings(notes="mine"))
    (model,) = _registry(store, folder, tmp_path / "nowhere").models()
    assert model.settings == ModelSettings(notes="mine", license="Apache", system="default")


def test_shards_are_found_by_the_manifest_whatever_their_names(
    store: Store, folder: Path, tmp_path: Path
) -> None:
    files = []
    for i in range(2):
        metadata = {"split.no": i, "split.count": 2} | (llama() if i == 0 else {})
        gguf = Gguf(metadata=metadata, tensors=[(f"blk.{i}.attn_q.weight", (64, 64), "F16")])
        data = gguf.write(tmp_path / f"{i}.gguf").read_bytes()
        put_blob(store, data)
        files.append(ManifestFile(name="x", size_bytes=len(data), digest=digest_of(data)))
    store.put_manifest(Manifest(name="m", files=tuple(files)))
    (model,) = _registry(store, folder, tmp_path / "nowhere").models()
    assert model.shape is not None
    assert len(model.files) == 2
    store.put_manifest(Manifest(name="m", files=tuple(reversed(files))))
    registry = _registry(store, folder, tmp_path / "nowhere")
    with pytest.raises(GgufError, match="is shard 2 inside, 1 by name"):
        registry.resolve("m")


def test_a_model_whose_blob_is_gone_is_broken(store: Store, folder: Path, tmp_path: Path) -> None:
    _install(store, small_model(tmp_path / "x.gguf"), "m")
    shutil.rmtree(store.blobs.folder)
    registry = _registry(store, folder, tmp_path / "nowhere")
    with pytest.raises(GgufError, match="is gone; pull or create m:latest again"):
        registry.resolve("m")


def test_a_name_in_the_store_for_a_file_in_a_folder_hides_neither(
    store: Store, folder: Path, tmp_path: Path
) -> None:
    path = small_model(folder / "m.gguf")
    file = ManifestFile(name="m.gguf", size_bytes=path.stat().st_size, path=str(path))
    store.put_manifest(Manifest(name="second", files=(file,)))
    registry = _registry(store, folder, tmp_path / "nowhere")
    assert [str(m.name) for m in registry.models()] == ["m:latest", "second:latest"]
    assert registry.resolve("m").path == registry.resolve("second").path == path
