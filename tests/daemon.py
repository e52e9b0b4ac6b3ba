"""A real daemon in a process of its own, on a free port, over a folder of models."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

READY_TIMEOUT_S = 30.0
# Between looks at whether it still lives.
_LOOK_S = 0.5


def shimpy(
    *args: str, env: Mapping[str, str] | None = None, stdin: str = "", timeout: float = 60
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, as a user would; `env` is all of its environment."""
    return subprocess.run(
        [sys.executable, "-m", "shimpy", *args],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env=env,
    )


@dataclass(frozen=True, slots=True)
class Daemon:
    """A running daemon: where it listens, its process, and the environment for its clients."""

    url: str
    process: subprocess.Popen[bytes]
    env: dict[str, str]
    log: Path

    @property
    def notify_address(self) -> str:
        """Where the daemon tells of its state, as it would tell systemd."""
        return str(self.log.parent / "notify")

    def shimpy(
        self, *args: str, stdin: str = "", timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """Run a client command against this daemon."""
        return shimpy(*args, env=self.env, stdin=stdin, timeout=timeout)


def _first_state(ready: socket.socket, process: subprocess.Popen[bytes], log: Path) -> str:
    """Return what the daemon notifies first; fail as soon as it has ended."""
    deadline_s = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline_s:
        with contextlib.suppress(TimeoutError):
            return ready.recv(4096).decode()
        assert process.poll() is None, log.read_text(errors="replace")
    raise AssertionError(log.read_text(errors="replace"))


@contextlib.contextmanager
def running_daemon(
    home: Path,
    models: Path | None,
    *flags: str,
    threads: int | None = 1,
    environ: Mapping[str, str] | None = None,
    module: str = "shimpy",
) -> Iterator[Daemon]:
    """Start `shimpy serve` and wait for its READY; end it by SIGTERM.

    Workers use one thread: two would spin against each other on a busy machine. None leaves
    the number to the daemon. Other tools' stores on this machine are left out; `environ` is
    more for the daemon's environment, and its clients'. `module` may be one that runs shimpy
    on another machine than this one.
    """
    home.mkdir(parents=True, exist_ok=True)
    env = {k: v for k, v in os.environ.items() if not k.startswith("SHIMPY_")}
    env |= {"SHIMPY_HOME": str(home), "SHIMPY_STORES": "none"}
    if threads is not None:
        env["SHIMPY_N_THREADS"] = str(threads)
    env |= environ or {}
    log = home / "serve.log"
    bind = ["--bind", "127.0.0.1:0"]
    folders = [] if models is None else ["--model-dirs", str(models)]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready, log.open("wb") as output:
        address = home / "notify"
        address.unlink(missing_ok=True)
        ready.bind(str(address))
        ready.settimeout(_LOOK_S)
        process = subprocess.Popen(
            [sys.executable, "-m", module, "serve", *bind, *folders, *flags],
            env={**env, "NOTIFY_SOCKET": str(address)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
        try:
            state = _first_state(ready, process, log)
            url = re.search(r"(?:https?://|unix:)\S+", state)
            assert "READY=1" in state, state
            assert url is not None, state
            yield Daemon(url[0], process, {**env, "SHIMPY_HOST": url[0]}, log)
        finally:
            process.terminate()
            try:
                process.wait(30)
            finally:
                process.kill()
