"""The commands as a user types them, against a real daemon with real workers."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.daemon import Daemon, running_daemon, shimpy
from tests.synthetic import CHAIN_TEXT


@pytest.fixture(scope="module")
def daemon(
    tmp_path_factory: pytest.TempPathFactory, chain_model: Path, deepseek_model: Path
) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("cli")
    models = folder / "models"
    models.mkdir()
    shutil.copy(chain_model, models / "chain.gguf")
    shutil.copy(deepseek_model, models / "tiny-deepseek-Q8_0.gguf")
    (models / "page.gguf").write_text("<!DOCTYPE html><html>not a model</html>")
    with running_daemon(folder / "home", models) as running:
        yield running


def test_run_prints_the_answer_on_stdout_alone(daemon: Daemon) -> None:
    done = daemon.shimpy("run", "chain", "hello")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{CHAIN_TEXT}\n", "")


def test_run_reads_standard_input(daemon: Daemon) -> None:
    done = daemon.shimpy("run", "chain", "summarise", stdin="a long text")
    assert done.stdout == f"{CHAIN_TEXT}\n"


def test_run_says_when_the_answer_was_cut(daemon: Daemon) -> None:
    done = daemon.shimpy("run", "chain", "hello", "-o", "num_predict=2", "--verbose")
    assert done.returncode == 0
    assert CHAIN_TEXT.startswith(done.stdout.strip())
    assert "limit of tokens" in done.stderr
    assert "2 tokens in" in done.stderr


def test_run_of_an_unknown_model_names_it_and_exits_1(daemon: Daemon) -> None:
    done = daemon.shimpy("run", "nope", "hello")
    assert done.returncode == 1
    assert done.stdout == ""
    assert "nope" in done.stderr


def test_list_shows_good_and_broken_models(daemon: Daemon) -> None:
    done = daemon.shimpy("list")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["NAME", "SIZE", "EXPERTS", "MODIFIED", "FROM"]
    assert any(line.startswith("tiny-deepseek:q8_0 ") and "8+2" in line for line in lines)
    assert any(line.startswith("page:latest (broken)") for line in lines)
    assert "page:latest is broken:" in done.stderr
    assert "page.gguf" in done.stderr


def test_list_as_json_filters_by_prefix(daemon: Daemon) -> None:
    models = json.loads(daemon.shimpy("list", "tiny", "--json").stdout)
    assert [model["name"] for model in models] == ["tiny-deepseek:q8_0"]
    assert models[0]["experts"]["n_expert"] == 8


def test_ps_shows_the_placement_until_stop(daemon: Daemon) -> None:
    assert daemon.shimpy("run", "tiny-deepseek", "x", "-o", "num_predict=1").returncode == 0
    table = daemon.shimpy("ps").stdout
    assert "tiny-deepseek:q8_0" in table
    assert re.search(r"^tiny-deepseek:q8_0 +ready +CPU ", table, re.MULTILINE)
    # What it takes, and what it was predicted to.
    assert re.search(r"^tiny-deepseek:q8_0 +RAM( +[\d.]+ [KM]iB){5}", table, re.MULTILINE)
    resident = next(
        model
        for model in json.loads(daemon.shimpy("ps", "--json").stdout)["models"]
        if model["name"] == "tiny-deepseek:q8_0"
    )
    assert resident["placement"]["mode"] == "cpu"
    assert daemon.shimpy("stop", "tiny-deepseek").returncode == 0
    loaded, _, recently = daemon.shimpy("ps").stdout.partition("RECENTLY")
    assert "tiny-deepseek" not in loaded
    assert "tiny-deepseek:q8_0      somebody asked for it" in recently


def test_events_are_told_with_their_reasons(daemon: Daemon) -> None:
    assert daemon.shimpy("run", "chain", "x").returncode == 0
    assert daemon.shimpy("stop", "chain").returncode == 0
    lines = daemon.shimpy("events", "chain", "--no-follow").stdout.splitlines()
    assert "somebody asked for it" in lines[-1]
    assert lines[-1].split()[1:3] == ["unload", "chain:latest"]
    told = daemon.shimpy("events", "--json", "--no-follow", "--since", "0").stdout.splitlines()
    assert [json.loads(line)["kind"] for line in told][-1] == "unload"
    assert daemon.shimpy("events", "--no-follow", "--since", "now").returncode == 1
    assert daemon.shimpy("events", "nope", "--no-follow").stdout == ""


def test_events_are_followed_until_the_daemon_stops(tmp_path: Path, chain_model: Path) -> None:
    with running_daemon(tmp_path, chain_model.parent) as daemon:
        command = [sys.executable, "-m", "shimpy", "events", "--since", "0"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=daemon.env) as events:
            assert events.stdout is not None
            assert daemon.shimpy("run", "chain", "x").returncode == 0
            lines = [next(events.stdout), next(events.stdout)]
            assert [line.split()[1] for line in lines] == ["load", "ready"]
            daemon.process.terminate()
            assert events.wait(30) == 0


def test_pin_and_unpin(daemon: Daemon) -> None:
    assert daemon.shimpy("stop", "chain").returncode == 0
    assert "stays once it is loaded" in daemon.shimpy("pin", "chain").stderr
    assert daemon.shimpy("run", "chain", "x", "--keepalive", "0").returncode == 0
    assert re.search(r"^chain:latest .* pinned *$", daemon.shimpy("ps").stdout, re.MULTILINE)
    assert daemon.shimpy("pin", "chain").stderr == ""
    assert daemon.shimpy("unpin", "chain").returncode == 0
    assert daemon.shimpy("unpin", "nope").returncode == 1


def test_show_prints_sections_and_parts(daemon: Daemon) -> None:
    shown = daemon.shimpy("show", "tiny-deepseek").stdout
    for text in ("architecture", "deepseek", "Experts", "routed", "completion"):
        assert text in shown
    assert "FROM" in daemon.shimpy("show", "tiny-deepseek", "--modelfile").stdout
    info = json.loads(daemon.shimpy("show", "tiny-deepseek", "--json").stdout)["model_info"]
    assert info["general.architecture"] == "deepseek"


def test_stop_of_an_unknown_model_exits_1(daemon: Daemon) -> None:
    assert daemon.shimpy("stop", "nope").returncode == 1


def test_run_starts_a_daemon_where_none_answers(
    tmp_path: Path, chain_model: Path, unused_tcp_port: int
) -> None:
    """The first command of a new user works; it says what it started, and how to find it."""
    models = tmp_path / "models"
    models.mkdir()
    shutil.copy(chain_model, models)
    env = {
        **{key: value for key, value in os.environ.items() if not key.startswith("SHIMPY_")},
        "SHIMPY_HOME": str(tmp_path / "home"),
        "SHIMPY_HOST": f"127.0.0.1:{unused_tcp_port}",
        "SHIMPY_MODEL_DIRS": str(models),
        "SHIMPY_N_THREADS": "1",
    }
    done = shimpy("run", "chain", "hello", env=env)
    match = re.search(r"started a daemon in the background \(pid (\d+), log (.*)\)", done.stderr)
    assert match is not None, done.stderr
    daemon = psutil.Process(int(match[1]))
    # It ends by itself; one that was started on purpose does not.
    assert daemon.cmdline()[-2:] == ["--idle-exit", "30m"]
    try:
        assert done.stdout == f"{CHAIN_TEXT}\n"
        assert Path(match[2]).is_file()
    finally:
        daemon.terminate()
        daemon.wait(30)


def test_a_daemon_that_cannot_start_says_why(tmp_path: Path, unused_tcp_port: int) -> None:
    env = {
        **os.environ,
        "SHIMPY_HOME": str(tmp_path),
        "SHIMPY_HOST": f"127.0.0.1:{unused_tcp_port}",
        "SHIMPY_LOAD_TIMEOUT": "soon",
    }
    done = shimpy("run", "chain", "hello", env=env)
    assert done.returncode == 2
    assert "SHIMPY_LOAD_TIMEOUT" in done.stderr
