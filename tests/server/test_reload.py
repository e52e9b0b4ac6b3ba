"""A new config under a running daemon: what holds at once, what waits, and that nothing breaks."""

from __future__ import annotations

import json
import signal
import socket
from pathlib import Path

import httpx
import msgspec
import pytest

from shimpy.config import Config
from shimpy.server.reload import LIVE
from tests.daemon import Daemon, running_daemon
from tests.synthetic import write_chain

pytestmark = pytest.mark.slow


@pytest.fixture
def models(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    write_chain(folder / "endless.gguf", endless=True)
    return folder


def write_config(home: Path, text: str) -> None:
    (home / "config").mkdir(exist_ok=True)
    (home / "config" / "config.toml").write_text(text, encoding="utf-8")


def reload(daemon: Daemon) -> dict[str, list[str]]:
    done = daemon.shimpy("reload", "--json")
    assert done.returncode == 0, done.stderr
    answer: dict[str, list[str]] = json.loads(done.stdout)
    return answer


def test_every_live_setting_exists() -> None:
    assert {name for name in LIVE if not hasattr(Config(), name)} == set()


def test_what_can_be_applied_is_and_the_rest_is_named(tmp_path: Path, models: Path) -> None:
    with running_daemon(tmp_path, models) as daemon:
        assert reload(daemon) == {"applied": [], "needs_restart": []}
        page = {"Origin": "https://chat.example"}
        assert httpx.get(f"{daemon.url}/ready", headers=page, trust_env=False).status_code == 403
        write_config(
            tmp_path,
            'origins = ["https://chat.example"]\nmax_body = "1KiB"\nmax_connections = 5\n',
        )
        assert reload(daemon) == {
            "applied": ["max_body", "origins"],
            "needs_restart": ["max_connections"],
        }
        answer = httpx.get(f"{daemon.url}/ready", headers=page, trust_env=False)
        assert answer.headers["access-control-allow-origin"] == "https://chat.example"
        body = {"model": "x" * 2000}
        large = httpx.post(f"{daemon.url}/api/show", json=body, trust_env=False)
        assert large.status_code == 413


def test_a_new_log_level_holds_at_once(tmp_path: Path, models: Path) -> None:
    with running_daemon(tmp_path, models, "--log-file", str(tmp_path / "d.log")) as daemon:
        for level, name in (("error", "quiet"), ("info", "heard")):
            write_config(tmp_path, f'log_level = "{level}"\n')
            assert "log_level" in reload(daemon)["applied"]
            headers = {"X-Request-Id": name}
            httpx.get(f"{daemon.url}/ready", headers=headers, trust_env=False)
    log = (tmp_path / "d.log").read_text()
    assert '"heard"' in log
    assert '"quiet"' not in log


def test_models_in_a_new_folder_are_found(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    write_chain(other / "chain.gguf")
    # By the file, not by a flag: flags win over files.
    write_config(tmp_path, f'model_dirs = ["{tmp_path / "none"}"]\n')
    with running_daemon(tmp_path, None) as daemon:
        assert "chain" not in daemon.shimpy("list").stdout
        write_config(tmp_path, f'model_dirs = ["{other}"]\n')
        assert reload(daemon)["applied"] == ["model_dirs"]
        assert "chain" in daemon.shimpy("list").stdout


def test_a_running_answer_goes_on(tmp_path: Path, models: Path) -> None:
    body = {"model": "endless", "prompt": "x", "shift": True, "options": {"num_predict": 2000}}
    with (
        running_daemon(tmp_path, models) as daemon,
        httpx.Client(base_url=daemon.url, timeout=50, trust_env=False) as client,
        client.stream("POST", "/api/generate", json=body) as answer,
    ):
        lines = answer.iter_lines()
        next(lines)
        write_config(tmp_path, 'keep_alive = "1h"\nn_ctx = 512\nmax_queue = 1\n')
        assert reload(daemon)["applied"] == ["keep_alive", "max_queue", "n_ctx"]
        assert msgspec.json.decode(list(lines)[-1])["done_reason"] == "length"


def test_a_config_that_can_not_be_read_changes_nothing(tmp_path: Path, models: Path) -> None:
    with running_daemon(tmp_path, models) as daemon:
        write_config(tmp_path, "max_quue = 1\n")
        done = daemon.shimpy("reload")
        assert done.returncode == 2
        assert "did you mean max_queue" in done.stderr
        assert daemon.shimpy("list").returncode == 0


def test_a_hangup_reloads_and_tells_systemd_so(tmp_path: Path, models: Path) -> None:
    """RELOADING=1 with the monotonic time, then READY=1: what Type=notify-reload waits for."""
    with running_daemon(tmp_path, models) as daemon:
        address = Path(daemon.notify_address)
        address.unlink()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
            listener.bind(str(address))
            listener.settimeout(30)
            write_config(tmp_path, "max_queue = 3\n")
            daemon.process.send_signal(signal.SIGHUP)
            first = dict(line.split("=") for line in listener.recv(4096).decode().splitlines())
            assert first["RELOADING"] == "1"
            assert int(first["MONOTONIC_USEC"]) > 0
            assert listener.recv(4096) == b"READY=1"
            daemon.process.send_signal(signal.SIGTERM)
            assert listener.recv(4096) == b"STOPPING=1"
        assert daemon.process.wait(30) == 0
        assert '"applied": ["max_queue"]' in daemon.log.read_text()
