"""The commands as a user types them, against a real daemon with real workers."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.daemon import Daemon, running_daemon, shimpy
from tests.synthetic import CHAIN_TEXT


@dataclass
class Terminal:
    """What a user at a terminal types and sees."""

    descriptor: int

    def type(self, text: str) -> None:
        """Type it."""
        os.write(self.descriptor, text.encode())

    def read(self) -> str:
        """Return what is shown next."""
        return os.read(self.descriptor, 65536).decode(errors="replace")

    def read_until(self, *texts: str) -> str:
        """Return what is shown, up to these texts, one after the other."""
        shown, position = "", 0
        for text in texts:
            while text not in shown[position:]:
                shown += self.read()
            position = shown.index(text, position) + len(text)
        return shown


@contextlib.contextmanager
def chat(env: dict[str, str], *args: str) -> Iterator[Terminal]:
    """Run a chat at a terminal from its first prompt on; it has to end by itself, well."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "shimpy", "run", *args]
    # A session of its own: Ctrl-C is for whoever has the terminal.
    with subprocess.Popen(
        [sys.executable, "-c", _OWN_TERMINAL, *command], env=env | {"TERM": "xterm"},
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
    ) as process:  # fmt: skip
        os.close(theirs)
        try:
            terminal = Terminal(ours)
            terminal.read_until(">>> ")
            yield terminal
            assert process.wait(30) == 0
        finally:
            # What failed may have left it waiting for more.
            process.kill()
            os.close(ours)


def background(home: Path) -> psutil.Process:
    """The daemon that a command has started."""
    return psutil.Process(int((home / "state" / "background.pid").read_text()))


_OWN_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


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


def test_what_a_terminal_cannot_show_is_marked(daemon: Daemon) -> None:
    env = daemon.env | {"PYTHONIOENCODING": "koi8-r"}
    done = shimpy("run", "chain", "hello", env=env)
    assert (done.returncode, done.stdout) == (
        0,
        CHAIN_TEXT.encode("ascii", "replace").decode() + "\n",
    )


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


def test_run_takes_a_file_that_the_daemon_knows(daemon: Daemon, tmp_path: Path) -> None:
    folder = Path(json.loads(daemon.shimpy("list", "chain", "--json").stdout)[0]["path"]).parent
    assert daemon.shimpy("run", str(folder / "chain.gguf"), "x").stdout == f"{CHAIN_TEXT}\n"
    assert "page.gguf: it is a web page" in daemon.shimpy("run", f"{folder}/page.gguf", "x").stderr
    other = tmp_path / "other.gguf"
    assert f"there is no file {other}" in daemon.shimpy("run", str(other), "x").stderr
    other.write_bytes(b"GGUF")
    assert f"--model-dirs {tmp_path}" in daemon.shimpy("run", str(other), "x").stderr


def test_several_pasted_lines_are_one_message_of_a_chat(daemon: Daemon) -> None:
    with chat(daemon.env, "chain") as terminal:
        # As a terminal pastes; a comment is no command.
        terminal.type("\x1b[200~/* one\ntwo */\x1b[201~\r")
        shown = terminal.read_until(f"{CHAIN_TEXT}\r\n", ">>> ")
        assert shown.count(CHAIN_TEXT) == 1
        terminal.type("/bye\r")


def test_ctrl_c_ends_an_answer_and_the_next_prompt_begins_a_line(daemon: Daemon) -> None:
    # Drawn at random, its text may end by itself before that.
    endless = ("-o", "num_predict=100000", "-o", "temperature=0")
    with chat(daemon.env, "tiny-deepseek", *endless) as terminal:
        terminal.type("hello\r")
        terminal.read_until("hello\r\n")
        terminal.read()
        terminal.type("\x03")
        terminal.read_until("^C\r\n", ">>> ")
        terminal.type("\x04")


def test_list_shows_good_and_broken_models(daemon: Daemon) -> None:
    done = daemon.shimpy("list")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["NAME", "SIZE", "EXPERTS", "MODIFIED", "FROM"]
    assert any(line.startswith("tiny-deepseek:q8_0 ") and "8+2" in line for line in lines)
    assert any(line.startswith("page:latest (broken)") for line in lines)
    assert "page:latest is broken:" in done.stderr
    assert "page.gguf" in done.stderr


def test_the_shell_completes_names_of_models(daemon: Daemon) -> None:
    for word, names in (("tiny", ["tiny-deepseek"]), ("CH", ["chain"]), ("none", [])):
        words = {"COMP_WORDS": f"shimpy show {word}", "COMP_CWORD": "2"}
        env = daemon.env | {"_SHIMPY_COMPLETE": "bash_complete"} | words
        argv = [str(Path(sys.executable).with_name("shimpy"))]
        done = subprocess.run(argv, env=env, capture_output=True, text=True, check=True, timeout=30)
        assert done.stdout.split() == [f"plain,{name}" for name in names]


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
    assert daemon.shimpy("events", "--no-follow", "--since", "now").returncode == 2
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


def test_the_log_of_an_earlier_daemon_is_told_as_such(daemon: Daemon) -> None:
    log = Path(daemon.env["SHIMPY_HOME"], "state", "daemon.log")
    log.write_text("earlier\n")
    done = daemon.shimpy("logs")
    log.unlink()
    assert done.stdout == "earlier\n"
    assert "an earlier one wrote" in done.stderr


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


