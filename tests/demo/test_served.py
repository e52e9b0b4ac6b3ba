"""The demo model through the real daemon, as its card and the README promise."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.daemon import Daemon, running_daemon


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("demo")
    (folder / "models").mkdir()
    with running_daemon(folder / "home", folder / "models") as running:
        yield running


def ask(daemon: Daemon, path: str, **body: Any) -> dict[str, Any]:
    response = httpx.post(
        f"{daemon.url}{path}", json={"model": "demo", "stream": False, **body}, timeout=60
    )
    answer: dict[str, Any] = response.json()
    assert response.status_code == 200, answer
    return answer


def test_it_is_listed_whatever_the_folders(daemon: Daemon) -> None:
    models = json.loads(daemon.shimpy("list", "--json").stdout)
    assert [(model["name"], model["source"]) for model in models] == [("demo:latest", "built-in")]


def test_run_completes_a_function(daemon: Daemon) -> None:
    done = daemon.shimpy("run", "demo", "def fibonacci(n):", "-o", "seed=1")
    assert done.returncode == 0
    # A body, or a remark and a body: what it says exactly may differ from CPU to CPU.
    assert "    " in done.stdout


def test_greedy_completion_is_indented_python(daemon: Daemon) -> None:
    answer = ask(
        daemon,
        "/api/generate",
        prompt="import os\n\ndef read_file(path):\n",
        options={"temperature": 0, "num_predict": 24},
    )
    assert answer["response"].startswith("    ")


@pytest.mark.parametrize(
    ("prefix", "suffix", "gap"),
    [
        ("def is_even(n):\n    ", "\n\nassert is_even(2)\n", "    return n "),
        (
            "    try:\n        value = int(text)\n    except ",
            ":\n        return None\n",
            "ValueError",
        ),
    ],
)
def test_a_gap_is_filled_and_ends(daemon: Daemon, prefix: str, suffix: str, gap: str) -> None:
    options = {"temperature": 0, "num_predict": 16}
    filled = ask(daemon, "/api/generate", prompt=prefix, suffix=suffix, options=options)
    assert filled["response"].startswith(gap)
    assert filled["done_reason"] == "stop"


def test_it_chats(daemon: Daemon) -> None:
    answer = ask(
        daemon,
        "/api/chat",
        messages=[{"role": "user", "content": "Write a function that reads a file."}],
        options={"temperature": 0, "num_predict": 64},
    )
    assert answer["message"]["content"].strip()


def test_eight_streams_at_once_each_get_an_answer_of_their_own(daemon: Daemon) -> None:
    names = ["parse", "read", "write", "close", "open", "send", "split", "join"]

    async def stream(client: httpx.AsyncClient, name: str) -> tuple[str, str]:
        body = {
            "model": "demo",
            "prompt": f"def {name}(self):\n",
            "options": {"temperature": 0, "num_predict": 24},
        }
        text, last = "", {}
        async with client.stream("POST", f"{daemon.url}/api/generate", json=body) as answer:
            async for line in answer.aiter_lines():
                last = json.loads(line)
                text += last["response"]
        return text, last["done_reason"]

    async def all_at_once() -> list[tuple[str, str]]:
        async with httpx.AsyncClient(timeout=60) as client:
            return await asyncio.gather(*(stream(client, name) for name in names))

    answers = asyncio.run(all_at_once())
    assert all(text.strip() and reason in {"stop", "length"} for text, reason in answers)
    assert len({text for text, _ in answers}) > 4


def test_plan_shows_its_experts(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "shimpy", "plan", "demo", "--vram", "8GiB", "--json"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={"SHIMPY_HOME": str(tmp_path), "SHIMPY_HOST": "127.0.0.1:9", "PATH": "/usr/bin:/bin"},
    )
    assert json.loads(done.stdout)["experts"] == {
        "n_expert": 20,
        "n_expert_used": 6,
        "n_expert_shared": 2,
        "tensors": 21,
        "bytes": json.loads(done.stdout)["experts"]["bytes"],
    }
