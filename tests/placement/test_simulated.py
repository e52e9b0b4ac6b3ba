"""The formulas against llama.cpp itself, which simulates the load of each shape."""

from __future__ import annotations

from pathlib import Path

import pytest

from shimpy.gguf.arch import describe_model
from shimpy.gguf.reader import read_header
from shimpy.placement.figures import Setup
from shimpy.placement.memory import Context, Layout, estimate_memory
from shimpy.registry.registry import model_of_files
from shimpy.scheduler.loads import simulated_load
from shimpy.scheduler.simulations import run_simulation
from shimpy.units import MIB
from tests.shapes import MODELS, FileType, write_gguf

SETTINGS = [
    {"n_ctx": 4096, "n_slots": 8, "n_ubatch": 512, "kv_type": "f16"},
    {"n_ctx": 16384, "n_slots": 16, "n_ubatch": 2048, "kv_type": "f16"},
    {"n_ctx": 8192, "n_slots": 4, "n_ubatch": 512, "kv_type": "q8_0"},
    {"n_ctx": 8192, "n_slots": 8, "n_ubatch": 512, "kv_type": "f16", "flash_attn": False},
]
APART = {"n_ctx": 4096, "n_slots": 4, "n_ubatch": 512, "kv_type": "f16"} | {
    "flash_attn": False,
    "kv_unified": False,
}
FILE_TYPES: dict[str, FileType] = {"gpt-oss-20b": "F16", "bge-base": "F16", "llama3-8b": "Q5_K_M"}


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_llama_cpp_takes_what_is_predicted(model: str, tmp_path: Path) -> None:
    """Eleven architectures on the CPU: dense, MoE, windowed, latent, recurrent, encoder.

    It proves two things at once: the shapes are models that llama.cpp loads, and the sums
    are its own. Weights within 0.1 %, KV exact, compute within 15 % or 64 MiB.
    """
    path = write_gguf(tmp_path / "model.gguf", MODELS[model](), FILE_TYPES.get(model, "Q4_K_M"))
    shape = describe_model(read_header(path))
    settings = [s for s in SETTINGS if s["kv_type"] == "f16" or shape.n_embd_head]
    if not (shape.is_embedding or shape.n_swa or any(layer.state_bytes for layer in shape.layers)):
        settings.append(APART)

    taken = simulate(path, settings)

    assert len(taken) == len(settings)
    for setting, (weights, kv, compute) in zip(settings, taken, strict=True):
        use = estimate_memory(shape, Layout(), Context(**setting)).host  # type: ignore[arg-type]
        assert use.weights_bytes == pytest.approx(weights, rel=0.001)
        assert use.kv_bytes == kv
        assert abs(use.compute_bytes - compute) <= max(0.15 * compute, 64 * MIB)


def simulate(path: Path, settings: list[dict[str, object]]) -> list[tuple[int, int, int]]:
    """Return what the engine's own simulation says of host memory, per setting."""
    model = model_of_files([path])
    loads = [
        simulated_load(
            model,
            Setup(devices=(), layout=Layout(), context=Context(**setting)),  # type: ignore[arg-type]
        )
        for setting in settings
    ]
    answers = sorted(run_simulation(loads, 50), key=lambda answer: answer.index)
    assert not [answer.error for answer in answers if answer.error]
    hosts = [use for answer in answers for use in answer.memory]
    return [(use.model_bytes, use.context_bytes, use.compute_bytes) for use in hosts]
