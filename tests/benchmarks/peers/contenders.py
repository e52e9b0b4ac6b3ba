"""What is measured: each contender in a process of its own, with the same model and settings."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from shimpy.gguf.arch import describe_model
from shimpy.gguf.reader import read_header
from shimpy.names import name_from_stem
from shimpy.placement.placement import PlanOptions
from shimpy.placement.planner import plan_model
from shimpy.placement.probe import probe_hardware
from shimpy.protocol.context import n_cells
from shimpy.scheduler.worker import CPU_WORKER_ENV
from tests.daemon import running_daemon

_HERE = Path(__file__).parent
_START_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What all contenders are started with."""

    path: Path
    n_ctx: int = 16384
    n_slots: int = 16
    n_threads: int = 2
    embeds: bool = False
    # Tokens that shimpy's slots hold before anything is measured: as many as most scenarios use.
    n_warm: int = 320

    @property
    def model(self) -> str:
        """The model's name in requests."""
        return str(name_from_stem(self.path.stem))


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A contender that speaks OpenAI's dialect."""

    name: str
    url: str
    model: str
    process: psutil.Process
    log: Path | None = None


@dataclass(frozen=True, slots=True)
class BareLoop:
    """The bare loop, which takes jobs instead of requests."""

    pipes: subprocess.Popen[str]
    process: psutil.Process
    name: str = field(default="bare", init=False)

    def ask(self, **job: Any) -> Any:
        """Have a job done and return its answer."""
        assert self.pipes.stdin is not None
        assert self.pipes.stdout is not None
        self.pipes.stdin.write(json.dumps(job) + "\n")
        self.pipes.stdin.flush()
        return json.loads(self.pipes.stdout.readline())


Contender = Server | BareLoop


def cpu_s(process: psutil.Process, *, with_children: bool) -> float:
    """Return the CPU seconds that a process has taken, with those of its workers or without."""
    processes = [process, *(process.children(recursive=True) if with_children else [])]
    return sum(_cpu_ns(one.pid) for one in processes) / 1e9


def _cpu_ns(pid: int) -> int:
    """Return the CPU time of a process; /proc has it in hundredths of a second only.

    clock_getcpuclockid(3) of it, as glibc computes it (CPUCLOCK_SCHED in the kernel's
    include/linux/posix-timers.h).
    """
    return time.clock_gettime_ns((~pid << 3) | 2)


@contextlib.contextmanager
def start(name: str, setup: Setup, peers_python: str) -> Iterator[Contender]:
    """Start one contender, with its model loaded where it loads models at its start."""
    match name:
        case "shimpy":
            starting = _shimpy(setup)
        case "bare":
            starting = _bare(setup)
        case "xllamacpp":
            starting = _xllamacpp(setup, peers_python)
        case _:
            starting = _llama_cpp(setup, peers_python)
    with starting as contender:
        yield contender


def is_installed(name: str, peers_python: str) -> bool:
    """Whether a contender can be started at all."""
    needs = {"xllamacpp": "xllamacpp", "llama_cpp.server": "llama_cpp.server.app"}.get(name)
    if needs is None:
        return True
    argv = [peers_python, "-c", f"import {needs}"]
    return subprocess.run(argv, check=False, capture_output=True).returncode == 0


@contextlib.contextmanager
def _shimpy(setup: Setup) -> Iterator[Contender]:
    flags = ["--n-ctx", str(setup.n_ctx), "--n-slots", str(setup.n_slots), "--keep-alive", "-1"]
    if setup.embeds:
        flags = ["--keep-alive", "-1"]
    with (
        _folder() as home,
        running_daemon(
            home,
            setup.path.parent,
            *flags,
            threads=setup.n_threads,
            environ={"SHIMPY_LOG_FORMAT": "json"},
        ) as daemon,
    ):
        yield Server(
            name="shimpy",
            url=daemon.url,
            model=setup.model,
            process=psutil.Process(daemon.process.pid),
            log=daemon.log,
        )


@contextlib.contextmanager
def echo() -> Iterator[str]:
    """Run a server that does nothing; yield its URL."""
    with _process([sys.executable, "-m", "tests.benchmarks.peers.echo"]) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()


