"""The whole daemon as a process: `shimpy serve`, from its announcement to its end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import msgspec
import psutil
import pytest

from tests.daemon import Daemon, running_daemon
from tests.synthetic import CHAIN_TEXT, write_chain

pytestmark = pytest.mark.slow

ENDLESS = {"model": "endless", "prompt": "x", "shift": True, "options": {"num_predict": 1_000_000}}
_TIMEOUT_S = 50.0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    write_chain(folder / "chain.gguf")
    write_chain(folder / "endless.gguf", endless=True)
    return folder


def test_a_session_from_load_to_term(folder: Path, tmp_path: Path) -> None:
    """What the README shows: serve, a request, ps, and a clean end."""
    with running_daemon(tmp_path, folder) as daemon, _client(daemon) as client:
        body = {"model": "chain", "prompt": "hi", "max_tokens": 64, "stream": False}
        answer = client.post("/api/generate", json=body)
        assert answer.json()["response"] == CHAIN_TEXT
        (resident,) = client.get("/api/ps").json()["models"]
        assert resident["placement"]["mode"] == "cpu"
        assert resident["size"] > 0
        daemon.process.send_signal(signal.SIGTERM)
        assert daemon.process.wait(_TIMEOUT_S) == 0
        assert not _is_alive(resident["pid"])


def test_term_lets_running_requests_end(folder: Path, tmp_path: Path) -> None:
    with running_daemon(tmp_path, folder) as daemon, _client(daemon) as client:
        body = ENDLESS | {"options": {"num_predict": 3000}}
        with client.stream("POST", "/api/generate", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            daemon.process.send_signal(signal.SIGTERM)
            last = msgspec.json.decode(list(lines)[-1])
        assert last["done_reason"] == "length"
        assert daemon.process.wait(_TIMEOUT_S) == 0


def test_what_does_not_end_in_time_is_cancelled_and_told(folder: Path, tmp_path: Path) -> None:
    with (
        running_daemon(tmp_path, folder, "--drain-timeout", "0") as daemon,
        _client(daemon) as client,
    ):
        with client.stream("POST", "/api/generate", json=ENDLESS) as answer:
            lines = answer.iter_lines()
            next(lines)
            daemon.process.send_signal(signal.SIGTERM)
            last = msgspec.json.decode(list(lines)[-1])
        assert "stopping" in last["error"]
        assert daemon.process.wait(_TIMEOUT_S) == 0


def test_a_second_signal_does_not_wait(folder: Path, tmp_path: Path) -> None:
    with (
        running_daemon(tmp_path, folder, "--drain-timeout", "1h") as daemon,
        _client(daemon) as client,
    ):
        with client.stream("POST", "/api/generate", json=ENDLESS) as answer:
            lines = answer.iter_lines()
            next(lines)
            # Two of one kind could arrive as one.
            daemon.process.send_signal(signal.SIGTERM)
            daemon.process.send_signal(signal.SIGINT)
            assert "stopping" in msgspec.json.decode(list(lines)[-1])["error"]
        assert daemon.process.wait(_TIMEOUT_S) == 0


def test_a_port_in_use_is_one_clear_line(folder: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        ended = subprocess.run(
            [sys.executable, "-m", "shimpy", "serve", "--bind", f"127.0.0.1:{port}"],
            env={**os.environ, "SHIMPY_HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    assert ended.returncode in (1, 2)
    assert f"can't listen on 127.0.0.1 port {port}" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_one_that_nobody_needs_ends(folder: Path, tmp_path: Path) -> None:
    """After its last request and its last model; a stream is a request."""
    with (
        running_daemon(tmp_path, folder, "--idle-exit", "1s", "--keep-alive", "0") as daemon,
        _client(daemon) as client,
    ):
        with client.stream("GET", "/api/events") as events:
            lines = events.iter_lines()
            body = {"model": "chain", "prompt": "hi", "keep_alive": "1500ms", "stream": False}
            assert client.post("/api/generate", json=body).status_code == 200
            while '"unload"' not in next(lines):
                assert daemon.process.poll() is None
        assert daemon.process.wait(_TIMEOUT_S) == 0
        assert "idle_exit" in daemon.log.read_text()


def test_no_worker_outlives_a_killed_daemon(folder: Path, tmp_path: Path) -> None:
    """Neither one with a model nor the spare one."""
    with running_daemon(tmp_path, folder) as daemon, _client(daemon) as client:
        client.post("/api/generate", json={"model": "chain"})
        (resident,) = client.get("/api/ps").json()["models"]
        process = psutil.Process(daemon.process.pid)
        until_s = time.monotonic() + _TIMEOUT_S
        while len(workers := process.children(recursive=True)) < 2:
            assert time.monotonic() < until_s, "there is no spare worker"
            time.sleep(0.05)
        assert resident["pid"] in {worker.pid for worker in workers}
        daemon.process.kill()
        daemon.process.wait()
        assert psutil.wait_procs(workers, _TIMEOUT_S)[1] == []


def _client(daemon: Daemon) -> httpx.Client:
    return httpx.Client(base_url=daemon.url, timeout=_TIMEOUT_S, trust_env=False)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