def test_the_plan_is_the_daemons_with_what_is_set_about_the_model(daemon: Daemon) -> None:
    assert daemon.shimpy("set", "chain", "num_ctx=768").returncode == 0
    assert "settings: context 768 " in daemon.shimpy("plan", "chain").stdout
    assert "settings: context 512 " in daemon.shimpy("plan", "chain", "--n-ctx", "512").stdout
    supposed = daemon.shimpy("plan", "chain", "--vram", "8GiB", "--vram", "8GiB", "--ram", "9GiB")
    assert "of 8.0 GiB free" in supposed.stdout
    assert daemon.shimpy("set", "chain", "--unset", "num_ctx").returncode == 0
    assert "settings: context 768 " not in daemon.shimpy("plan", "chain").stdout


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


@pytest.mark.parametrize("args", [("list",), ("serve", "--bind", "127.0.0.1:0")], ids=str)
def test_a_home_that_cannot_be_written_is_named(
    tmp_path: Path, args: tuple[str, ...], unused_tcp_port: int
) -> None:
    home = tmp_path / "file" / "home"
    home.parent.write_text("no folder")
    env = {
        **os.environ,
        "SHIMPY_HOME": str(home),
        "SHIMPY_HOST": f"127.0.0.1:{unused_tcp_port}",
    }
    done = shimpy(*args, env=env)
    assert done.returncode == 1
    assert str(home / "state") in done.stderr
    assert "Traceback" not in done.stderr


def test_a_log_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    path = tmp_path / "file" / "log"
    path.parent.write_text("no folder")
    env = {**os.environ, "SHIMPY_HOME": str(tmp_path / "home")}
    done = shimpy("serve", "--bind", "127.0.0.1:0", "--log-file", str(path), env=env)
    assert done.returncode == 2
    assert f"log_file: can't write {path}" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_daemon_in_the_background_gives_way_to_one_on_purpose(
    tmp_path: Path, unused_tcp_port: int
) -> None:
    """A new user runs a model, and then follows the next line of the readme."""
    env = {
        **{key: value for key, value in os.environ.items() if not key.startswith("SHIMPY_")},
        "SHIMPY_HOME": str(tmp_path),
        "SHIMPY_BIND": f"127.0.0.1:{unused_tcp_port}",
    }
    told = shimpy("list", env=env).stderr
    pid = re.search(r"\(pid (\d+),", told)
    assert pid is not None, told
    background = psutil.Process(int(pid[1]))
    other = shimpy("list", env=env | {"SHIMPY_HOST": "127.0.0.1:1"})
    assert "belongs to another running daemon" in other.stderr
    assert background.is_running()
    with subprocess.Popen(
        [sys.executable, "-m", "shimpy", "serve"], env=env, stderr=subprocess.PIPE, text=True
    ) as daemon:
        assert daemon.stderr is not None
        assert f"(process {pid[1]}) gives way" in daemon.stderr.readline()
        assert "listening" in daemon.stderr.readline()
        assert not background.is_running() or background.status() == psutil.STATUS_ZOMBIE
        assert "gives way" not in shimpy("serve", env=env).stderr
        daemon.terminate()
        assert daemon.wait(30) == 0


def test_a_chat_outlives_its_daemon(
    tmp_path: Path, chain_model: Path, unused_tcp_port: int
) -> None:
    """One in the background ends when nothing is asked of it for a while."""
    env = {
        **{key: value for key, value in os.environ.items() if not key.startswith("SHIMPY_")},
        "SHIMPY_HOME": str(tmp_path),
        "SHIMPY_BIND": f"127.0.0.1:{unused_tcp_port}",
        "SHIMPY_MODEL_DIRS": str(chain_model.parent),
        "SHIMPY_N_THREADS": "1",
    }
    assert shimpy("list", env=env).returncode == 0
    daemon = background(tmp_path)
    with chat(env, "chain") as terminal:
        terminal.type("hello\r")
        terminal.read_until(f"{CHAIN_TEXT}\r\n", ">>> ")
        daemon.terminate()
        daemon.wait(30)
        terminal.type("hello\r")
        terminal.read_until("started a daemon", f"{CHAIN_TEXT}\r\n", ">>> ")
        terminal.type("/bye\r")
    daemon = background(tmp_path)
    daemon.terminate()
    daemon.wait(30)


def test_commands_at_once_start_one_daemon(tmp_path: Path, unused_tcp_port: int) -> None:
    env = {
        **{key: value for key, value in os.environ.items() if not key.startswith("SHIMPY_")},
        "SHIMPY_HOME": str(tmp_path),
        "SHIMPY_HOST": f"127.0.0.1:{unused_tcp_port}",
    }
    command = [sys.executable, "-m", "shimpy", "list"]
    both = [subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    told = [process.communicate(timeout=60)[1] for process in both]
    daemons = [psutil.Process(int(pid)) for pid in re.findall(r"\(pid (\d+),", "".join(told))]
    for daemon in daemons:
        daemon.terminate()
        daemon.wait(30)
    assert [process.returncode for process in both] == [0, 0], told
    assert len(daemons) == 1


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
