"""systemd's side, played on real sockets: socket activation, watchdog, stopping."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

pytestmark = pytest.mark.slow

TIMEOUT_S = 40.0
# What systemd does between fork and exec: descriptor 3 onwards, and whose they are.
ACTIVATE = """
import os, sys
n = int(sys.argv[1])
os.environ["LISTEN_PID"] = str(os.getpid())
os.environ["LISTEN_FDS"] = str(n)
os.execv(sys.executable, [sys.executable, "-m", "shimpy", "serve", *sys.argv[2:]])
"""


@contextmanager
def listener(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(path))
        sock.settimeout(TIMEOUT_S)
        yield sock


def environment(home: Path, **more: str) -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("SHIMPY_")}
    return env | {"SHIMPY_HOME": str(home), "SHIMPY_STORES": "none"} | more


def wait_for(sock: socket.socket, state: str) -> str:
    """Receive until a message holds a state; return it."""
    while True:
        message = sock.recv(4096).decode()
        if state in message:
            return message


def test_the_watchdog_is_fed_until_the_end(tmp_path: Path) -> None:
    with listener(tmp_path / "notify") as notify:
        env = environment(tmp_path, NOTIFY_SOCKET=str(tmp_path / "notify"), WATCHDOG_USEC="200000")
        argv = [sys.executable, "-m", "shimpy", "serve", "--bind", "127.0.0.1:0"]
        with subprocess.Popen(argv, env=env, stderr=subprocess.DEVNULL) as daemon:
            try:
                wait_for(notify, "READY=1")
                for _ in range(3):
                    assert notify.recv(4096) == b"WATCHDOG=1"
                daemon.terminate()
                wait_for(notify, "STOPPING=1")
                assert daemon.wait(TIMEOUT_S) == 0
            finally:
                daemon.kill()


def test_a_watchdog_of_another_process_is_not_fed(tmp_path: Path) -> None:
    with listener(tmp_path / "notify") as notify:
        env = environment(
            tmp_path,
            NOTIFY_SOCKET=str(tmp_path / "notify"),
            WATCHDOG_USEC="100000",
            WATCHDOG_PID="1",
        )
        argv = [sys.executable, "-m", "shimpy", "serve", "--bind", "127.0.0.1:0"]
        with subprocess.Popen(argv, env=env, stderr=subprocess.DEVNULL) as daemon:
            wait_for(notify, "READY=1")
            daemon.terminate()
            assert notify.recv(4096) == b"STOPPING=1"
            assert daemon.wait(TIMEOUT_S) == 0


def test_inherited_sockets_are_served_and_stay(tmp_path: Path) -> None:
    """A connection made before the daemon runs is answered; so is one after it is replaced."""
    path = tmp_path / "s.sock"
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_UNIX) as unix,
        listener(tmp_path / "notify") as notify,
    ):
        unix.bind(str(path))
        unix.listen()
        url = f"http://127.0.0.1:{tcp.getsockname()[1]}"
        env = environment(tmp_path, NOTIFY_SOCKET=str(tmp_path / "notify"))
        for _ in range(2):
            with socket.create_connection(tcp.getsockname()) as early:
                early.settimeout(TIMEOUT_S)
                early.sendall(b"GET /ready HTTP/1.1\r\nHost: localhost\r\n\r\n")
                daemon = start_with([tcp, unix], env)
                try:
                    wait_for(notify, "READY=1")
                    assert b"200 OK" in early.recv(4096)
                    assert httpx.get(f"{url}/ready", trust_env=False).status_code == 200
                    with httpx.Client(transport=httpx.HTTPTransport(uds=str(path))) as client:
                        assert client.get("http://localhost/ready").status_code == 200
                finally:
                    daemon.terminate()
                    assert daemon.wait(TIMEOUT_S) == 0
            assert path.exists()


def start_with(sockets: list[socket.socket], env: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start the daemon with sockets as its descriptors 3 and up."""
    # Out of the way first: one of them may have a number that another is to get.
    copies = [os.dup(os.dup(sock.fileno())) for sock in sockets]
    script = "import os, sys\n"
    for index, copy in enumerate(copies):
        script += f"os.dup2({copy}, {100 + index})\n"
    for index in range(len(copies)):
        script += f"os.dup2({100 + index}, {3 + index}, inheritable=True)\n"
    try:
        return subprocess.Popen(
            [sys.executable, "-c", script + ACTIVATE, str(len(sockets))],
            env=env,
            pass_fds=copies,
            stderr=subprocess.DEVNULL,
        )
    finally:
        for copy in copies:
            os.close(copy)
