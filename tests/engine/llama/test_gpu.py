"""The same on a GPU: what lies where, what it says, and how a lack of its memory is told.

Texts of random weights are not compared over batches here: on a GPU other kernels compute
other batch sizes, and the last bits choose between tokens that are nearly as likely.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest

from shimpy.engine.llama import list_devices, loader
from shimpy.engine.llama.weights import spans_in_ram
from shimpy.errors import LoadError
from shimpy.protocol.cuda import STACK_BYTES
from shimpy.protocol.messages import BufferUse
from tests.engine.llama.running import generate, load, loaded, logits, prefill
from tests.synthetic import CHAIN_TEXT, write_deepseek, write_llama

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def gpu() -> str:
    names = [device.name for device in list_devices().devices if device.kind == "gpu"]
    if not names:
        pytest.skip("this build of llama.cpp has no GPU to use")
    return names[0]


def uses(path: Path, gpu: str, **options: object) -> dict[str, BufferUse]:
    with loaded(path, devices=[gpu], n_gpu_layers=99, **options) as backend:
        return {use.device: use for use in backend.memory()}


def test_the_chain_says_its_text_on_a_gpu(chain_model: Path, gpu: str) -> None:
    with loaded(chain_model, devices=[gpu], n_gpu_layers=99) as backend:
        assert generate(backend, "Hello", n=100) == CHAIN_TEXT


def test_logits_are_those_of_the_cpu(llama_model: Path, gpu: str) -> None:
    rows = []
    for options in ({}, {"devices": [gpu], "n_gpu_layers": 99}):
        with loaded(llama_model, **options) as backend:
            prefill(backend, [65, 66, 67, 68])
            rows.append(logits(backend))
    np.testing.assert_allclose(rows[1], rows[0], atol=0.05)


def test_layers_and_cache_lie_on_the_gpu(llama_model: Path, gpu: str) -> None:
    held = uses(llama_model, gpu)
    assert held["CPU"].context_bytes == 0
    # token_embd stays with the host.
    assert held["CPU"].model_bytes == 512 * 64 * 4
    assert held[gpu].model_bytes > 0.7 * llama_model.stat().st_size
    assert held[gpu].context_bytes == 512 * 2 * 2 * 16 * 2 * 2


def test_the_context_keeps_small_stacks(llama_model: Path, gpu: str) -> None:
    """The driver raises the limit where a kernel needs more: none of these does."""
    if not gpu.startswith("CUDA"):
        pytest.skip(f"{gpu} has no CUDA context")
    cuda, stack = ctypes.CDLL("libcuda.so.1"), ctypes.c_size_t()
    with loaded(llama_model, devices=[gpu], n_gpu_layers=99) as backend:
        prefill(backend, [65, 66, 67, 68])
        # The CUDA runtime has made the context that it shares the current one.
        assert cuda.cuCtxGetLimit(ctypes.byref(stack), 0) == 0
    assert stack.value == STACK_BYTES


def test_experts_stay_in_host_memory(tmp_path: Path, gpu: str) -> None:
    path = write_deepseek(tmp_path / "moe.gguf", n_expert_ff=256)
    one_layer = 3 * 8 * 256 * 64 * 4
    sizes = [
        uses(path, gpu, n_cpu_moe=n, load_mode="locked")[gpu].model_bytes for n in (0, 1, 2, 4)
    ]
    assert sizes[0] == sizes[1]
    assert sizes[0] - sizes[2] == one_layer
    assert sizes[0] - sizes[3] == 3 * one_layer


@pytest.mark.parametrize("load_mode", ["locked", "mmap"])
def test_locked_experts_are_page_locked_in_the_mapped_file(
    deepseek_model: Path, gpu: str, load_mode: str
) -> None:
    """Copied to the GPU several times as fast as those that are only mapped."""
    if not gpu.startswith("CUDA"):
        pytest.skip(f"{gpu} has no CUDA driver to ask")
    cuda = ctypes.CDLL("libcuda.so.1")
    options = {"devices": [gpu], "n_gpu_layers": 99, "n_cpu_moe": 99, "load_mode": load_mode}
    with loaded(deepseek_model, **options) as backend:
        assert backend.is_mapped
        spans = spans_in_ram(backend._model.handle)
        assert spans
        prefill(backend, [65, 66, 67, 68])
        for start, end in spans:
            for address in (start, end - 1):
                flags = ctypes.c_uint()
                status = cuda.cuMemHostGetFlags(ctypes.byref(flags), ctypes.c_void_p(address))
                assert (status == 0) == (load_mode == "locked")


def test_experts_are_read_where_their_file_can_t_be_locked(
    deepseek_model: Path,
    gpu: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Into page-locked memory of llama.cpp's own."""
    monkeypatch.setattr(loader, "page_locks", lambda _: None)
    uses(deepseek_model, gpu, n_cpu_moe=99, load_mode="locked")
    said = capfd.readouterr().err
    assert "_Host model buffer size" in said
    assert "CPU_Mapped model buffer size" not in said


def test_a_full_gpu_is_told_as_such(tmp_path: Path, gpu: str) -> None:
    path = write_llama(tmp_path / "wide.gguf", n_layer=8, n_head=16, n_head_kv=16, n_embd_head=256)
    with pytest.raises(LoadError) as caught:
        load(path, devices=[gpu], n_gpu_layers=99, n_ctx=2**21)
    assert caught.value.out_of_memory


@pytest.mark.parametrize("flash_attn", ["on", "off"])
def test_a_state_moves_between_card_and_host(
    flash_attn: str, llama_model: Path, gpu: str, tmp_path: Path
) -> None:
    """A model that is loaded elsewhere finds the prefixes that it left."""
    ids, state = [65 + i % 20 for i in range(200)], tmp_path / "state"
    with loaded(llama_model, devices=[gpu], n_gpu_layers=99, flash_attn=flash_attn) as backend:
        prefill(backend, ids)
        assert backend.save_state(0, str(state)) == state.stat().st_size
        prefill(backend, [70], start=len(ids))
        expected, key = logits(backend), backend.state_key
    with loaded(llama_model, flash_attn=flash_attn) as backend:
        assert backend.state_key == key
        assert backend.load_state(1, str(state), len(ids))
        prefill(backend, [70], slot=1, start=len(ids))
        np.testing.assert_allclose(logits(backend), expected, atol=0.05)
