"""Loaded models, shared by the tests of a module; each test starts with empty slots."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from shimpy.engine.llama import LlamaBackend
from tests.engine.llama.running import loaded


@pytest.fixture(scope="session")
def _shared_llama(llama_model: Path) -> Iterator[LlamaBackend]:
    with loaded(llama_model) as backend:
        yield backend


@pytest.fixture(scope="session")
def _shared_apart(llama_model: Path) -> Iterator[LlamaBackend]:
    with loaded(llama_model, kv_unified=False, flash_attn="off") as backend:
        yield backend


@pytest.fixture(scope="session")
def _shared_chain(chain_model: Path) -> Iterator[LlamaBackend]:
    with loaded(chain_model) as backend:
        yield backend


@pytest.fixture
def llama(_shared_llama: LlamaBackend) -> LlamaBackend:
    """The random llama: 512 tokens, 4 slots, all empty."""
    return _emptied(_shared_llama)


@pytest.fixture
def apart(_shared_apart: LlamaBackend) -> LlamaBackend:
    """The random llama with 512 tokens for each of its 4 slots, all empty."""
    return _emptied(_shared_apart)


@pytest.fixture
def chain(_shared_chain: LlamaBackend) -> LlamaBackend:
    """The model that says CHAIN_TEXT, its slots empty."""
    return _emptied(_shared_chain)


def _emptied(backend: LlamaBackend) -> LlamaBackend:
    for slot in range(backend.n_slots):
        assert backend.kv_remove(slot, 0, -1)
    return backend
