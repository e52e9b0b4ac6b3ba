"""What may be asked of the disk without a thread."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil  # type: ignore[import-untyped]
import pytest

from shimpy.registry.mounts import are_local


def mount(monkeypatch: pytest.MonkeyPatch, kinds: dict[Path, str]) -> None:
    found = [SimpleNamespace(mountpoint=str(at), fstype=kind) for at, kind in kinds.items()]
    monkeypatch.setattr(psutil, "disk_partitions", lambda *, all: found)  # noqa: A006


@pytest.mark.parametrize(
    ("kind", "expected"), [("ext4", True), ("APFS", True), ("nfs4", False), ("fuse.sshfs", False)]
)
def test_the_nearest_mount_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str, expected: bool
) -> None:
    mount(monkeypatch, {Path("/"): "cifs", tmp_path.resolve(): kind})
    assert are_local([tmp_path / "sub" / "model.gguf"]) is expected


def test_so_does_where_a_link_leads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    far = tmp_path.resolve() / "far"
    far.mkdir()
    (tmp_path / "link.gguf").symlink_to(far / "model.gguf")
    mount(monkeypatch, {Path("/"): "xfs", far: "nfs"})
    assert not are_local([tmp_path / "link.gguf"])
    assert are_local([tmp_path / "other.gguf"])


def test_what_nobody_tells_of_is_not_local(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mount(monkeypatch, {})
    assert not are_local([tmp_path])
