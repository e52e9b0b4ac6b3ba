"""Logging, each in a process of its own: its configuration is the process's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow


def run(script: str, *args: str, stderr: Any = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    start = "import sys\nfrom pathlib import Path\nimport shimpy.logs as logs\n"
    return subprocess.run(
        [sys.executable, "-c", start + script, *args],
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        timeout=50,
        check=False,
    )


def events(text: str) -> list[str]:
    return [json.loads(line)["event"] for line in text.splitlines()]


def test_a_new_level_holds_for_loggers_that_are_there() -> None:
    done = run(
        "log = logs.get_logger('x')\n"
        "logs.setup_logging('warning', 'json')\n"
        "bound = log.bind(model='m')\n"
        "log.info('no'), bound.info('no'), bound.warning('one')\n"
        "logs.set_level('debug')\n"
        "log.debug('two'), bound.debug('three')\n"
        "logs.set_level('error')\n"
        "log.warning('no'), bound.error('four')\n"
    )
    assert done.returncode == 0, done.stderr
    assert events(done.stderr) == ["one", "two", "three", "four"]


def test_a_file_is_bounded_and_gets_what_anybody_says(tmp_path: Path) -> None:
    """Lines, prints, and a traceback at the end; a new file for each thousand bytes."""
    file = tmp_path / "logs" / "d.log"
    done = run(
        "logs.MAX_FILE_BYTES = 1000\n"
        "logs.setup_logging('info', 'auto', Path(sys.argv[1]))\n"
        "log = logs.get_logger('x')\n"
        "for i in range(100): log.info(f'event-{i}')\n"
        "print('printed', flush=True)\n"
        "raise SystemError('the end')\n",
        str(file),
    )
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")
    old, new = file.with_name("d.log.1").read_text(), file.read_text()
    assert sorted(path.name for path in file.parent.iterdir()) == ["d.log", "d.log.1"]
    assert len(old) < 1200
    *lines, printed = (old + new).partition("Traceback")[0].splitlines()
    found = events("\n".join(lines))
    assert found == [f"event-{i}" for i in range(100 - len(found), 100)]
    assert printed == "printed"
    assert new.endswith("SystemError: the end\n")


def test_a_log_that_can_not_be_written_stops_nobody() -> None:
    with Path("/dev/full").open("w") as full:
        done = run(
            "logs.setup_logging('info', 'json')\n"
            "for _ in range(3): logs.get_logger('x').info('lost')\n"
            "print('done')\n",
            stderr=full,
        )
    assert done.stdout == "done\n"
