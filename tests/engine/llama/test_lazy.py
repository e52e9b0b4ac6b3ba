"""A KV cache whose RAM is taken as it is used, and is cleared wherever something lies in it."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

import numpy as np
import pytest

from shimpy.engine.llama import lazy
from shimpy.engine.llama.lazy import LazyClear
from shimpy.engine.untouched import Untouched
from shimpy.errors import LoadError
from shimpy.units import MIB
from tests.engine.llama.running import load, loaded, logits, prefill

PAGE = mmap.PAGESIZE
# 64 MiB of the synthetic llama's cache.
LONG = {"n_ctx": 2**18, "flash_attn": "on"}
IDS = [65 + i % 20 for i in range(40)]


def fill(buffer: int, value: int) -> None:
    ctypes.memset(lazy._base_of(buffer), value, lazy._size_of(buffer))


def content(buffer: int) -> set[int]:
    return set(ctypes.string_at(lazy._base_of(buffer), lazy._size_of(buffer)))


def test_a_cache_takes_ram_as_it_is_used(llama_model: Path) -> None:
    with loaded(llama_model, **LONG) as backend:
        n_bytes = sum(use.context_bytes for use in backend.memory())
        assert n_bytes == 64 * MIB
        # But for the pages at its ends, which others share.
        assert n_bytes - 2 * PAGE <= backend.untouched_bytes <= n_bytes
        untouched = Untouched(backend.untouched_bytes)
        prefill(backend, IDS)
        assert untouched.n_bytes >= 32 * MIB


def test_it_computes_the_same(llama_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with loaded(llama_model, **LONG) as backend:
        prefill(backend, IDS)
        expected = logits(backend)
    monkeypatch.setattr(lazy, "_is_possible", lambda: False)
    with loaded(llama_model, **LONG) as backend:
        assert backend.untouched_bytes == 0
        prefill(backend, IDS)
        np.testing.assert_array_equal(logits(backend), expected)


@pytest.mark.parametrize("n_bytes", [8 * PAGE, 3 * PAGE + 100, 64])
@pytest.mark.parametrize("value", [0, 7])
def test_what_lies_in_a_buffer_is_cleared(n_bytes: int, value: int) -> None:
    with LazyClear(least_bytes=1) as clearing:
        buffer = lazy._allocate(lazy._host_type(), n_bytes)
        fill(buffer, 0xAA)
        lazy._clear(buffer, value)
        assert content(buffer) == {value}
        assert clearing.n_cleared == 1
        assert clearing.untouched_bytes == 0
    lazy._free(buffer)


def test_only_what_nothing_touched_is_left_out() -> None:
    """Every other page of fresh memory is written to first: 64 MiB, which malloc maps anew."""
    n_pages = 64 * MIB // PAGE
    with LazyClear(least_bytes=1) as clearing:
        buffer = lazy._allocate(lazy._host_type(), n_pages * PAGE)
        base = lazy._base_of(buffer)
        for index in range(0, n_pages, 2):
            ctypes.memset(base + index * PAGE, 0xAA, 1)
        lazy._clear(buffer, 0)
    # What is written to the first byte of a page may reach into the page before it.
    assert clearing.untouched_bytes in range((n_pages // 2 - 1) * PAGE, (n_pages // 2 + 2) * PAGE)
    assert content(buffer) == {0}
    lazy._free(buffer)


def test_a_later_clear_leaves_nothing_either() -> None:
    with LazyClear(least_bytes=1):
        buffer = lazy._allocate(lazy._host_type(), 100 * PAGE)
    for value in (0xAA, 0xBB):
        fill(buffer, value)
        lazy._clear(buffer, 0)
        assert content(buffer) == {0}
    lazy._free(buffer)


def test_buffers_that_come_later_are_made_as_before() -> None:
    with LazyClear(least_bytes=1) as clearing:
        # Some are gone again before it ends.
        lazy._free(lazy._allocate(lazy._host_type(), PAGE))
    buffer = lazy._allocate(lazy._host_type(), PAGE)
    lazy._clear(buffer, 0)
    assert clearing.n_cleared == 0
    lazy._free(buffer)


def test_a_context_that_there_is_no_memory_for_leaves_all_in_order(
    llama_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its cache was made and cleared, and is freed as the rest fails."""
    allocate = LazyClear._on_alloc
    sizes: list[int] = []

    def once(self: LazyClear, buffer_type: int, n_bytes: int) -> int | None:
        is_cache = n_bytes == 64 * MIB
        if is_cache:
            sizes.append(n_bytes)
        return allocate(self, buffer_type, n_bytes) if is_cache or not sizes else None

    for _ in range(3):
        sizes.clear()
        with monkeypatch.context() as patched:
            patched.setattr(LazyClear, "_on_alloc", once)
            with pytest.raises(LoadError):
                load(llama_model, **LONG)
        assert len(sizes) == 1
        with loaded(llama_model, **LONG) as backend:
            assert backend.untouched_bytes > 0
            prefill(backend, IDS)


def test_small_buffers_are_let_alone() -> None:
    with LazyClear() as clearing:
        buffer = lazy._allocate(lazy._host_type(), PAGE)
        lazy._clear(buffer, 0)
    assert clearing.n_cleared == 0
    assert content(buffer) == {0}
    lazy._free(buffer)


@pytest.mark.parametrize(
    ("name", "value"),
    [("_CLEAR_TO_CONTEXT", 4), ("_N_WORDS", 4), ("_PAGEMAP", "/nowhere/pagemap")],
    ids=["another-function", "other-fields", "no-pagemap"],
)
def test_where_ggml_or_the_kernel_is_another_all_is_as_before(
    name: str, value: object, llama_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lazy, "_is_possible", lazy._is_possible.__wrapped__)
    assert lazy._is_possible()
    monkeypatch.setattr(lazy, name, value)
    assert not lazy._is_possible()
    with loaded(llama_model, **LONG) as backend:
        assert backend.untouched_bytes == 0


def test_pages_that_nobody_tells_of_are_cleared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy, "_PAGEMAP", "/nowhere/pagemap")
    with LazyClear(least_bytes=1) as clearing:
        buffer = lazy._allocate(lazy._host_type(), 4 * PAGE)
        fill(buffer, 0xAA)
        lazy._clear(buffer, 0)
    assert content(buffer) == {0}
    assert clearing.untouched_bytes == 0
    lazy._free(buffer)
