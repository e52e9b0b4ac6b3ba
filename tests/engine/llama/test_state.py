"""What llama.cpp writes of a slot, and what a state depends on: found out, not believed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from shimpy.engine.backend import Chunk, DecodeStatus
from shimpy.engine.llama import LlamaBackend
from shimpy.engine.parked import ParkedPrefixes
from shimpy.engine.prefixes import SavedPrefixes
from tests.engine.llama.odd_models import (
    N_WINDOW,
    write_compressed,
    write_recurrent,
    write_window,
)
from tests.engine.llama.running import go_on, loaded, logits, prefill
from tests.synthetic import write_deepseek, write_llama, write_mixtral, write_qwen3moe

IDS = [(i * 37) % 300 + 10 for i in range(200)]
MORE = [77, 200, 31]
KINDS: dict[str, Callable[[Path], Path]] = {
    "llama": write_llama,
    "mixtral": write_mixtral,
    "deepseek": write_deepseek,
    "qwen3moe": write_qwen3moe,
    "window": write_window,
    "recurrent": write_recurrent,
    "compressed": write_compressed,
}


def save(backend: LlamaBackend, slot: int, path: Path) -> None:
    n_bytes = backend.save_state(slot, str(path))
    assert n_bytes == path.stat().st_size
    assert n_bytes <= backend.state_bytes(slot) <= n_bytes + 64


@pytest.mark.parametrize("flash_attn", ["on", "off"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_state_goes_on_in_another_context(kind: str, flash_attn: str, tmp_path: Path) -> None:
    """Its length, slots and batches don't matter: the logits are the same to the last bit."""
    model = KINDS[kind](tmp_path / "model.gguf")
    state = tmp_path / "state"
    with loaded(model, flash_attn=flash_attn) as backend:
        prefill(backend, IDS[:50], slot=3)
        prefill(backend, IDS, slot=1)
        save(backend, 1, state)
        prefill(backend, MORE, slot=1, start=len(IDS))
        expected = logits(backend)
    with loaded(
        model, flash_attn=flash_attn, n_ctx=1024, n_slots=2, n_batch=64, n_ubatch=32
    ) as backend:
        assert backend.load_state(0, str(state), len(IDS))
        prefill(backend, MORE, slot=0, start=len(IDS))
        assert np.array_equal(logits(backend), expected)


@pytest.mark.parametrize("kind", ["llama", "deepseek", "compressed"])
def test_a_state_can_be_cut_where_all_of_it_is_there(kind: str, tmp_path: Path) -> None:
    with loaded(KINDS[kind](tmp_path / "model.gguf"), flash_attn="off") as backend:
        assert not backend.state_is_whole
        prefill(backend, IDS[:120], slot=0)
        prefill(backend, MORE, slot=0, start=120)
        expected = logits(backend)
        prefill(backend, IDS, slot=1)
        save(backend, 1, tmp_path / "state")
        assert backend.kv_remove(1, 0, -1)
        assert backend.load_state(1, str(tmp_path / "state"), len(IDS))
        assert backend.kv_remove(1, 120, -1)
        prefill(backend, MORE, slot=1, start=120)
        assert np.allclose(logits(backend), expected, atol=1e-4)


def test_a_sliding_window_is_saved_for_its_end_alone(tmp_path: Path) -> None:
    """Which is why it is taken whole: cut, it computes something else, and says nothing."""
    with loaded(write_window(tmp_path / "model.gguf"), flash_attn="off") as backend:
        assert backend.can_split
        assert backend.state_is_whole
        n = len(IDS) - N_WINDOW - 20
        prefill(backend, IDS[:n], slot=0)
        prefill(backend, MORE, slot=0, start=n)
        expected = logits(backend)
        prefill(backend, IDS, slot=1)
        save(backend, 1, tmp_path / "state")
        assert backend.kv_remove(1, 0, -1)
        assert backend.load_state(1, str(tmp_path / "state"), len(IDS))
        assert backend.kv_remove(1, n, -1)
        prefill(backend, MORE, slot=1, start=n)
        assert not np.allclose(logits(backend), expected, atol=1e-2)


