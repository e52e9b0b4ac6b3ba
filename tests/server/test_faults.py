"""What the machine does to a daemon: full disks, read-only stores, files that change under it.

Others are where their part is tested: a corrupt index in tests/registry, every way a worker can
die in tests/scheduler/test_deaths.py, crashes in the middle of a write in
tests/registry/test_store_crash.py, file descriptors and lying bodies in test_connections.py,
kill -9 of the daemon in test_daemon.py.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import msgspec
import pytest

from tests.daemon import Daemon, running_daemon
from tests.synthetic import CHAIN_TEXT, write_chain, write_llama

pytestmark = pytest.mark.slow

BODY = {"model": "chain", "prompt": "hi", "max_tokens": 64, "stream": False}
TIMEOUT_S = 50.0
STRACE = (
    shutil.which("strace") is not None
    and subprocess.run(["strace", "-qq", "true"], capture_output=True, check=False).returncode == 0
)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    write_chain(folder / "chain.gguf")
    write_chain(folder / "endless.gguf", endless=True)
    return folder


def client_of(daemon: Daemon) -> httpx.Client:
    return httpx.Client(base_url=daemon.url, timeout=TIMEOUT_S, trust_env=False)


def answer(client: httpx.Client) -> str:
    response = client.post("/api/generate", json=BODY)
    assert response.status_code == 200, response.text
    return str(response.json()["response"])


needs_mount = pytest.mark.skipif(
    os.geteuid() != 0
    or subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode
    != 0,
    reason="needs the right to mount",
)


@contextmanager
def small_disk(path: Path, n_bytes: int) -> Iterator[None]:
    path.mkdir()
    options = f"size={n_bytes}"
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)],
        check=False,
        capture_output=True,
    )
    if made.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def fill(path: Path) -> None:
    """Write until there is no room."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)


@needs_mount
def test_a_full_disk_refuses_what_writes_and_serves_the_rest(tmp_path: Path, models: Path) -> None:
    home = tmp_path / "home"
    with (
        small_disk(home, 8 * 1024 * 1024),
        running_daemon(home, models) as daemon,
        client_of(daemon) as client,
    ):
        hog = home / "hog"
        fill(hog)
        data = os.urandom(300_000)
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        refused = client.post(f"/api/blobs/{digest}", content=data)
        assert refused.status_code == 507, refused.text
        assert "free" in refused.text or "room" in refused.text
        setting = client.post("/api/settings", json={"model": "chain", "system": "x" * 5000})
        assert setting.status_code in {200, 507}, setting.text
        # Models that are here work on, and with room again everything does.
        assert answer(client) == CHAIN_TEXT
        assert daemon.shimpy("list").returncode == 0
        hog.unlink()
        again = client.post("/api/copy", json={"source": "chain", "destination": "other"})
        assert again.status_code == 200, again.text
        assert client.head(f"/api/blobs/{digest}").status_code == 404


@needs_mount
def test_a_store_that_became_read_only_serves_and_says_so(tmp_path: Path, models: Path) -> None:
    home = tmp_path / "home"
    with (
        small_disk(home, 8 * 1024 * 1024),
        running_daemon(home, models) as daemon,
        client_of(daemon) as client,
    ):
        log = daemon.log
        remount = ["mount", "-o", "remount,ro", str(home)]
        done = subprocess.run(remount, check=False, capture_output=True)
        if done.returncode:
            # The log is open for writing on it: bind the folders that matter read-only instead.
            data = str(home / "data")
            subprocess.run(["mount", "--bind", data, data], check=True)
            subprocess.run(["mount", "-o", "remount,bind,ro", data], check=True)
        try:
            refused = client.post("/api/copy", json={"source": "chain", "destination": "other"})
            assert refused.status_code in {422, 507}, refused.text
            assert "can't be written" in refused.json()["error"]
            assert answer(client) == CHAIN_TEXT
        finally:
            subprocess.run(["umount", "--lazy", str(home / "data")], check=False)
        assert "Traceback" not in log.read_text()