@contextlib.contextmanager
def _bare(setup: Setup) -> Iterator[Contender]:
    argv = [sys.executable, "-m", "tests.benchmarks.peers.bare", _as_placed(setup)]
    with _process(argv, env=CPU_WORKER_ENV) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == '"ready"'
        yield BareLoop(process, psutil.Process(process.pid))


@contextlib.contextmanager
def _xllamacpp(setup: Setup, peers_python: str) -> Iterator[Contender]:
    argv = [peers_python, str(_HERE / "serve_xllamacpp.py"), _as_json(setup)]
    with _process(argv) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        yield _server("xllamacpp", url, setup, process.pid)


@contextlib.contextmanager
def _llama_cpp(setup: Setup, peers_python: str) -> Iterator[Contender]:
    settings: dict[str, Any] = {
        "model": str(setup.path),
        "model_alias": setup.model,
        # It computes one answer at a time, and its cache is one conversation's.
        "n_ctx": 512 if setup.embeds else min(setup.n_ctx, 4096),
        "n_threads": setup.n_threads,
        "n_threads_batch": setup.n_threads,
        "n_gpu_layers": 0,
        "verbose": False,
        "embedding": setup.embeds,
    }
    with _folder() as home, _process_of(peers_python, home, [settings]) as (process, url):
        yield _server("llama_cpp.server", url, setup, process.pid)


@contextlib.contextmanager
def llama_cpp_url(peers_python: str, home: Path, models: list[dict[str, Any]]) -> Iterator[str]:
    """Run llama-cpp-python's server for some models, of which it holds one at a time."""
    with _process_of(peers_python, home, models) as (_, url):
        yield url


@contextlib.contextmanager
def _process_of(
    peers_python: str, home: Path, models: list[dict[str, Any]]
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # A new request would break off the one that runs.
    config = {"port": port, "interrupt_requests": False, "models": models}
    file = home / "config.json"
    file.write_text(json.dumps(config), encoding="utf-8")
    argv = [peers_python, str(_HERE / "serve_llama_cpp.py"), "--config_file", str(file)]
    with _process(argv) as process:
        url = f"http://127.0.0.1:{port}"
        wait_for(f"{url}/v1/models", process)
        yield process, url


def wait_for(url: str, process: subprocess.Popen[str]) -> None:
    """Wait until something answers there."""
    deadline_s = time.monotonic() + _START_TIMEOUT_S
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):  # noqa: S310 - a URL of our own
                return
        except (urllib.error.URLError, ConnectionError):
            assert process.poll() is None, f"{process.args!r} ended with {process.returncode}"
            assert time.monotonic() < deadline_s, f"nothing answers at {url}"
            time.sleep(0.01)


@contextlib.contextmanager
def _process(
    argv: Sequence[str], env: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, **(env or {})},
        )
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="shimpy-peers-") as path:
        yield Path(path)


def _server(name: str, url: str, setup: Setup, pid: int) -> Server:
    return Server(name=name, url=url, model=setup.model, process=psutil.Process(pid))


def _as_placed(setup: Setup) -> str:
    """Return the settings, the KV cache as the daemon places it on this machine."""
    shape = describe_model(read_header(setup.path))
    options = PlanOptions(n_ctx=setup.n_ctx, n_slots=setup.n_slots)
    chosen = plan_model(shape, probe_hardware(), options).chosen
    assert chosen is not None
    placement = chosen.placement
    assert not placement.devices
    assert not placement.flash_attn
    n_ctx = n_cells(placement.n_ctx, flash_attn=False, n_ctx_original=shape.n_ctx_original)
    return _as_json(setup, n_ctx=n_ctx, kv_unified=placement.kv_unified)


def _as_json(setup: Setup, **other: Any) -> str:
    return json.dumps(
        {
            "path": str(setup.path),
            "n_ctx": setup.n_ctx,
            "n_slots": setup.n_slots,
            "n_threads": setup.n_threads,
            "embeds": setup.embeds,
            **other,
        }
    )
