"""`shimpy logs`: the background daemon's file, by model, and as it grows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shimpy.cli.logs import format_line, is_about, parse_line
from tests.daemon import shimpy

LINES = [
    {"event": "listening", "level": "info", "timestamp": "T1", "urls": ["http://x"]},
    {"event": "model_load", "model": "a:latest", "level": "info", "timestamp": "T2"},
    {"event": "worker_deaf", "worker": "b:7b", "level": "warning", "timestamp": "T3", "pid": 7},
]


def run(home: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return shimpy("logs", *args, env={**os.environ, "SHIMPY_HOME": str(home)})


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "state").mkdir()
    text = "".join(json.dumps(line) + "\n" for line in LINES) + "not an event\n"
    (tmp_path / "state" / "daemon.log").write_text(text)
    return tmp_path


def test_lines_are_for_people() -> None:
    assert format_line(LINES[2]) == "T3 warning worker_deaf worker=b:7b pid=7"
    assert format_line(LINES[0] | {"exception": "Traceback"}).endswith("\nTraceback")


@pytest.mark.parametrize(("model", "n"), [("a", 1), ("a:latest", 1), ("b:7b", 1), ("b", 0)])
def test_a_model_s_lines_are_found_by_its_name(model: str, n: int) -> None:
    assert sum(is_about(line, model) for line in LINES) == n


@pytest.mark.parametrize("line", ["", "text", "[]", '"event"', '{"a": 1}'])
def test_what_is_no_event_is_taken_as_it_is(line: str) -> None:
    assert parse_line(line) is None


@pytest.mark.slow
def test_the_background_daemon_s_file_is_shown(home: Path) -> None:
    assert run(home).stdout.splitlines()[-2:] == [format_line(LINES[2]), "not an event"]
    assert run(home, "a").stdout == format_line(LINES[1]) + "\n"
    assert run(home, "-n", "2", "--json").stdout.splitlines()[0] == json.dumps(LINES[2])


@pytest.mark.slow
def test_the_file_before_it_is_shown_too(home: Path) -> None:
    log_file = home / "state" / "daemon.log"
    log_file.with_name("daemon.log.1").write_text("before\n")
    assert run(home).stdout.startswith("before\n")
    assert "before" not in run(home, "-n", "2").stdout


@pytest.mark.slow
def test_fewer_lines_than_none_is_a_usage_error(home: Path) -> None:
    done = run(home, "-n", "-1")
    assert done.returncode == 2
    assert "-1" in done.stderr


def test_without_a_log_it_says_where_one_would_be(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 1
    assert str(tmp_path / "state" / "daemon.log") in done.stderr


@pytest.mark.slow
def test_follow_goes_on_with_what_comes(home: Path) -> None:
    argv = [sys.executable, "-m", "shimpy", "logs", "-f", "a", "--json"]
    env = {**os.environ, "SHIMPY_HOME": str(home), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, text=True) as follower:
        try:
            assert follower.stdout is not None
            assert json.loads(follower.stdout.readline()) == LINES[1]
            later = LINES[1] | {"event": "model_ready"}
            with (home / "state" / "daemon.log").open("a") as log:
                log.write(json.dumps(later)[:5])
                log.flush()
                log.write(json.dumps(later)[5:] + "\n")
            assert json.loads(follower.stdout.readline()) == later
            log_file = home / "state" / "daemon.log"
            log_file.rename(log_file.with_name("daemon.log.1"))
            log_file.write_text(json.dumps(LINES[1]) + "\n")
            assert json.loads(follower.stdout.readline()) == LINES[1]
        finally:
            follower.terminate()