def test_a_model_that_is_replaced_is_loaded_anew(tmp_path: Path, models: Path) -> None:
    """The worker goes on with the old file, which it holds; the next request gets the new one."""
    path = models / "chain.gguf"
    with running_daemon(tmp_path / "home", models) as daemon, client_of(daemon) as client:
        assert answer(client) == CHAIN_TEXT
        (first,) = client.get("/api/ps").json()["models"]
        write_llama(tmp_path / "new.gguf")
        (tmp_path / "new.gguf").replace(path)
        assert answer(client) != CHAIN_TEXT
        (second,) = client.get("/api/ps").json()["models"]
        assert first["pid"] != second["pid"]
        assert first["digest"] != second["digest"]


def test_a_model_that_is_replaced_in_mid_answer_ends_it_well(tmp_path: Path, models: Path) -> None:
    path = models / "endless.gguf"
    body = {"model": "endless", "prompt": "x", "shift": True, "options": {"num_predict": 3000}}
    with (
        running_daemon(tmp_path / "home", models) as daemon,
        client_of(daemon) as client,
        client.stream("POST", "/api/generate", json=body) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        write_chain(tmp_path / "new.gguf")
        (tmp_path / "new.gguf").replace(path)
        assert msgspec.json.decode(list(lines)[-1])["done_reason"] == "length"


def test_a_model_that_is_cut_short_is_named_as_broken(tmp_path: Path, models: Path) -> None:
    """Under a worker that has it mapped, the read of a lost page is a SIGBUS: told as such."""
    path = models / "chain.gguf"
    with running_daemon(tmp_path / "home", models) as daemon, client_of(daemon) as client:
        assert answer(client) == CHAIN_TEXT
        os.truncate(path, path.stat().st_size // 2)
        refused = client.post("/api/generate", json=BODY)
        assert refused.status_code in {422, 500}, refused.text
        assert "Traceback" not in refused.text
        # The daemon lives, and the other model works.
        other = client.post("/api/show", json={"model": "endless"})
        assert other.status_code == 200
        assert client.get("/ready").status_code == 200


def test_a_worker_that_hangs_is_ended_and_the_model_served_again(
    tmp_path: Path, models: Path
) -> None:
    """SIGSTOP is the perfect hang: the process is there, its channel is open, nothing comes."""
    flags = ("--hang-timeout", "1s")
    with running_daemon(tmp_path / "home", models, *flags) as daemon, client_of(daemon) as client:
        assert answer(client) == CHAIN_TEXT
        (resident,) = client.get("/api/ps").json()["models"]
        os.kill(resident["pid"], signal.SIGSTOP)
        failed = client.post("/api/generate", json=BODY)
        assert failed.status_code == 500, failed.text
        assert "hang_timeout" in failed.json()["error"]
        assert answer(client) == CHAIN_TEXT
        assert 'reason="hung"' in client.get("/metrics").text


def test_the_store_is_whole_after_a_kill(tmp_path: Path, models: Path) -> None:
    home = tmp_path / "home"
    with running_daemon(home, models) as daemon, client_of(daemon) as client:
        copied = client.post("/api/copy", json={"source": "chain", "destination": "kept"})
        assert copied.status_code == 200, copied.text
        daemon.process.kill()
        daemon.process.wait()
    with running_daemon(home, models) as daemon:
        assert "kept" in daemon.shimpy("list").stdout
        assert daemon.shimpy("verify").returncode == 0


@pytest.mark.skipif(
    shutil.which("unshare") is None
    or shutil.which("ip") is None
    or subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False).returncode,
    reason="needs the right to make a network namespace",
)
def test_nothing_but_pull_needs_a_network(tmp_path: Path) -> None:
    """In a namespace with loopback alone, and with offline set: list, run, show, plan, ps, stop."""
    script = Path(__file__).with_name("no_network.py")
    calls = tmp_path / "calls"
    traced = ["strace", "-f", "-qq", "-e", "trace=connect", "-o", str(calls)] if STRACE else []
    done = subprocess.run(
        ["unshare", "--net", *traced, sys.executable, str(script), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    if STRACE:
        tried = [line for line in calls.read_text().splitlines() if "AF_INET" in line]
        assert tried, "clients connect to the daemon"
        assert [line for line in tried if '"127.0.0.1"' not in line and '"::1"' not in line] == []
