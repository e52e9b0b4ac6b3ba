"""`shimpy pull` and its kin, with real daemons that are killed, from a hub that fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.daemon import Daemon, running_daemon
from tests.hub_server import Fault, HubServer
from tests.synthetic import CHAIN_TEXT

NAME = "hf.co/org/chain-gguf:q8_0"


@pytest.fixture
def hub(chain_model: Path) -> Iterator[HubServer]:
    with HubServer().running() as server:
        server.add("org/Chain-GGUF", {"Chain-Q8_0.gguf": chain_model})
        yield server


@pytest.fixture(scope="module")
def shared_hub(chain_model: Path) -> Iterator[HubServer]:
    """For tests that only add to it; each has a repository of its own."""
    with HubServer().running() as server:
        for name in ("Chain", "Run", "Gated", "Mine"):
            server.add(f"org/{name}-GGUF", {f"{name}-Q8_0.gguf": chain_model})
        server.ollama["library/tiny:1b"] = [("model", chain_model.read_bytes())]
        yield server


@contextmanager
def daemon_at(folder: Path, hub: HubServer, *flags: str) -> Iterator[Daemon]:
    """A daemon whose hub is the server; it waits long for bytes, so that a stall lasts."""
    (folder / "models").mkdir(exist_ok=True)
    (folder / "home" / "config").mkdir(parents=True, exist_ok=True)
    environ = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_DOWNLOAD_TIMEOUT": "60",
        "HF_TOKEN": "",
    }
    with running_daemon(folder / "home", folder / "models", *flags, environ=environ) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pull")


@pytest.fixture(scope="module")
def daemon(home: Path, shared_hub: HubServer) -> Iterator[Daemon]:
    """Over the shared hub."""
    with daemon_at(home, shared_hub) as running:
        yield running


def listed(daemon: Daemon) -> list[str]:
    """All models but the one that comes with shimpy, where it does."""
    models = json.loads(daemon.shimpy("list", "--json").stdout)
    return [model["name"] for model in models if model["name"] != "demo:latest"]


def test_pull_prints_the_name_on_stdout_and_the_rest_on_stderr(daemon: Daemon) -> None:
    done = daemon.shimpy("pull", "hf.co/org/Chain-GGUF")
    assert (done.returncode, done.stdout) == (0, f"{NAME}\n")
    steps = done.stderr.splitlines()
    assert steps[0] == "pulling manifest"
    assert "will run on the CPU alone" in steps[1]
    assert steps[-1] == "success"
    assert NAME in listed(daemon)


def test_run_pulls_what_is_not_here_and_answers(daemon: Daemon) -> None:
    done = daemon.shimpy("run", "hf.co/org/Run-GGUF", "hello")
    assert (done.returncode, done.stdout) == (0, f"{CHAIN_TEXT}\n")
    assert "is not on this machine" in done.stderr
    again = daemon.shimpy("run", "hf.co/org/run-gguf", "hello")
    assert (again.stdout, again.stderr) == (f"{CHAIN_TEXT}\n", "")


def test_run_takes_a_place_too(daemon: Daemon, shared_hub: HubServer) -> None:
    place = f"ollama:http://127.0.0.1:{shared_hub.port}/library/tiny:1b"
    assert daemon.shimpy("run", place, "hello").stdout == f"{CHAIN_TEXT}\n"


def test_run_of_what_nobody_knows_says_what_both_know(daemon: Daemon) -> None:
    done = daemon.shimpy("run", "nope", "hello")
    assert (done.returncode, done.stdout) == (1, "")
    assert 'there is no model "nope:latest"' in done.stderr
    assert 'the catalog has no "nope"' in done.stderr


def test_run_of_a_mistyped_name_says_once_what_was_meant(daemon: Daemon) -> None:
    done = daemon.shimpy("run", "dmeo", "hello")
    _, there, catalog = done.stderr.splitlines()
    assert there.endswith('there is no model "dmeo:latest"; did you mean demo?')
    assert 'the catalog has no "dmeo". `shimpy catalog` lists what it has;' in catalog


def test_a_failed_pull_exits_1_with_the_hubs_reason(daemon: Daemon, shared_hub: HubServer) -> None:
    shared_hub.repos["org/Gated-GGUF"].is_gated = True
    done = daemon.shimpy("pull", "hf.co/org/Gated-GGUF")
    assert done.returncode == 1
    assert "Access to model org/Gated-GGUF is restricted" in done.stderr


@pytest.mark.slow
def test_offline_refuses(tmp_path: Path, hub: HubServer) -> None:
    with daemon_at(tmp_path, hub, "--offline") as daemon:
        done = daemon.shimpy("pull", "hf.co/org/Chain-GGUF")
        assert done.returncode == 1
        assert "`offline` is on" in done.stderr
        assert hub.seen == []


def test_the_catalog_is_listed_and_checked(home: Path, daemon: Daemon) -> None:
    own = home / "home" / "config" / "registry.toml"
    own.write_text(
        '[models.mine]\ntitle = "Mine"\nrepo = "org/Mine-GGUF"\n'
        '[models.gone]\ntitle = "Gone"\nrepo = "org/gone"\n'
        '[models.other]\ntitle = "Other"\ntags = { q2_k = "org/Mine-GGUF" }\n'
    )
    table = daemon.shimpy("catalog")
    assert "deepseek-moe-16b" in table.stdout
    assert "grin-moe can't be pulled" in table.stderr
    rows = json.loads(daemon.shimpy("catalog", "--json").stdout)
    assert "mine" in [row["name"] for row in rows]
    good = daemon.shimpy("catalog", "check", "mine")
    assert (good.returncode, good.stdout) == (0, "mine: ok (q8_0)\n")
    bad = daemon.shimpy("catalog", "check", "mine", "gone", "other")
    assert bad.returncode == 1
    assert "gone: there is no repository org/gone" in bad.stdout
    assert "other: org/Mine-GGUF has no q2_k" in bad.stdout
    found = json.loads(daemon.shimpy("catalog", "check", "--json", "gone").stdout)
    assert found[0]["problems"]
    assert daemon.shimpy("catalog", "check", "nope").returncode == 1


@contextmanager
def pulling(daemon: Daemon) -> Iterator[subprocess.Popen[bytes]]:
    """A pull as a process of its own."""
    argv = [sys.executable, "-m", "shimpy", "pull", "hf.co/org/Chain-GGUF"]
    pipe = subprocess.PIPE
    with subprocess.Popen(argv, env=daemon.env, stdout=pipe, stderr=pipe) as process:
        try:
            yield process
        finally:
            process.kill()


def stall_behind(hub: HubServer, n_bytes: int) -> None:
    """Let the pull come so far for certain, then hang: what came before a cut is written."""
    hub.faults = [Fault(), Fault(drop_after=n_bytes), Fault(stall_after=1)]


@pytest.mark.slow
def test_a_killed_daemon_lists_nothing_half_made_and_goes_on(
    tmp_path: Path, hub: HubServer, chain_model: Path
) -> None:
    """Killed with -9 in mid-pull: the next daemon has the beginning, and fetches the rest."""
    stall_behind(hub, 1_200_000)
    with daemon_at(tmp_path, hub) as daemon, pulling(daemon) as pull:
        hub.wait_stalled()
        os.kill(daemon.process.pid, signal.SIGKILL)
        daemon.process.wait(10)
        _, said = pull.communicate(timeout=20)
        assert pull.returncode == 1
        assert b"Error" in said
    hub.go_on()
    (partial,) = (tmp_path / "home" / "data" / "store" / "partial").iterdir()
    begun = partial.stat().st_size
    assert begun >= 1_200_000
    with daemon_at(tmp_path, hub) as daemon:
        assert listed(daemon) == []
        hub.seen.clear()
        assert daemon.shimpy("pull", "hf.co/org/Chain-GGUF").returncode == 0
        assert listed(daemon) == [NAME]
        assert daemon.shimpy("verify").returncode == 0
    rest = [s.n_bytes for s in hub.seen if s.range == f"bytes={begun}-" and s.where == "storage"]
    assert rest == [chain_model.stat().st_size - begun]
    assert not partial.exists()


@pytest.mark.slow
def test_a_daemon_that_is_stopped_in_mid_pull_ends_soon_and_keeps_what_came(
    tmp_path: Path, hub: HubServer
) -> None:
    stall_behind(hub, 1_200_000)
    with daemon_at(tmp_path, hub) as daemon, pulling(daemon) as pull:
        hub.wait_stalled()
        daemon.process.terminate()
        assert daemon.process.wait(20) == 0
        _, said = pull.communicate(timeout=20)
        assert b"what came is kept" in said
    (partial,) = (tmp_path / "home" / "data" / "store" / "partial").iterdir()
    assert partial.stat().st_size >= 1_200_000
    with daemon_at(tmp_path, hub) as daemon:
        assert listed(daemon) == []


@pytest.mark.slow
def test_a_client_that_is_interrupted_stops_the_pull(tmp_path: Path, hub: HubServer) -> None:
    stall_behind(hub, 1_200_000)
    with daemon_at(tmp_path, hub) as daemon:
        with pulling(daemon) as pull:
            hub.wait_stalled()
            pull.send_signal(signal.SIGINT)
            pull.wait(10)
        hub.go_on()
        assert listed(daemon) == []
        done = daemon.shimpy("pull", "hf.co/org/Chain-GGUF")
        assert done.returncode == 0, done.stderr
        assert listed(daemon) == [NAME]