def test_a_recurrent_state_is_whole(tmp_path: Path) -> None:
    with loaded(write_recurrent(tmp_path / "model.gguf")) as backend:
        assert backend.state_is_whole
        assert not backend.can_split


@pytest.mark.parametrize(
    "other", [{"flash_attn": "on"}, {"kv_type": "f32"}, {"flash_attn": "on", "kv_type": "bf16"}]
)
def test_a_state_of_another_form_is_refused(
    other: dict[str, str], llama_model: Path, tmp_path: Path
) -> None:
    """And has another key, so that it is never offered; the slot is empty and works after it."""
    state = tmp_path / "state"
    with loaded(llama_model, flash_attn="off") as backend:
        prefill(backend, IDS, slot=0)
        save(backend, 0, state)
        expected, key = logits(backend), backend.state_key
    with loaded(llama_model, **{"flash_attn": "off", **other}) as backend:
        assert backend.state_key != key
        assert not backend.load_state(0, str(state), len(IDS))
        prefill(backend, IDS, slot=0)
        assert np.allclose(logits(backend), expected, atol=0.5)


def test_a_state_comes_back_beside_running_slots(llama_model: Path, tmp_path: Path) -> None:
    """It takes the free cells between theirs, and disturbs none of them."""
    with loaded(llama_model, flash_attn="off", n_ctx=512) as backend:
        prefill(backend, IDS, slot=0)
        save(backend, 0, tmp_path / "state")
        alone = go_on(backend, slot=0, pos=len(IDS), n=12)
        assert backend.kv_remove(0, 0, -1)
        for at in range(0, 90, 30):
            for slot in (1, 2, 3):
                prefill(backend, IDS[at : at + 30], slot=slot, start=at)
        # Holes between those of slot 1 and 3.
        assert backend.kv_remove(2, 0, -1)
        assert backend.load_state(0, str(tmp_path / "state"), len(IDS))
        assert backend.kv_remove(0, len(IDS) - 1, -1)
        prefill(backend, IDS[-1:], slot=0, start=len(IDS) - 1)
        assert go_on(backend, slot=0, pos=len(IDS), n=12) == alone
        prefill(backend, IDS[90:], slot=1, start=90)
        assert go_on(backend, slot=1, pos=len(IDS), n=12) == alone


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_parked_beside_others_goes_on_as_if_it_never_left(
    kind: str, tmp_path: Path
) -> None:
    """Its cells lay strewn between theirs; what it was, and is restored as, is the same.

    In F32: an F16 cache would round sums that are made in another order.
    """
    model = KINDS[kind](tmp_path / "model.gguf")
    with loaded(model, flash_attn="off", n_ctx=1024, kv_type="f32") as backend:
        whole = SavedPrefixes(whole=backend.state_is_whole)
        store = ParkedPrefixes(backend, whole, limit=1 << 30, available=lambda: 1 << 40)
        for at in range(0, 120, 20):
            chunks = [Chunk(slot, at, IDS[at : at + 20], False) for slot in (0, 1, 2)]
            assert backend.decode(chunks) == DecodeStatus.OK
        assert store.park(1, IDS[:120])
        prefill(backend, MORE, slot=1, start=120)
        expected = logits(backend)
        assert backend.kv_remove(1, 0, -1)
        prefill(backend, IDS[50:], slot=3)
        [prefix] = store.saved
        for _ in range(2):
            assert store.restore(prefix, 1)
            prefill(backend, MORE, slot=1, start=120)
            assert np.allclose(logits(backend), expected, atol=1e-4)
            assert backend.kv_remove(1, 0, -1)
        store.close()


def test_where_there_is_no_room_nothing_happens(llama_model: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    with loaded(llama_model, n_ctx=256, flash_attn="off") as backend:
        prefill(backend, IDS, slot=0)
        save(backend, 0, state)
        assert not backend.load_state(1, str(state), len(IDS))
        assert not backend.load_state(1, str(tmp_path / "none"), len(IDS))
        assert not backend.save_state(0, str(tmp_path / "none" / "state"))
        prefill(backend, MORE, slot=1)
        prefill(backend, MORE, slot=0, start=len(IDS))
