"""The wall clock is set, or the machine sleeps: stamps follow, durations do not notice."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.daemon import Daemon, running_daemon
from tests.synthetic import write_chain

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler"),
]

SOURCE = Path(__file__).with_name("wall_clock.c")
HOUR_S = 3600
# What a busy machine may take for what comes between two readings.
SLACK_S = 60


class WallClock:
    """The wall clock that a daemon and its workers see."""

    def __init__(self, folder: Path) -> None:
        library, self._file = folder / "wall_clock.so", folder / "ahead"
        argv = ["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(SOURCE), "-ldl"]
        subprocess.run(argv, check=True)
        self.set_ahead(0)
        self.environ = {"LD_PRELOAD": str(library), "WALL_CLOCK_FILE": str(self._file)}

    def set_ahead(self, seconds: int) -> None:
        """Set it so far ahead of this process's own; negative: behind."""
        with self._file.open("r+b" if self._file.exists() else "wb") as file:
            file.write(struct.pack("l", seconds))


@pytest.fixture
def clock(tmp_path: Path) -> WallClock:
    return WallClock(tmp_path)


@pytest.fixture
def daemon(tmp_path: Path, clock: WallClock) -> Iterator[Daemon]:
    models = tmp_path / "models"
    models.mkdir()
    write_chain(models / "chain.gguf")
    write_chain(models / "endless.gguf", endless=True)
    flags = ("--keep-alive", "1h", "--hang-timeout", "5m", "--n-ctx", "512")
    with running_daemon(tmp_path / "home", models, *flags, environ=clock.environ) as made:
        yield made


@pytest.fixture
def client(daemon: Daemon) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=daemon.url, timeout=50, trust_env=False) as made:
        yield made


def generate(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    body = {"model": "chain", "prompt": "x", "stream": False} | fields
    answer = client.post("/api/generate", json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def resident(client: httpx.Client, name: str) -> dict[str, Any]:
    (found,) = [m for m in client.get("/api/ps").json()["models"] if m["name"] == f"{name}:latest"]
    assert isinstance(found, dict)
    return found


def ahead_s(stamp: str) -> float:
    """How far a stamp of the daemon's lies ahead of this process's clock."""
    return datetime.fromisoformat(stamp).timestamp() - datetime.now().astimezone().timestamp()


def test_models_requests_and_conversations_outlive_jumps(
    clock: WallClock, client: httpx.Client
) -> None:
    first = client.post("/v1/responses", json={"model": "chain", "input": "x"}).json()
    pid = resident(client, "chain")["pid"]
    for hours in (30, -30, 0):
        clock.set_ahead(hours * HOUR_S)
        answer = generate(client)
        assert abs(ahead_s(answer["created_at"]) - hours * HOUR_S) < SLACK_S, "it saw the jump"
        assert answer["total_duration"] < SLACK_S * 1e9
        shown = resident(client, "chain")
        assert shown["pid"] == pid, "it was not loaded anew"
        assert abs(ahead_s(shown["expires_at"]) - (hours + 1) * HOUR_S) < SLACK_S
        again = {"model": "chain", "input": "y", "previous_response_id": first["id"]}
        assert client.post("/v1/responses", json=again).status_code == 200


def test_an_answer_goes_on_through_jumps(clock: WallClock, client: httpx.Client) -> None:
    body = {"model": "endless", "prompt": "x", "shift": True, "options": {"num_predict": 5000}}
    with client.stream("POST", "/api/generate", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        clock.set_ahead(30 * HOUR_S)
        for _ in range(10):
            next(lines)
        clock.set_ahead(-30 * HOUR_S)
        last = json.loads(list(lines)[-1])
    assert (last["done_reason"], last["eval_count"]) == ("length", 5000)
    assert 0 < last["eval_duration"] <= last["total_duration"] < SLACK_S * 1e9


def test_a_clock_that_is_set_back_keeps_no_model(clock: WallClock, client: httpx.Client) -> None:
    with client.stream("GET", "/api/events") as events:
        lines = events.iter_lines()
        generate(client, keep_alive="200ms")
        clock.set_ahead(-30 * HOUR_S)
        sent = (line.removeprefix("data: ") for line in lines if line.startswith("data: "))
        kinds = (json.loads(line)["kind"] for line in sent)
        assert "unload" in kinds, "the stream ends only with the daemon"
