"""Fixtures that several test packages share: synthetic models, written once a session."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest
import structlog

from shimpy import logs
from tests.synthetic import (
    write_bert,
    write_chain,
    write_deepseek,
    write_llama,
    write_mixtral,
    write_qwen3moe,
)


@pytest.fixture(scope="session")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the session's models; tests must not write to them."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def llama_model(models_dir: Path) -> Path:
    return write_llama(models_dir / "llama.gguf")


@pytest.fixture(scope="session")
def mixtral_model(models_dir: Path) -> Path:
    return write_mixtral(models_dir / "mixtral.gguf")


@pytest.fixture(scope="session")
def deepseek_model(models_dir: Path) -> Path:
    return write_deepseek(models_dir / "deepseek.gguf")


@pytest.fixture(scope="session")
def qwen3moe_model(models_dir: Path) -> Path:
    return write_qwen3moe(models_dir / "qwen3moe.gguf")


@pytest.fixture(scope="session")
def chain_model(models_dir: Path) -> Path:
    """Says CHAIN_TEXT to any prompt."""
    return write_chain(models_dir / "chain.gguf")


@pytest.fixture(scope="session")
def bert_model(models_dir: Path) -> Path:
    return write_bert(models_dir / "bert.gguf")


@pytest.fixture(autouse=True)
def _same_logging(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Commands that run in the tests' own process leave its logging as it was."""
    before, is_set = structlog.get_config(), structlog.is_configured()
    monkeypatch.setattr(logs._THRESHOLD, "level", logs._THRESHOLD.level)
    yield
    structlog.configure(**before) if is_set else structlog.reset_defaults()


@pytest.fixture
def own_workers() -> Callable[[], list[int]]:
    """Return what lists the workers that this test has running; fixtures of others may live on."""
    before = _workers()
    return lambda: [pid for pid in _workers() if pid not in before]


def _workers() -> list[int]:
    found = []
    for child in psutil.Process().children():
        # One that lists devices, say, may end while it is looked at.
        with contextlib.suppress(psutil.NoSuchProcess):
            if "--fd" in child.cmdline():
                found.append(child.pid)
    return found
