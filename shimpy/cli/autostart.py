"""A daemon in the background, for a client command that finds none."""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

from shimpy.cli.output import hint
from shimpy.client import Client
from shimpy.config import Config, client_url, load_config
from shimpy.errors import DaemonError, UnreachableError

# In the state folder, unless the config names a log file.
LOG_NAME = "daemon.log"
_LOCK_NAME = "start.lock"
_PID_NAME = "background.pid"
_START_TIMEOUT_S = 30.0
_IDLE_EXIT = "30m"
_ERROR = "Error: "
_LOOPBACK = {"127.0.0.1", "localhost", "::1"}


def connect() -> Client:
    """Return a client of the daemon at SHIMPY_HOST, which is started when none answers there.

    Raises:
        UnreachableError: none answers, and the address is another machine's.
        DaemonError: the new daemon ended before it was ready.
    """
    client = Client(client_url())
    try:
        client.version()
    except UnreachableError:
        address = urlsplit(client.url)
        if address.hostname not in _LOOPBACK or address.scheme != "http":
            raise
        host = f"[{address.hostname}]" if ":" in address.hostname else address.hostname
        _start_daemon(client, f"{host}:{address.port}")
    return client


def _start_daemon(client: Client, bind: str) -> None:
    loaded = load_config()
    config = loaded.config
    # Nobody asked for a daemon, and nobody would end it.
    idle = ["--idle-exit", _IDLE_EXIT] if loaded.origins["idle_exit"] == "default" else []
    log = config.log_file or config.state_dir / LOG_NAME
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.touch()
        lock = log.with_name(_LOCK_NAME).open("w")
    except OSError as error:
        raise DaemonError(
            f"no daemon answers at {bind}, and a new one can't log to {log}: {error.strerror}; "
            "SHIMPY_HOME names another folder for all that it writes"
        ) from error
    with lock:
        # Several commands at once start one daemon: the others wait until it is ready.
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            client.version()
        except UnreachableError:
            pid = _start_alone(bind, log, idle)
            (config.state_dir / _PID_NAME).write_text(f"{pid}\n")


def is_background(config: Config, pid: int | None) -> bool:
    """Whether a daemon of this config is one that a command started."""
    try:
        return int((config.state_dir / _PID_NAME).read_text()) == pid
    except (OSError, ValueError):
        return False


def _start_alone(bind: str, log: Path, flags: list[str]) -> int:
    """Return the process's id once it is ready."""
    n_before = log.stat().st_size
    with (
        tempfile.TemporaryDirectory(prefix="shimpy-") as folder,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready,
        log.open("ab") as output,
    ):
        path = Path(folder) / "notify"
        ready.bind(str(path))
        process = subprocess.Popen(  # noqa: S603 - this very program
            # What it says before it takes the file over goes there, too.
            [
                sys.executable,
                "-m",
                "shimpy",
                "serve",
                "--background",
                "--bind",
                bind,
                "--log-file",
                str(log),
                *flags,
            ],
            env={**os.environ, "NOTIFY_SOCKET": str(path)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        said = _wait_ready(process, ready, log, n_before)
    if said is not None:
        raise DaemonError(
            f"no daemon answers at {bind}, which SHIMPY_HOST changes, and a new one did not start "
            f"(log {log}):\n{said}"
        )
    hint(f"started a daemon in the background (pid {process.pid}, log {log})")
    return process.pid


def _wait_ready(
    process: subprocess.Popen[bytes], ready: socket.socket, log: Path, n_before: int
) -> str | None:
    """Return once the daemon is ready, or what it said before it ended.

    `n_before` bytes of its log are of earlier ones.
    """
    # Short receives, so that a daemon that dies at once is noticed at once.
    ready.settimeout(0.1)
    for _ in range(int(_START_TIMEOUT_S / 0.1)):
        try:
            if b"READY=1" in ready.recv(4096):
                return None
        except TimeoutError:
            if process.poll() is not None:
                break
    else:
        process.terminate()
    lines = log.read_bytes()[n_before:].decode(errors="replace").splitlines()
    # What a command that fails says at last; else whatever is there.
    said = [line.removeprefix(_ERROR) for line in lines if line.startswith(_ERROR)] or lines
    return "\n".join(said[-5:])
