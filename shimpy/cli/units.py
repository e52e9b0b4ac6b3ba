"""The systemd units that come with shimpy, and where each belongs."""

from __future__ import annotations

import importlib.resources
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

# From the file in systemd/ to its place on the system, and in a user's config folder.
SYSTEM_UNITS: Mapping[str, Path] = {
    "shimpy.service": Path("/etc/systemd/system/shimpy.service"),
    "shimpy.socket": Path("/etc/systemd/system/shimpy.socket"),
    "sysusers.d/shimpy.conf": Path("/etc/sysusers.d/shimpy.conf"),
    "tmpfiles.d/shimpy.conf": Path("/etc/tmpfiles.d/shimpy.conf"),
}
USER_UNITS: Mapping[str, Path] = {
    "user/shimpy.service": Path("systemd/user/shimpy.service"),
}

_EXEC_START = "ExecStart="


def read_unit(name: str, program: str) -> str:
    """Return a unit's text with the command that starts shimpy in it."""
    packaged = importlib.resources.files("shimpy").joinpath("systemd")
    folder = packaged if packaged.is_dir() else Path(__file__).parents[2] / "systemd"
    text = folder.joinpath(name).read_text(encoding="utf-8")
    lines = [
        f"{_EXEC_START}{program} serve" if line.startswith(_EXEC_START) else line
        for line in text.splitlines()
    ]
    return "\n".join(lines) + "\n"


def find_program() -> str:
    """Return the command line that starts this very shimpy."""
    beside = Path(sys.executable).with_name("shimpy")
    found = str(beside) if beside.exists() else shutil.which("shimpy")
    words = [found] if found else [sys.executable, "-m", "shimpy"]
    return " ".join(_quote(word) for word in words)


def _quote(word: str) -> str:
    # In a unit a percent sign and a dollar begin something.
    return shlex.quote(word).replace("%", "%%").replace("$", "$$")
