"""The registry over real folders: what appears, changes, breaks and vanishes."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from shimpy.errors import GgufError, InvalidNameError, NotFoundError
from shimpy.gguf.header import Header
from shimpy.gguf.reader import read_header
from shimpy.registry import index, registry
from shimpy.registry.registry import Registry
from tests.gguf.build import Gguf, dense_tensors, llama, small_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "models"
    path.mkdir()
    return path


@pytest.fixture
def index_path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "index.sqlite"


@pytest.fixture
def read_paths(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the files whose headers are read, as they are."""
    paths: list[str] = []

    def read(path: Path) -> Header:
        paths.append(path.name)
        return read_header(path)

    monkeypatch.setattr(registry, "read_header", read)
    return paths


def _registry(folder: Path, index_path: Path) -> Registry:
    models = Registry([folder], index_path=index_path)
    models.refresh()
    return models


def _listed(models: Registry) -> list[str]:
    return [str(model.name) for model in models.models()]


# --- listing ---------------------------------------------------------------------------------


def test_nothing_is_known_before_the_first_scan(folder: Path, index_path: Path) -> None:
    small_model(folder / "m.gguf")
    assert Registry([folder], index_path=index_path).models() == ()


def test_models_are_listed_by_name_with_their_facts(folder: Path, index_path: Path) -> None:
    path = small_model(folder / "b-Q8_0.gguf", **{"general.file_type": 7})
    small_model(folder / "a.gguf")
    models = _registry(folder, index_path)
    assert _listed(models) == ["a:latest", "b:q8_0"]
    model = models.models()[1]
    assert model.path == path
    assert model.shape is not None
    assert (model.shape.arch, model.shape.quantization) == ("llama", "Q8_0")
    assert model.size_bytes == path.stat().st_size
    assert model.modified_s == path.stat().st_mtime
    assert model.source == str(folder)
    assert model.error is None
    assert models.problems == ()


def test_digest_changes_with_header_and_size_alone(folder: Path, index_path: Path) -> None:
    small_model(folder / "a.gguf")
    small_model(folder / "b.gguf")
    small_model(folder / "c.gguf", **{"general.name": "C"})
    longer = small_model(folder / "d.gguf")
    os.truncate(longer, longer.stat().st_size + 32)
    digests = [model.digest for model in _registry(folder, index_path).models()]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3
    assert all(len(digest) == 64 for digest in digests)


def test_broken_file_is_listed_with_its_reason(folder: Path, index_path: Path) -> None:
    """It takes nothing else down."""
    (folder / "page.gguf").write_text("<!DOCTYPE html>")
    small_model(folder / "whole.gguf")
    models = _registry(folder, index_path)
    broken, whole = models.models()
    assert (str(broken.name), broken.shape) == ("page:latest", None)
    assert broken.error is not None
    assert "web page" in broken.error
    assert whole.error is None
    with pytest.raises(GgufError, match="web page"):
        models.resolve("page")
    assert models.resolve("whole") is whole


def test_split_model_is_one(folder: Path, index_path: Path) -> None:
    for i in range(2):
        metadata = {"split.no": i, "split.count": 2} | (llama() if i == 0 else {})
        Gguf(metadata=metadata, tensors=[(f"blk.{i}.attn_q.weight", (64, 64), "F16")]).write(
            folder / f"m-Q8_0-0000{i + 1}-of-00002.gguf"
        )
    (model,) = _registry(folder, index_path).models()
    assert str(model.name) == "m:q8_0"
    assert [path.name for path in model.files] == [
        "m-Q8_0-00001-of-00002.gguf",
        "m-Q8_0-00002-of-00002.gguf",
    ]
    assert model.shape is not None
    assert model.size_bytes == model.shape.file_bytes
    (folder / "m-Q8_0-00001-of-00002.gguf").unlink()
    (model,) = _registry(folder, index_path).models()
    assert model.error is not None
    assert "m-Q8_0-00001-of-00002.gguf" in model.error


def _projector(path: Path) -> Path:
    metadata = {"general.architecture": "clip", "general.type": "mmproj"}
    return Gguf(metadata=metadata, tensors=[("v.patch_embd.weight", (64,), "F32")]).write(path)


