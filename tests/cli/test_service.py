"""`shimpy service`, with systemd's tools played by a script that writes down its calls."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from shimpy.cli import units
from shimpy.cli.service import command
from shimpy.errors import UserError


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the calls of systemctl and its like are written down."""
    written = tmp_path / "calls"
    written.touch()
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("systemctl", "systemd-sysusers", "systemd-tmpfiles"):
        tool = tools / name
        tool.write_text(f'#!/bin/sh\necho "{name} $*" >> "{written}"\n')
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    below = {name: tmp_path / "root" / path.relative_to("/") for name, path in SYSTEM.items()}
    monkeypatch.setattr(units, "SYSTEM_UNITS", below)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    return written


SYSTEM = dict(units.SYSTEM_UNITS)


def service(*args: str) -> None:
    CliRunner().invoke(command, args, catch_exceptions=False, standalone_mode=False)


def test_install_writes_every_unit_and_starts_the_service(calls: Path, tmp_path: Path) -> None:
    service("install")
    for path in SYSTEM.values():
        assert (tmp_path / "root" / path.relative_to("/")).is_file()
    assert calls.read_text().splitlines() == [
        "systemctl is-system-running",
        "systemd-sysusers /etc/sysusers.d/shimpy.conf",
        "systemd-tmpfiles --create /etc/tmpfiles.d/shimpy.conf",
        "systemctl daemon-reload",
        "systemctl enable --now shimpy.service",
    ]


def test_install_for_a_user_touches_nothing_of_the_system(calls: Path, tmp_path: Path) -> None:
    service("install", "--user")
    assert (tmp_path / "home/.config/systemd/user/shimpy.service").is_file()
    assert not (tmp_path / "root").exists()
    assert calls.read_text().splitlines() == [
        "systemctl --user is-system-running",
        "systemctl --user daemon-reload",
        "systemctl --user enable --now shimpy.service",
    ]


def test_with_a_socket_the_socket_is_what_starts(calls: Path) -> None:
    service("install", "--socket")
    assert calls.read_text().splitlines()[-1] == "systemctl enable --now shimpy.socket"


def test_uninstall_removes_what_install_wrote(calls: Path, tmp_path: Path) -> None:
    service("install", "--no-start")
    service("uninstall")
    assert not [path for path in (tmp_path / "root").rglob("*") if path.is_file()]
    assert "systemctl disable --now shimpy.service shimpy.socket" in calls.read_text()


@pytest.mark.parametrize("flags", [(), ("--user",)], ids=str)
def test_where_systemd_does_not_run_only_files_are_put_in_place(
    calls: Path, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    """In an image that is built, or a container."""
    systemctl = tmp_path / "bin" / "systemctl"
    systemctl.write_text(systemctl.read_text() + "echo offline\nexit 1\n")
    with pytest.raises(UserError, match="systemd does not run here"):
        service("install", *flags)
    assert not [*tmp_path.rglob("shimpy.service")]
    service("install", "--no-start", *flags)
    assert [*tmp_path.rglob("shimpy.service")]
    service("uninstall", *flags)
    assert not [*tmp_path.rglob("shimpy.service")]
    assert "daemon-reload" not in calls.read_text()


def test_the_system_s_service_is_root_s(calls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(UserError, match="use sudo, or --user"):
        service("install")
    assert calls.read_text() == ""


def test_a_machine_without_systemd_says_so(
    calls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="does not run systemd"):
        service("status")
