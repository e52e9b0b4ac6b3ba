"""What is found in folders: models, shards together, and nothing twice."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shimpy.registry import discovery
from shimpy.registry.discovery import scan_folders


def _touch(path: Path, content: str = "x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def _found(*folders: Path) -> list[str]:
    return [str(model.path.relative_to(folders[0])) for model in scan_folders(folders).models]


def test_sub_folders_are_searched_in_a_fixed_order(tmp_path: Path) -> None:
    for name in ("b.gguf", "a.GGUF", "org/repo/c.gguf", "org/a.gguf", "note.txt", "x.gguf.json"):
        _touch(tmp_path / name)
    assert _found(tmp_path) == ["a.GGUF", "b.gguf", "org/a.gguf", "org/repo/c.gguf"]


@pytest.mark.parametrize(
    "name", [".hidden.gguf", ".cache/m.gguf", "m.gguf.part", "m.gguf.incomplete"]
)
def test_hidden_and_partial_files_are_passed_over(name: str, tmp_path: Path) -> None:
    _touch(tmp_path / name)
    assert _found(tmp_path) == []


def test_file_beside_its_download_state_is_partial(tmp_path: Path) -> None:
    """aria2 reserves the whole file at once: its size says nothing."""
    _touch(tmp_path / "m.gguf")
    _touch(tmp_path / "m.gguf.aria2")
    _touch(tmp_path / "other.gguf")
    partial, whole = scan_folders([tmp_path]).models
    assert partial.problem is not None
    assert "m.gguf.aria2" in partial.problem
    assert whole.problem is None


def test_shards_are_one_model(tmp_path: Path) -> None:
    for i in (2, 1, 3):
        _touch(tmp_path / f"m-Q8_0-0000{i}-of-00003.gguf", "x" * i)
    _touch(tmp_path / "m-Q8_0.gguf")
    _touch(tmp_path / "m-Q8_0-00001-of-00002.gguf")
    models = {tuple(f.path.name for f in m.files) for m in scan_folders([tmp_path]).models}
    assert models == {
        ("m-Q8_0-00001-of-00002.gguf",),
        tuple(f"m-Q8_0-0000{i}-of-00003.gguf" for i in (1, 2, 3)),
        ("m-Q8_0.gguf",),
    }


def test_equal_shard_names_in_two_folders_are_two_models(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        _touch(tmp_path / folder / "m-00001-of-00002.gguf")
    assert len(scan_folders([tmp_path]).models) == 2


def test_link_loops_end(tmp_path: Path) -> None:
    _touch(tmp_path / "models/m.gguf")
    (tmp_path / "models/self").symlink_to(tmp_path / "models")
    (tmp_path / "models/up").symlink_to(tmp_path)
    assert _found(tmp_path) == ["models/m.gguf"]


def test_linked_folders_and_files_are_followed(tmp_path: Path) -> None:
    """The Hugging Face cache is made of links to blobs without a suffix."""
    blob = _touch(tmp_path / "blobs/0a1b")
    _touch(tmp_path / "elsewhere/n.gguf")
    top = tmp_path / "snapshot"
    top.mkdir()
    (top / "m.gguf").symlink_to(blob)
    (top / "more").symlink_to(tmp_path / "elsewhere")
    assert _found(top) == ["m.gguf", "more/n.gguf"]


def test_folders_that_overlap_find_nothing_twice(tmp_path: Path) -> None:
    _touch(tmp_path / "sub/m.gguf")
    assert _found(tmp_path, tmp_path / "sub", tmp_path) == ["sub/m.gguf"]


def test_dangling_link_is_told(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").symlink_to(tmp_path / "gone")
    scan = scan_folders([tmp_path])
    assert scan.models == ()
    assert "m.gguf" in scan.problems[0]
    assert "No such file" in scan.problems[0]


def test_missing_folder_is_told_and_not_readable(tmp_path: Path) -> None:
    _touch(tmp_path / "there/m.gguf")
    scan = scan_folders([tmp_path / "gone", tmp_path / "there"])
    assert len(scan.models) == 1
    assert scan.readable == (tmp_path / "there",)
    assert str(tmp_path / "gone") in scan.problems[0]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_folder_is_told(tmp_path: Path) -> None:
    _touch(tmp_path / "closed/m.gguf")
    _touch(tmp_path / "open/m.gguf")
    (tmp_path / "closed").chmod(0)
    scan = scan_folders([tmp_path])
    (tmp_path / "closed").chmod(0o700)
    assert [m.path.parent.name for m in scan.models] == ["open"]
    assert "Permission denied" in scan.problems[0]


def test_unreadable_folder_among_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As above, for root: the error comes from scandir."""
    _touch(tmp_path / "closed/m.gguf")
    _touch(tmp_path / "open/m.gguf")
    scandir = os.scandir

    def refuse(path: Path) -> object:
        if path.name == "closed":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(discovery.os, "scandir", refuse)
    scan = scan_folders([tmp_path])
    assert [m.path.parent.name for m in scan.models] == ["open"]
    assert scan.problems == (f"{tmp_path / 'closed'}: can't be read: Permission denied",)


def test_depth_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery, "MAX_DEPTH", 2)
    _touch(tmp_path / "1/2/m.gguf")
    _touch(tmp_path / "1/2/3/n.gguf")
    scan = scan_folders([tmp_path])
    assert [m.path.name for m in scan.models] == ["m.gguf"]
    assert "2 deep" in scan.problems[0]


def test_entries_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder by mistake, such as /, must not keep the daemon busy for minutes."""
    monkeypatch.setattr(discovery, "MAX_ENTRIES", 10)
    for i in range(20):
        _touch(tmp_path / f"{i}.gguf")
    scan = scan_folders([tmp_path])
    assert scan.models == ()
    assert "more than 10" in scan.problems[0]


def test_name_that_is_no_utf8_is_told(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/m\xff.gguf")).write_text("x")
    scan = scan_folders([tmp_path])
    assert scan.models == ()
    assert r"m\xff.gguf" in scan.problems[0]


def test_single_file_as_a_folder(tmp_path: Path) -> None:
    path = _touch(tmp_path / "m.gguf")
    _touch(tmp_path / "n.gguf")
    assert [m.path for m in scan_folders([path]).models] == [path]


def test_pipe_is_no_model(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.gguf")
    assert scan_folders([tmp_path]).models == ()


def test_stamp_changes_with_each_shard(tmp_path: Path) -> None:
    """The stamp decides whether a header is read again."""
    first = _touch(tmp_path / "m-00001-of-00002.gguf")
    alone = scan_folders([tmp_path]).models[0].stamp
    second = _touch(tmp_path / "m-00002-of-00002.gguf")
    both = scan_folders([tmp_path]).models[0].stamp
    os.utime(second, ns=(0, 5))
    touched = scan_folders([tmp_path]).models[0].stamp
    second.write_text("longer")
    os.utime(second, ns=(0, 5))
    grown = scan_folders([tmp_path]).models[0].stamp
    other = _touch(tmp_path / "new")
    os.utime(other, ns=(first.stat().st_atime_ns, first.stat().st_mtime_ns))
    other.rename(first)
    replaced = scan_folders([tmp_path]).models[0].stamp
    assert len({alone, both, touched, grown, replaced}) == 5
