"""The units: systemd's own tools read them, and each hardening line has its reason."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from shimpy.cli.units import SYSTEM_UNITS, USER_UNITS, find_program, read_unit

FOLDER = Path(__file__).parents[2] / "systemd"
SESSION = Path(__file__).with_name("session.py")
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


def calls_of(group: str, known: dict[str, list[str]]) -> set[str]:
    """The system calls of a group such as @system-service, those of its groups included."""
    found = set()
    for name in known[group]:
        found |= calls_of(name, known) if name.startswith("@") else {name}
    return found


def allowed_calls() -> set[str]:
    """What the unit's SystemCallFilter lines leave, by systemd's own lists."""
    listed = subprocess.run(
        ["systemd-analyze", "--no-pager", "syscall-filter"],
        capture_output=True,
        text=True,
        check=True,
        timeout=50,
    )
    known: dict[str, list[str]] = {}
    group = ""
    for line in listed.stdout.splitlines():
        if line.startswith("@"):
            group = line.strip()
            known[group] = []
        elif line.strip() and not line.strip().startswith("#") and group:
            known[group].append(line.strip())
    allowed: set[str] = set()
    unit = (FOLDER / "shimpy.service").read_text(encoding="utf-8")
    for value in re.findall(r"(?m)^SystemCallFilter=(.*)$", unit):
        names = value.removeprefix("~").split()
        calls = {c for name in names for c in (calls_of(name, known) if name[0] == "@" else {name})}
        allowed = allowed - calls if value.startswith("~") else allowed | calls
    return allowed


@needs_analyze
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="there is no strace")
def test_a_session_needs_no_call_that_is_filtered(tmp_path: Path) -> None:
    """Without a card: what CUDA calls was not traced; its calls get EPERM, not a signal."""
    trace = tmp_path / "trace"
    argv = ["strace", "-f", "-qq", "-o", str(trace), sys.executable, str(SESSION), str(tmp_path)]
    root = str(FOLDER.parent)
    done = subprocess.run(
        argv,
        cwd=root,
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    if done.returncode == 1 and "ptrace" in done.stderr.lower():
        pytest.skip("tracing is not allowed here")
    assert done.returncode == 0, done.stderr
    made = set(re.findall(r"(?m)^\d+ +(\w+)\(", trace.read_text(errors="replace")))
    assert {"socket", "execve", "mmap"} <= made
    # SQLite gives files to their owner when it runs as root, which the service never does.
    as_root = {"fchown"} if os.geteuid() == 0 else set()
    assert made - as_root - allowed_calls() == set()
