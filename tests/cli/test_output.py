"""What commands print, piped and on a terminal."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from shimpy.cli.output import print_table, read_text
from shimpy.errors import UserError

TABLE = (
    "from shimpy.cli.output import print_table\n"
    "print_table(('', 'NAME', 'SPEED'), [('*', 'a long name ' * 4, '5615 ± 412')])\n"
)


def test_a_piped_table_has_a_line_for_each_row(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("NAME", "WHAT"), [("a", "x" * 300), ("b", "y")])
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines == ["NAME   WHAT", "a      " + "x" * 300, "b      y"]


def test_on_a_narrow_terminal_no_cell_is_cut() -> None:
    """A mark or a digit that is missing would be a lie."""
    ours, theirs = pty.openpty()
    env = {**os.environ, "COLUMNS": "40", "TERM": "dumb"}
    subprocess.run(
        [sys.executable, "-c", TABLE], stdin=theirs, stdout=theirs, check=True, timeout=30, env=env
    )
    os.close(theirs)
    shown = os.read(ours, 4096).decode()
    os.close(ours)
    assert shown.splitlines()[1].rstrip() == "* " + "a long name " * 4 + " 5615 ± 412"


def test_a_file_that_can_not_be_read_is_told_with_its_reason(tmp_path: Path) -> None:
    binary = tmp_path / "model.gguf"
    binary.write_bytes(b"GGUF\xff")
    for path, reason in (
        (binary, "no text in UTF-8"),
        (tmp_path / "none", "No such file"),
        (tmp_path, "Is a directory"),
    ):
        with pytest.raises(UserError, match=f"can't read {path}: .*{reason}"):
            read_text(path)
