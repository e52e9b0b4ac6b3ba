"""One real daemon for all clients, over synthetic models."""

from __future__ import annotations

import gc
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.chat.templates import QWEN3
from tests.daemon import Daemon, running_daemon
from tests.synthetic import write_chain

CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln"}}\n</tool_call>'


# Enough that an answer is still being written when its worker is killed.
ENDLESS_CTX = 1 << 18


@pytest.fixture(scope="session")
def daemon(
    tmp_path_factory: pytest.TempPathFactory,
    chain_model: Path,
    llama_model: Path,
    bert_model: Path,
) -> Iterator[Daemon]:
    """Its models: chain and endless say a known text, llama is noise, bert embeds.

    thinker and caller say known texts in Qwen's format: a thought and an answer, a call.
    """
    folder = tmp_path_factory.mktemp("clients")
    shutil.copy(chain_model, folder / "chain.gguf")
    shutil.copy(llama_model, folder / "llama.gguf")
    shutil.copy(bert_model, folder / "bert.gguf")
    write_chain(folder / "endless.gguf", endless=True, n_ctx_train=ENDLESS_CTX)
    thought = "<think>\nRivers first.\n</think>\n\nThe Rhine flows there."
    write_chain(folder / "thinker.gguf", thought, chat_template=QWEN3)
    write_chain(folder / "caller.gguf", f"I look it up.\n{CALL}", chat_template=QWEN3)
    flags = ("--n-ctx", "2048", "--n-slots", "4")
    with running_daemon(tmp_path_factory.mktemp("home"), folder, *flags) as running:
        yield running


def kill_endless(url: str) -> None:
    """Kill the worker that writes without end."""
    listed = httpx.get(f"{url}/api/ps", trust_env=False).json()["models"]
    (pid,) = (
        model["pid"]
        for model in listed
        if model["name"] == "endless:latest" and model["state"] == "ready"
    )
    os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module", autouse=True)
def _leave_nothing_behind() -> Iterator[None]:
    """Close what a client left open while its module's own warning filters still count."""
    yield
    gc.collect()


@pytest.fixture(scope="session")
def url(daemon: Daemon) -> str:
    return daemon.url
