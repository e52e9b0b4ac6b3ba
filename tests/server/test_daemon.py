"""The whole daemon as a process: `shimpy serve`, from its announcement to its end."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import msgspec
import pytest

from tests.synthetic import CHAIN_TEXT, write_chain

pytestmark = pytest.mark.slow

ENDLESS = {"model": "endless", "prompt": "x", "shift": True, "options": {"num_predict": 1_000_000}}
_TIMEOUT_S = 50.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Daemon:
    """A daemon that has announced itself."""

    process: subprocess.Popen[bytes]
    client: httpx.Client
    notices: socket.socket
    log: Path

    def wait_notice(self, state: bytes) -> None:
        """Wait until the daemon has told systemd this state."""
        while state not in self.notices.recv(4096):
            pass

    def wait_end(self) -> int:
        return self.process.wait(_TIMEOUT_S)


@contextmanager
def running_daemon(folder: Path, home: Path, *flags: str) -> Iterator[Daemon]:
    log = home / "daemon.log"
    # A Unix socket's path must be short.
    with (
        tempfile.TemporaryDirectory() as short,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notices,
        log.open("wb") as output,
    ):
        address = str(Path(short) / "notify")
        notices.bind(address)
        notices.settimeout(_TIMEOUT_S)
        environ = {key: value for key, value in os.environ.items() if "SHIMPY" not in key}
        environ |= {"SHIMPY_HOME": str(home), "NOTIFY_SOCKET": address, "SHIMPY_N_THREADS": "1"}
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "shimpy", "serve", "--bind", "127.0.0.1:0"),
                *("--model-dirs", str(folder), "--n-ctx", "2048", *flags),
            ],
            env=environ,
            stdout=output,
            stderr=output,
        )
        try:
            ready = _wait_ready(process, notices, log)
            url = ready.decode().partition("listening on ")[2].split()[0]
            with httpx.Client(base_url=url, timeout=_TIMEOUT_S, trust_env=False) as client:
                yield Daemon(process=process, client=client, notices=notices, log=log)
        finally:
            process.kill()
            process.wait()


def _wait_ready(process: subprocess.Popen[bytes], notices: socket.socket, log: Path) -> bytes:
    # Short receives, so that a daemon that dies at once fails the test at once.
    notices.settimeout(0.1)
    while process.poll() is None:
        try:
            notice = notices.recv(4096)
        except TimeoutError:
            continue
        if b"READY=1" in notice:
            notices.settimeout(_TIMEOUT_S)
            return notice
    raise AssertionError(log.read_text())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    write_chain(folder / "chain.gguf")
    write_chain(folder / "endless.gguf", endless=True)
    return folder


def test_a_session_from_load_to_term(folder: Path, tmp_path: Path) -> None:
    """What the README shows: serve, a request, ps, and a clean end."""
    with running_daemon(folder, tmp_path) as daemon:
        body = {"model": "chain", "prompt": "hi", "max_tokens": 64, "stream": False}
        answer = daemon.client.post("/api/generate", json=body)
        assert answer.json()["response"] == CHAIN_TEXT
        (resident,) = daemon.client.get("/api/ps").json()["models"]
        assert resident["placement"]["mode"] == "cpu"
        assert resident["size"] > 0
        daemon.process.send_signal(signal.SIGTERM)
        assert daemon.wait_end() == 0
        assert not _is_alive(resident["pid"])


def test_term_lets_running_requests_end(folder: Path, tmp_path: Path) -> None:
    with running_daemon(folder, tmp_path) as daemon:
        body = ENDLESS | {"options": {"num_predict": 3000}}
        with daemon.client.stream("POST", "/api/generate", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            daemon.process.send_signal(signal.SIGTERM)
            last = msgspec.json.decode(list(lines)[-1])
        assert last["done_reason"] == "length"
        assert daemon.wait_end() == 0


def test_what_does_not_end_in_time_is_cancelled_and_told(folder: Path, tmp_path: Path) -> None:
    with running_daemon(folder, tmp_path, "--drain-timeout", "0") as daemon:
        with daemon.client.stream("POST", "/api/generate", json=ENDLESS) as answer:
            lines = answer.iter_lines()
            next(lines)
            daemon.process.send_signal(signal.SIGTERM)
            last = msgspec.json.decode(list(lines)[-1])
        assert "stopping" in last["error"]
        assert daemon.wait_end() == 0


def test_a_second_signal_does_not_wait(folder: Path, tmp_path: Path) -> None:
    with running_daemon(folder, tmp_path, "--drain-timeout", "1h") as daemon:
        with daemon.client.stream("POST", "/api/generate", json=ENDLESS) as answer:
            lines = answer.iter_lines()
            next(lines)
            daemon.process.send_signal(signal.SIGINT)
            daemon.wait_notice(b"STOPPING=1")
            daemon.process.send_signal(signal.SIGINT)
            assert "stopping" in msgspec.json.decode(list(lines)[-1])["error"]
        assert daemon.wait_end() == 0


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


def test_no_worker_outlives_a_killed_daemon(folder: Path, tmp_path: Path) -> None:
    with running_daemon(folder, tmp_path) as daemon:
        daemon.client.post("/api/generate", json={"model": "chain"})
        (resident,) = daemon.client.get("/api/ps").json()["models"]
        worker = os.pidfd_open(resident["pid"])
        daemon.process.kill()
        daemon.process.wait()
        assert select.select([worker], [], [], _TIMEOUT_S)[0]
        os.close(worker)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
