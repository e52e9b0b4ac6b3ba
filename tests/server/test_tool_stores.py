"""A person with models in five tools' stores uses them at once, and nothing there changes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.daemon import Daemon, running_daemon
from tests.registry import layouts
from tests.registry.layouts import fingerprint, put
from tests.synthetic import write_chain

# What each tool's model says: the file that answered is the one that was meant.
SAYS = {
    "huggingface": ("tiny-hub:q8_0", "hf.co/Org/Tiny-Hub-GGUF:Q8_0", "out of the hub"),
    "ollama": ("qwen3:8b", "qwen3:8b", "out of ollama"),
    "lmstudio": ("studio:q8_0", "publisher/studio-gguf:q8_0", "out of the studio"),
    "llama.cpp": ("cached:q8_0", "hf.co/org/cached-gguf:q8_0", "out of the cache"),
    "ramalama": ("smollm:135m", "ollama/library/smollm:135m", "out of the barn"),
}


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home of somebody who has them all."""
    user = tmp_path_factory.mktemp("user")
    sources = tmp_path_factory.mktemp("sources")
    models = {
        tool: write_chain(sources / f"{tool}.gguf", text) for tool, (_, _, text) in SAYS.items()
    }
    layouts.hub_repo(
        user / ".cache/huggingface/hub",
        "Org/Tiny-Hub-GGUF",
        {"tiny-hub-Q8_0.gguf": models["huggingface"]},
    )
    layouts.ollama_model(
        user / ".ollama/models",
        "registry.ollama.ai/library/qwen3/8b",
        models["ollama"],
        layers={
            "template": "{{ .System }}\n{{ .Prompt }}",
            "system": "You are kind.",
            "params": {"num_ctx": 512, "stop": ["<|im_end|>"]},
            "license": ["MIT"],
        },
    )
    put(
        user / ".lmstudio/models/publisher/studio-GGUF/studio-Q8_0.gguf",
        models["lmstudio"].read_bytes(),
    )
    layouts.llama_cpp_file(
        user / ".cache/llama.cpp", "org", "cached-GGUF", "cached-Q8_0.gguf", models["llama.cpp"]
    )
    layouts.ramalama_model(
        user / ".local/share/ramalama",
        "ollama/library/smollm",
        "135m",
        {"smollm": ("gguf", models["ramalama"].read_bytes())},
    )
    return user


@pytest.fixture(scope="module")
def daemon(user: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """Its stores are unchanged when it has gone."""
    folder = tmp_path_factory.mktemp("daemon")
    (folder / "models").mkdir()
    before = fingerprint(user)
    # Nothing of this machine's own user.
    environ = {"HOME": str(user), "SHIMPY_STORES": "all"} | dict.fromkeys(
        ("HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME", "OLLAMA_MODELS", "LLAMA_CACHE"), ""
    )
    with running_daemon(folder / "home", folder / "models", environ=environ) as running:
        yield running
    assert fingerprint(user) == before


def test_all_are_listed_with_where_they_come_from(daemon: Daemon) -> None:
    models = json.loads(daemon.shimpy("list", "--json").stdout)
    sources = {model["source"]: model["name"] for model in models}
    assert {tool: sources[tool] for tool in SAYS} == {
        tool: name for tool, (name, _, _) in SAYS.items()
    }
    table = daemon.shimpy("list").stdout
    for tool, (name, _, _) in SAYS.items():
        assert any(line.split()[0] == name and line.split()[-1] == tool
                   for line in table.splitlines()[1:])  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("tool", SAYS)
def test_each_runs_where_it_lies(daemon: Daemon, tool: str) -> None:
    name, alias, text = SAYS[tool]
    for wanted in (name, alias):
        assert daemon.shimpy("run", wanted, "hello").stdout == f"{text}\n"
    shown = json.loads(daemon.shimpy("show", alias, "--json").stdout)
    assert (shown["source"], shown["details"]["family"]) == (tool, "llama")
    assert daemon.shimpy("stop", name).returncode == 0


def test_ollamas_settings_are_used_and_shown(daemon: Daemon) -> None:
    shown = json.loads(daemon.shimpy("show", "qwen3:8b", "--json").stdout)
    assert shown["template"] == "{{ .System }}\n{{ .Prompt }}"
    assert (shown["system"], shown["license"]) == ("You are kind.", "MIT")
    assert "num_ctx                        512" in shown["parameters"]
    daemon.shimpy("run", "qwen3:8b", "hello")
    (resident,) = [
        resident
        for resident in json.loads(daemon.shimpy("ps", "--json").stdout)["models"]
        if resident["name"] == "qwen3:8b"
    ]
    assert resident["context_length"] == 512


@pytest.mark.parametrize("tool", SAYS)
def test_none_is_removed(daemon: Daemon, tool: str) -> None:
    name, _, _ = SAYS[tool]
    done = daemon.shimpy("rm", name)
    assert done.returncode == 1
    assert name in done.stderr
    assert tool in done.stderr


def test_one_can_be_given_a_name_and_settings_without_a_copy(daemon: Daemon) -> None:
    assert daemon.shimpy("cp", "qwen3:8b", "kind").returncode == 0
    assert daemon.shimpy("set", "kind", "num_predict=2").returncode == 0
    assert daemon.shimpy("set", "tiny-hub:q8_0", "num_predict=2").returncode == 0
    for name, text in (("kind", SAYS["ollama"][2]), ("tiny-hub:q8_0", SAYS["huggingface"][2])):
        answer = daemon.shimpy("run", name, "x").stdout.strip()
        assert answer
        assert text.startswith(answer)
        assert answer != text
    assert daemon.shimpy("set", "tiny-hub:q8_0", "--unset", "num_predict").returncode == 0
    store = Path(daemon.env["SHIMPY_HOME"]) / "data" / "store"
    assert not (store / "blobs").exists()
    assert daemon.shimpy("rm", "kind").returncode == 0


def test_stores_can_be_switched_off(user: Path, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    environ = {"HOME": str(user), "SHIMPY_STORES": "ollama, ramalama"}
    with running_daemon(tmp_path / "home", tmp_path / "models", environ=environ) as daemon:
        models = json.loads(daemon.shimpy("list", "--json").stdout)
    assert {model["source"] for model in models} - {"built-in"} == {"ollama", "ramalama"}