@pytest.mark.parametrize("name", ["mmproj-f16.gguf", "vision.gguf"])
def test_projector_belongs_to_the_model_beside_it(
    name: str, folder: Path, index_path: Path
) -> None:
    """By its content: not all of them say mmproj in their names."""
    projector = _projector(folder / name)
    small_model(folder / "m-Q8_0.gguf")
    small_model(folder / "m-f16.gguf")
    models = _registry(folder, index_path).models()
    assert [(str(m.name), m.projector) for m in models] == [
        ("m:f16", projector),
        ("m:q8_0", projector),
    ]


def test_adapter_is_no_model(folder: Path, index_path: Path) -> None:
    Gguf(
        metadata=llama() | {"general.type": "adapter"},
        tensors=[("blk.0.attn_q.weight.lora_a", (64, 8), "F32")],
    ).write(folder / "lora.gguf")
    assert _registry(folder, index_path).models() == ()


def test_broken_projector_is_told(folder: Path, index_path: Path) -> None:
    (folder / "mmproj-f16.gguf").write_text("x")
    models = _registry(folder, index_path)
    assert models.models() == ()
    assert "mmproj-f16.gguf" in models.problems[0]


def test_no_model_vanishes_behind_its_namesake(folder: Path, index_path: Path) -> None:
    (folder / "a").mkdir()
    (folder / "b").mkdir()
    small_model(folder / "a/m.gguf")
    small_model(folder / "b/m.gguf", **{"general.name": "other"})
    models = _registry(folder, index_path)
    assert _listed(models) == ["b/m:latest", "m:latest"]
    assert models.resolve("b/m").path == folder / "b/m.gguf"
    assert "b/m:latest" in models.problems[0]


# --- changes ---------------------------------------------------------------------------------


def test_new_changed_and_vanished_files_are_noticed(
    folder: Path, index_path: Path, read_paths: list[str]
) -> None:
    small_model(folder / "a.gguf")
    small_model(folder / "b.gguf")
    models = _registry(folder, index_path)
    small_model(folder / "c.gguf")
    small_model(folder / "b.gguf", **{"general.name": "New"})
    (folder / "a.gguf").unlink()
    read_paths.clear()
    models.refresh()
    assert _listed(models) == ["b:latest", "c:latest"]
    assert models.models()[0].shape is not None
    assert models.models()[0].shape.title == "New"
    assert sorted(read_paths) == ["b.gguf", "c.gguf"]


def test_nothing_is_read_when_nothing_changed(
    folder: Path, index_path: Path, read_paths: list[str]
) -> None:
    small_model(folder / "m.gguf")
    (folder / "broken.gguf").write_text("<html>")
    models = _registry(folder, index_path)
    assert sorted(read_paths) == ["broken.gguf", "m.gguf"]
    before = models.models()
    models.refresh()
    assert len(read_paths) == 2
    assert models.models() == before


def test_file_that_is_being_copied_becomes_a_model_once_whole(
    folder: Path, index_path: Path
) -> None:
    whole = Gguf(metadata=llama(), tensors=dense_tensors())
    content = whole.header() + bytes(whole.size() - len(whole.header()))
    path = folder / "m.gguf"
    models = _registry(folder, index_path)
    reasons = []
    for length in (0, 10, 100, len(whole.header()) - 1, len(whole.header()) + 100):
        path.write_bytes(content[:length])
        models.refresh()
        reasons.append(models.models()[0].error)
    path.write_bytes(content)
    models.refresh()
    assert all(reasons)
    assert models.resolve("m").error is None


def test_file_that_replaces_another_unnoticeably_by_size_and_time(
    folder: Path, index_path: Path
) -> None:
    """A rename over it keeps neither the inode nor, here, the content."""
    path = small_model(folder / "m.gguf", **{"general.name": "old"})
    models = _registry(folder, index_path)
    status = path.stat()
    new = small_model(folder / "new", **{"general.name": "new"})
    os.utime(new, ns=(status.st_atime_ns, status.st_mtime_ns))
    new.rename(path)
    assert path.stat().st_size == status.st_size
    models.refresh()
    shape = models.resolve("m").shape
    assert shape is not None
    assert shape.title == "new"


