"""A real systemd, as PID 1 of namespaces of its own, over a copy-on-write image of this machine.

It needs root, systemd, and a writable cgroup2; where they are missing, tests are skipped.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

BOOT_TIMEOUT_S = 30.0
_SCRIPT = Path(__file__).with_suffix(".sh")
_SYSTEMD = Path("/lib/systemd/systemd")
# Of which a unit with PrivateTmp= has its own.
_PRIVATE = ("/tmp", "/var/tmp")  # noqa: S108 - nothing is written there
_NAMESPACES = ("--pid", "--mount", "--uts", "--ipc", "--cgroup", "--net")


@dataclass(frozen=True, slots=True)
class Machine:
    """A booted machine: the process that is its PID 1."""

    pid: int

    def run(
        self, *argv: str, check: bool = True, timeout: float = 50
    ) -> subprocess.CompletedProcess[str]:
        """Run a command there, as root."""
        enter = ["nsenter", "--all", "--target", str(self.pid)]
        env = {k: v for k, v in os.environ.items() if not k.startswith("SHIMPY_")}
        done = subprocess.run(
            [*enter, *argv], capture_output=True, text=True, timeout=timeout, check=False, env=env
        )
        assert not check or done.returncode == 0, (argv, done.stdout, done.stderr)
        return done

    def show(self, unit: str, name: str) -> str:
        """Return a property of a unit."""
        return self.run("systemctl", "show", "--value", f"--property={name}", unit).stdout.strip()

    def path(self, path: str) -> Path:
        """Return where a file of the machine is to be found from outside."""
        return Path(f"/proc/{self.pid}/root{path}")


def missing() -> str | None:
    """Return why no machine can be booted here; None: one can."""
    if os.geteuid() != 0:
        return "only root boots a systemd"
    if not _SYSTEMD.exists():
        return "there is no systemd"
    if any(Path(sys.executable).is_relative_to(folder) for folder in _PRIVATE):
        return "the unit has a /tmp of its own, without this interpreter"
    if _cgroup_root() is None:
        return "there is no cgroup2"
    tried = subprocess.run(
        ["unshare", "--fork", *_NAMESPACES, "true"], capture_output=True, check=False
    )
    return None if tried.returncode == 0 else "namespaces can't be made here"


@contextlib.contextmanager
def booted(folder: Path) -> Iterator[Machine]:
    """Boot a machine and end it, with all that runs on it; `folder` is /run/host there."""
    root = _cgroup_root()
    assert root is not None, "missing() was asked"
    group = root / f"shimpy-test-{os.getpid()}"
    group.mkdir()
    # In a process group of its own, first: systemd takes the whole of it.
    enter = f'echo $$ >"{group}/cgroup.procs" && exec unshare --fork --kill-child "$@"'
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready,
        (folder / "console").open("wb") as console,
    ):
        ready.bind(str(folder / "notify"))
        ready.settimeout(BOOT_TIMEOUT_S)
        outer = subprocess.Popen(
            ["sh", "-c", enter, "sh", *_NAMESPACES, "sh", str(_SCRIPT), str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=console,
        )
        try:
            _wait_ready(ready, folder / "console")
            (pid,) = [child.pid for child in psutil.Process(outer.pid).children()]
            yield Machine(pid)
        finally:
            outer.kill()
            outer.wait()
            _remove_group(group)


def _wait_ready(ready: socket.socket, console: Path) -> None:
    try:
        while "READY=1" not in ready.recv(4096).decode().splitlines():
            pass
    except TimeoutError:
        raise AssertionError(console.read_text(errors="replace")) from None


def _cgroup_root() -> Path | None:
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, kind, options, *_ = line.split()
        if kind == "cgroup2" and "rw" in options.split(",") and os.access(where, os.W_OK):
            return Path(where)
    return None


def _remove_group(group: Path) -> None:
    """Remove a control group with those below it, once its last process has ended."""
    events = group / "cgroup.events"
    while "populated 1" in events.read_text():
        os.sched_yield()
    for path in sorted(group.rglob("*"), reverse=True):
        if path.is_dir():
            path.rmdir()
    group.rmdir()
