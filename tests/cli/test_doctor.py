"""`shimpy doctor`: it sees what is wrong with the eyes of the daemon's user, and mends it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from shimpy.cli import checks
from shimpy.cli.checks import check_disk, check_folder, check_hub, check_port, check_writable
from shimpy.config import Config
from tests.daemon import shimpy

NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")


def test_a_folder_that_is_not_there_is_a_warning(tmp_path: Path) -> None:
    finding = check_folder(tmp_path / "none", "shimpy")
    assert (finding.verdict, finding.remedy) == ("warning", f"mkdir -p '{tmp_path / 'none'}'")


def test_a_folder_that_can_be_read_is_fine(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").touch()
    assert check_folder(tmp_path, "shimpy").verdict == "ok"


@needs_root
@pytest.mark.slow
@pytest.mark.parametrize(
    ("closed", "mode", "remedy"),
    [
        ("home", 0o700, "sudo setfacl -m u:nobody:x '{root}/home'"),
        ("home/models", 0o711, "sudo setfacl -R -m u:nobody:rX '{root}/home/models'"),
        ("home/models/a.gguf", 0o600, "sudo setfacl -R -m u:nobody:rX '{root}/home/models'"),
    ],
    ids=["above", "folder", "file"],
)
def test_a_closed_folder_is_found_as_its_user(
    tmp_path: Path, closed: str, mode: int, remedy: str
) -> None:
    """Most complaints about such daemons are a folder under /home that their user can't read."""
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    models = tmp_path / "home" / "models"
    models.mkdir(parents=True)
    (models / "a.gguf").touch()
    (tmp_path / closed).chmod(mode)
    script = (
        "import sys, os, json; from pathlib import Path; from msgspec.structs import asdict\n"
        "from shimpy.cli.checks import check_folder\n"
        f"os.setgid({NOBODY}); os.setuid({NOBODY})\n"
        f"print(json.dumps(asdict(check_folder(Path({str(models)!r}), 'nobody'))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=50
    )
    finding = json.loads(done.stdout)
    assert finding["verdict"] == "failed"
    assert finding["remedy"] == remedy.format(root=tmp_path)


def test_own_folders_are_tried_by_writing(tmp_path: Path) -> None:
    assert check_writable(tmp_path / "state", "shimpy").verdict == "ok"
    assert not list((tmp_path / "state").iterdir())
    (tmp_path / "file").touch()
    finding = check_writable(tmp_path / "file", "shimpy")
    assert finding.verdict == "failed"
    assert "chown -R shimpy:" in finding.remedy


def test_little_disk_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_disk(tmp_path / "not" / "there").detail.endswith(str(tmp_path))
    monkeypatch.setattr(checks, "_LITTLE_DISK", 1 << 60)
    assert check_disk(tmp_path).verdict == "warning"


def test_an_address_that_is_taken_or_not_ours_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_ANSWER_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as other:
        bind = f"127.0.0.1:{other.getsockname()[1]}"
        assert check_port(bind).verdict == "warning"
    assert check_port(bind).verdict == "ok"
    assert check_port("192.0.2.1:80").verdict == "failed"


def test_the_hub_is_left_alone_when_offline() -> None:
    finding = check_hub(Config(offline=True))
    assert (finding.verdict, finding.detail) == ("ok", "not asked: offline is set")


@pytest.mark.slow
def test_the_command_ends_with_1_when_something_failed(tmp_path: Path) -> None:
    (tmp_path / "data").touch()
    env = {**os.environ, "SHIMPY_HOME": str(tmp_path), "SHIMPY_OFFLINE": "on"}
    done = shimpy("doctor", "--json", "--as", "root", env=env | {"SHIMPY_BIND": "127.0.0.1:0"})
    assert done.returncode == 1, done.stderr
    failed = [f["check"] for f in json.loads(done.stdout) if f["verdict"] == "failed"]
    assert f"own folder {tmp_path / 'data'}" in failed