def test_unreadable_file_is_tried_again(
    folder: Path, index_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """chmod changes neither size nor mtime."""
    small_model(folder / "m.gguf")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", _refuse)
        models = _registry(folder, index_path)
        assert models.models()[0].error is not None
    models.refresh()
    assert models.resolve("m").error is None


def _refuse(path: Path, *_: object) -> None:
    raise PermissionError(13, "Permission denied", str(path))


def test_download_that_is_marked_is_broken_until_the_mark_goes(
    folder: Path, index_path: Path
) -> None:
    small_model(folder / "m.gguf")
    mark = folder / "m.gguf.aria2"
    mark.touch()
    models = _registry(folder, index_path)
    assert "still being downloaded" in (models.models()[0].error or "")
    mark.unlink()
    models.refresh()
    assert models.models()[0].error is None


def test_folder_that_is_missing_is_told_and_found_later(tmp_path: Path, index_path: Path) -> None:
    models = _registry(tmp_path / "later", index_path)
    assert str(tmp_path / "later") in models.problems[0]
    (tmp_path / "later").mkdir()
    small_model(tmp_path / "later/m.gguf")
    models.refresh()
    assert _listed(models) == ["m:latest"]
    assert models.problems == ()


# --- the index -------------------------------------------------------------------------------


def test_restart_opens_no_known_file(folder: Path, index_path: Path, read_paths: list[str]) -> None:
    """All that a listing shows comes out of the index: shapes, errors, projectors, parts."""
    small_model(folder / "m.gguf", **{"tokenizer.chat_template": "{{ x }}"})
    (folder / "page.gguf").write_text("<html>")
    _projector(folder / "mmproj.gguf")
    before = _registry(folder, index_path).models()
    read_paths.clear()
    assert _registry(folder, index_path).models() == before
    assert read_paths == []


@pytest.mark.slow
def test_500_known_models_are_listed_without_opening_one(
    folder: Path, index_path: Path, read_paths: list[str]
) -> None:
    header = Gguf(metadata=llama(48), tensors=dense_tensors(48))
    for i in range(500):
        header.write(folder / f"model{i}-Q8_0.gguf")
    before = _registry(folder, index_path).models()
    read_paths.clear()
    assert _registry(folder, index_path).models() == before
    assert len(before) == 500
    assert read_paths == []


@pytest.mark.parametrize(
    "damage", [b"", b"no database at all" * 100, None], ids=["empty", "noise", "overwritten"]
)
def test_damaged_index_is_made_anew(
    damage: bytes | None, folder: Path, index_path: Path, read_paths: list[str]
) -> None:
    small_model(folder / "m.gguf")
    before = _registry(folder, index_path).models()
    content = index_path.read_bytes()
    index_path.write_bytes(
        content[:100] + b"\xff" * (len(content) - 100) if damage is None else damage
    )
    read_paths.clear()
    models = _registry(folder, index_path)
    assert models.models() == before
    assert read_paths == ["m.gguf"]
    models.refresh()
    read_paths.clear()
    assert _registry(folder, index_path).models() == before
    assert read_paths == []


def test_record_that_does_not_decode_is_read_again(
    folder: Path, index_path: Path, read_paths: list[str]
) -> None:
    small_model(folder / "m.gguf")
    before = _registry(folder, index_path).models()
    with closing(sqlite3.connect(index_path)) as database, database:
        database.execute("UPDATE headers SET record = ?", (b"\x93\x01",))
    read_paths.clear()
    assert _registry(folder, index_path).models() == before
    assert read_paths == ["m.gguf"]


def test_index_of_another_version_is_made_anew(
    folder: Path, index_path: Path, read_paths: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small_model(folder / "m.gguf")
    _registry(folder, index_path)
    monkeypatch.setattr(index, "_SCHEMA_VERSION", index._SCHEMA_VERSION ^ 1)
    read_paths.clear()
    _registry(folder, index_path)
    _registry(folder, index_path)
    assert read_paths == ["m.gguf"]


def test_registry_works_without_an_index(folder: Path, tmp_path: Path) -> None:
    """A read-only or full disk costs speed, not models."""
    small_model(folder / "m.gguf")
    (tmp_path / "file").touch()
    models = _registry(folder, tmp_path / "file" / "index.sqlite")
    assert _listed(models) == ["m:latest"]
    assert "index" in models.problems[0]


def test_index_that_goes_out_of_reach_later(folder: Path, index_path: Path) -> None:
    small_model(folder / "a.gguf")
    models = _registry(folder, index_path)
    index_path.unlink()
    index_path.parent.rmdir()
    index_path.parent.touch()
    small_model(folder / "b.gguf")
    models.refresh()
    assert _listed(models) == ["a:latest", "b:latest"]
    assert str(index_path) in models.problems[0]


def test_locked_index_is_written_later(
    folder: Path, index_path: Path, monkeypatch: pytest.MonkeyPatch, read_paths: list[str]
) -> None:
    """Another daemon may hold it; it is not thrown away for that."""
    monkeypatch.setattr(index, "_BUSY_TIMEOUT_S", 0.0)
    small_model(folder / "a.gguf")
    models = _registry(folder, index_path)
    small_model(folder / "b.gguf")
    with closing(sqlite3.connect(index_path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        models.refresh()
        assert _listed(models) == ["a:latest", "b:latest"]
        assert "locked" in models.problems[0]
        other.execute("ROLLBACK")
    models.refresh()
    assert models.problems == ()
    read_paths.clear()
    assert len(_registry(folder, index_path).models()) == 2
    assert read_paths == []


def test_index_forgets_what_is_gone_but_not_what_is_elsewhere(
    folder: Path, tmp_path: Path, index_path: Path, read_paths: list[str]
) -> None:
    """A disk that is not mounted today is not read anew tomorrow."""
    away = tmp_path / "away"
    away.mkdir()
    small_model(folder / "gone.gguf")
    small_model(away / "kept.gguf")
    Registry([folder, away], index_path=index_path).refresh()
    (folder / "gone.gguf").unlink()
    away.rename(tmp_path / "unmounted")
    Registry([folder, away], index_path=index_path).refresh()
    with closing(sqlite3.connect(index_path)) as database:
        rows = database.execute("SELECT path FROM headers").fetchall()
    assert rows == [(str(away / "kept.gguf"),)]


# --- resolving -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "text", "name"),
    [
        (["m.gguf"], "m", "m.gguf"),
        (["m.gguf"], "m:latest", "m.gguf"),
        (["m-f16.gguf"], "m", "m-f16.gguf"),
        (["m-f16.gguf"], "M:F16", "m-f16.gguf"),
        (["m-f16.gguf"], "m:latest", "m-f16.gguf"),
        (["m-f16.gguf", "m.gguf"], "m", "m.gguf"),
        (["m-f16.gguf", "m-q8_0.gguf"], "m:q8_0", "m-q8_0.gguf"),
    ],
)
def test_name_resolves(
    files: list[str], text: str, name: str, folder: Path, index_path: Path
) -> None:
    for file in files:
        small_model(folder / file)
    assert _registry(folder, index_path).resolve(text).path.name == name


def test_name_of_several_tags_lists_them(folder: Path, index_path: Path) -> None:
    small_model(folder / "m-f16.gguf")
    small_model(folder / "m-Q8_0.gguf")
    with pytest.raises(NotFoundError, match=r"2 models.*m:f16, m:q8_0"):
        _registry(folder, index_path).resolve("m")


def test_broken_namesake_does_not_make_a_name_ambiguous(folder: Path, index_path: Path) -> None:
    small_model(folder / "m-f16.gguf")
    (folder / "m-Q8_0.gguf").write_text("")
    assert _registry(folder, index_path).resolve("m").path.name == "m-f16.gguf"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("deepseek-moe-16b:q8_0", "of that name there is deepseek-moe-16b:q4_k_m"),
        ("deepsek-moe-16b", "did you mean deepseek-moe-16b"),
        ("moe", "did you mean deepseek-moe-16b"),
        ("qqq", "searched folders"),
    ],
)
def test_missing_model_names_what_is_near(
    text: str, words: str, folder: Path, index_path: Path
) -> None:
    small_model(folder / "deepseek-moe-16b-Q4_K_M.gguf")
    with pytest.raises(NotFoundError, match=words):
        _registry(folder, index_path).resolve(text)


def test_path_is_no_name(folder: Path, index_path: Path) -> None:
    """A request must not make the daemon open files of its choice."""
    path = small_model(folder / "m.gguf")
    models = _registry(folder, index_path)
    with pytest.raises(InvalidNameError):
        models.resolve(str(path))
    for text in ("m.gguf", "models/m"):
        with pytest.raises(NotFoundError):
            models.resolve(text)
