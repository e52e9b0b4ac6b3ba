"""Weights that a GPU copies from: where they lie in the mapped file, and that they are locked."""

from __future__ import annotations

import ctypes
import itertools
import mmap
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shimpy.engine.llama import loader
from shimpy.engine.llama.page_locks import page_locks, whole_pages
from shimpy.engine.llama.weights import spans_in_ram
from tests.engine.llama.cuda_driver import Driver
from tests.engine.llama.running import generate, loaded
from tests.synthetic import CHAIN_TEXT, write_llama
from tests.synthetic.gguf_file import GgufFile

PAGE = mmap.PAGESIZE
PORTABLE_READ_ONLY = 0x01 | 0x08


def test_weights_are_found_where_the_file_s_bytes_are(llama_model: Path) -> None:
    tensors = {bytes(tensor.data) for tensor in gguf.GGUFReader(llama_model).tensors}
    with loaded(llama_model) as backend:
        spans = spans_in_ram(backend._model.handle)
        assert {ctypes.string_at(start, end - start) for start, end in spans} == tensors
        (use,) = backend.memory()
        assert use.model_bytes == sum(end - start for start, end in spans)


def test_embeddings_that_are_the_output_layer_too_are_counted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = GgufFile.add

    def add_but_output(file: GgufFile, name: str, *rest: Any) -> None:
        if name != "output.weight":
            add(file, name, *rest)

    monkeypatch.setattr(GgufFile, "add", add_but_output)
    path = write_llama(tmp_path / "tied.gguf")
    n_bytes = sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors)
    with loaded(path) as backend:
        (use,) = backend.memory()
        assert use.model_bytes == n_bytes


@given(
    st.lists(
        st.tuples(st.integers(0, 20 * PAGE), st.integers(1, 3 * PAGE)).map(
            lambda span: (span[0], sum(span))
        ),
        max_size=8,
    )
)
def test_whole_pages_are_those_that_are_touched(spans: list[tuple[int, int]]) -> None:
    touched = {page for start, end in spans for page in range(start // PAGE, (end - 1) // PAGE + 1)}
    found = whole_pages(spans)
    pages = [page for start, end in found for page in range(start // PAGE, end // PAGE)]
    assert pages == sorted(touched)
    # No two that could be one.
    assert all(first[1] < second[0] for first, second in itertools.pairwise(found))


@pytest.mark.parametrize(
    ("devices", "driver"),
    [
        ([], Driver()),
        (["Vulkan0"], Driver()),
        (["CUDA0", "ROCm0"], Driver()),
        (["CUDA0", "CUDA1"], Driver(can_lock=(1, 0))),
        (["CUDA7"], Driver()),
        (["CUDA0"], Driver("cuDeviceGetAttribute")),
    ],
    ids=["none", "another-s", "one-of-two", "can-t", "not-there", "does-not-tell"],
)
def test_not_all_cards_can_lock_a_mapped_file(devices: list[str], driver: Driver) -> None:
    assert page_locks(devices, driver) is None


def test_all_cards_share_what_is_locked_for_reading() -> None:
    driver = Driver()
    locks = page_locks(["CUDA1", "CUDA0"], driver)
    assert locks is not None
    memory = ctypes.create_string_buffer(4 * PAGE)
    at = ctypes.addressof(memory)
    assert locks.add([(at, at + PAGE), (at + 2 * PAGE, at + 4 * PAGE)])
    assert driver.locked == {at: PAGE, at + 2 * PAGE: 2 * PAGE}
    assert driver.lockings == [(1, PORTABLE_READ_ONLY)] * 2
    locks.close()
    assert not driver.locked
    assert not driver.current


@pytest.mark.parametrize("refused", ["cuDevicePrimaryCtxRetain", "cuCtxPushCurrent_v2"])
def test_without_a_context_nothing_is_locked(refused: str) -> None:
    driver = Driver(refused)
    locks = page_locks(["CUDA0"], driver)
    assert locks is not None
    assert not locks.add([(0, PAGE)])
    assert not driver.lockings


def test_a_model_is_locked_where_it_is_mapped(
    chain_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver()
    monkeypatch.setattr(loader, "page_locks", lambda _: page_locks(["CUDA0"], driver))
    with loaded(chain_model, load_mode="locked") as backend:
        assert backend.is_mapped
        locked = [(start, start + n_bytes) for start, n_bytes in driver.locked.items()]
        assert locked == whole_pages(spans_in_ram(backend._model.handle))
        assert generate(backend, "Hello", n=100) == CHAIN_TEXT
    assert not driver.locked


@pytest.mark.parametrize("n_locks", [0, 1])
def test_where_the_driver_refuses_the_model_is_read(
    n_locks: int, chain_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver()
    driver.n_locks_left = n_locks
    monkeypatch.setattr(loader, "page_locks", lambda _: page_locks(["CUDA0"], driver))
    # Tensors of a small model are neighbours.
    monkeypatch.setattr(loader, "whole_pages", list)
    with loaded(chain_model, load_mode="locked") as backend:
        assert not backend.is_mapped
        assert not driver.locked
        assert generate(backend, "Hello", n=100) == CHAIN_TEXT


def test_without_a_gpu_locked_weights_are_read(chain_model: Path) -> None:
    with loaded(chain_model, load_mode="locked") as backend:
        assert not backend.is_mapped
    with loaded(chain_model) as backend:
        assert backend.is_mapped
