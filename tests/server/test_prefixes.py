"""A prompt's KV cache outlives its worker, seen from the outside: `shimpy serve` and its APIs."""

from __future__ import annotations

import json
import stat
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from shimpy.server.prefixes import Swept, sweep
from tests.daemon import Daemon, running_daemon

pytestmark = pytest.mark.slow

LONG = "Once upon a time there was a fox, and the end. " * 20
LONGER = LONG + "And then there was a question. " * 20
_TIMEOUT_S = 50.0


@pytest.fixture
def models(tmp_path: Path, llama_model: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "llama.gguf").symlink_to(llama_model)
    return folder


def client_of(daemon: Daemon) -> httpx.Client:
    return httpx.Client(base_url=daemon.url, timeout=_TIMEOUT_S)


def ask(client: httpx.Client, prompt: str = LONG) -> tuple[str, int, int]:
    """Return the answer, the prompt's tokens, and how many of them were cached."""
    body = {"model": "llama", "prompt": prompt, "temperature": 0, "max_tokens": 12}
    answer = client.post("/v1/completions", json=body).json()
    usage = answer["usage"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return answer["choices"][0]["text"], usage["prompt_tokens"], cached


def unload(client: httpx.Client) -> dict[str, Any]:
    """Unload the model as `shimpy stop` does; return the event that tells what was saved."""
    with client.stream("GET", "/api/events", params={"since": "1m"}) as events:
        client.post("/api/generate", json={"model": "llama", "keep_alive": 0}).raise_for_status()
        for line in events.iter_lines():
            if line.startswith("data: "):
                event: dict[str, Any] = json.loads(line.removeprefix("data: "))
                if event["kind"] == "saved":
                    return event
    raise AssertionError("nothing was saved")


def prefix_files(home: Path) -> list[Path]:
    return sorted((home / "cache" / "prefixes").rglob("*.kv"))


def test_a_prompt_is_computed_once_over_unloads_and_restarts(tmp_path: Path, models: Path) -> None:
    home = tmp_path / "home"
    with running_daemon(home, models) as daemon, client_of(daemon) as client:
        first, n_prompt, n_cached = ask(client)
        assert n_cached == 0
        event = unload(client)
        assert (event["model"], event["n_tokens"]) == ("llama:latest", n_prompt + 11)
        again = ask(client)
        assert again == (first, n_prompt, n_prompt - 1)
        metrics = client.get("/metrics").text
        name = 'shimpy_prefix_tokens_total{kind="%s",model="llama:latest"}'
        for kind in ("saved", "restored"):
            assert f"{name % kind} {float(event['n_tokens'])}" in metrics
        # The daemon ends with the model loaded, and more in its cache than is on disk.
        longer, n_longer, n_cached = ask(client, LONGER)
        assert n_cached >= n_prompt - 1
    [path] = prefix_files(home)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.parent.stat().st_mode) == 0o700
    with running_daemon(home, models) as daemon, client_of(daemon) as client:
        assert ask(client, LONGER) == (longer, n_longer, n_longer - 1)
        path.write_bytes(path.read_bytes()[:-1000])
    with running_daemon(home, models) as daemon, client_of(daemon) as client:
        assert ask(client, LONGER) == (longer, n_longer, 0)
        assert "prefix_discarded" in daemon.log.read_text()
        unload(client)
        assert prefix_files(home)
        assert daemon.shimpy("gc", "--prefixes").returncode == 0
        assert not prefix_files(home)


def parked_bytes(client: httpx.Client, least: int) -> int:
    """Return what the worker says that it has parked, once it is as much; it tells now and then."""
    n_bytes, until_s = 0, time.monotonic() + _TIMEOUT_S
    while time.monotonic() < until_s:
        [resident] = client.get("/api/ps").json()["models"]
        if (n_bytes := int(resident["parked_bytes"] or 0)) >= least:
            return n_bytes
    raise AssertionError(f"{n_bytes} bytes are parked")


def talk(client: httpx.Client) -> list[tuple[str, int, int]]:
    """Let three conversations and an editor take turns."""
    chats = {name: f"{name}. {LONG}" for name in ("Ann", "Bob", "Cleo")}
    source = "def fox(end): return end\n" * 20
    answers = []
    for turn in range(3):
        for name, chat in chats.items():
            answers.append(ask(client, chat))
            chats[name] = f"{chat}{answers[-1][0]} And turn {turn}? "
            # The cursor has moved on by a line.
            source += f"line {len(answers)}\n"
            answers.append(ask(client, source))
    return answers


def test_conversations_and_an_editor_in_turns_keep_their_caches(
    tmp_path: Path, models: Path
) -> None:
    """Of four that take turns two have slots; each goes on from all but some last tokens."""
    home = tmp_path / "home"
    with running_daemon(home, models, "--n-slots", "2") as daemon, client_of(daemon) as client:
        answers = talk(client)
        for index, (_, n_prompt, n_cached) in enumerate(answers):
            is_new = index in (0, 1, 2, 4)
            assert (n_cached < 16) if is_new else n_cached >= n_prompt - 48
        assert parked_bytes(client, 3 * 1000) < 1 << 30
    assert len(prefix_files(home)) == 4
    with running_daemon(home, models, "--n-slots", "2") as daemon, client_of(daemon) as client:
        assert [cached > 0 for _, _, cached in talk(client)] == [True] * len(answers)
    flags = ("--parked-cache-size", "0", "--prefix-cache-size", "0", "--n-slots", "2")
    with (
        running_daemon(tmp_path / "other", models, *flags) as daemon,
        client_of(daemon) as client,
    ):
        without = talk(client)
        assert sum(n_cached for _, _, n_cached in without) < sum(answer[2] for answer in answers)
        assert [answer[:2] for answer in without] == [answer[:2] for answer in answers]


def test_prefixes_of_models_that_have_gone_are_swept(tmp_path: Path) -> None:
    """And nothing else: no file beside them, nothing behind a link."""
    root, elsewhere = tmp_path / "prefixes", tmp_path / "elsewhere"
    for name in ("a" * 32, "b" * 32):
        (root / name).mkdir(parents=True)
        (root / name / "x.kv").write_bytes(b"123")
    (root / "lock").touch()
    elsewhere.mkdir()
    (elsewhere / "precious").touch()
    (root / ("c" * 32)).symlink_to(elsewhere)
    assert sweep(root, ["a" * 64]) == Swept(1, 3)
    assert sorted(path.name[0] for path in root.iterdir()) == ["a", "c", "l"]
    assert (elsewhere / "precious").exists()
    assert sweep(tmp_path / "none", []) == Swept()


def test_nothing_is_kept_where_that_is_switched_off(tmp_path: Path, models: Path) -> None:
    home = tmp_path / "home"
    with running_daemon(home, models, "--prefix-cache-size", "0") as daemon:
        with client_of(daemon) as client:
            ask(client)
        assert not prefix_files(home)
    assert not (home / "cache" / "prefixes").exists()
