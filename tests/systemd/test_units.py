"""The units: systemd's own tools read them, and each hardening line has its reason."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from shimpy.cli.units import SYSTEM_UNITS, USER_UNITS, find_program, read_unit

FOLDER = Path(__file__).parents[2] / "systemd"
EXPOSURE_AT_MOST = "30"  # tenths

needs_analyze = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze"
)


def analyze(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-analyze", "--no-pager", *arguments],
        env={**os.environ, "XDG_RUNTIME_DIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )


def install(folder: Path, *names: str) -> list[str]:
    """Write units as `shimpy service install` does, with a program that is there."""
    paths = []
    for name in names:
        path = folder / Path(name).name
        path.write_text(read_unit(name, "/bin/true"), encoding="utf-8")
        paths.append(str(path))
    return paths


@needs_analyze
@pytest.mark.parametrize(
    ("scope", "names"),
    [([], ["shimpy.service", "shimpy.socket"]), (["--user"], ["user/shimpy.service"])],
    ids=["system", "user"],
)
def test_verify_has_nothing_to_say(tmp_path: Path, scope: list[str], names: list[str]) -> None:
    done = analyze(tmp_path, *scope, "verify", *install(tmp_path, *names))
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@needs_analyze
def test_the_exposure_is_at_most_three(tmp_path: Path) -> None:
    (unit,) = install(tmp_path, "shimpy.service")
    done = analyze(tmp_path, "security", "--offline=true", f"--threshold={EXPOSURE_AT_MOST}", unit)
    assert done.returncode == 0, done.stdout


def test_every_hardening_line_has_its_reason() -> None:
    """A comment stands before each group of lines, so that nobody removes one blindly."""
    text = (FOLDER / "shimpy.service").read_text(encoding="utf-8")
    hardening = text.partition("# --- Hardening")[2].partition("[Install]")[0]
    groups = re.split(r"(?m)^(?=# )", hardening)
    settings = [line for line in hardening.splitlines() if re.match(r"\w+=", line)]
    assert len(settings) > 20
    for line in settings:
        group = next(group for group in groups if f"\n{line}\n" in f"\n{group}")
        assert group.startswith("# "), line


def test_the_program_is_the_one_that_installs() -> None:
    program = find_program()
    assert Path(program.split()[0]).is_file()
    assert f"ExecStart={program} serve\n" in read_unit("shimpy.service", program)


def test_all_units_are_installed() -> None:
    there = {str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*") if path.is_file()}
    assert there == {*SYSTEM_UNITS, *USER_UNITS}
