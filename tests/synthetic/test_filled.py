"""Published shapes with random weights: of every type, loadable, and finite."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from shimpy.gguf.arch import describe_model
from shimpy.gguf.reader import read_header
from tests import shapes
from tests.engine.llama.running import loaded, logits, prefill
from tests.synthetic.filled import shrink, write_filled

FILE_TYPES: list[shapes.FileType] = [
    "F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K", "Q4_0", "MXFP4",
]  # fmt: skip


def small_moe(n_ff: int = 256) -> shapes.Spec:
    """A mixture of experts of two layers; rows of 96 take the types that fall back."""

    def layer(_: int) -> list[tuple[str, shapes.Shape]]:
        tensors = shapes._norms(256, "attn_norm", "ffn_norm") + shapes._attention(256, 256, 256)
        tensors.append(("ffn_gate_inp.weight", (256, 4)))
        return tensors + shapes._ffn(256, n_ff, "_exps", (4,))

    return shapes._spec(
        "llama", "small", shapes._common(256, 512) + shapes._layers(2, layer),
        n_layer=2, n_ctx=512, n_embd=256, n_head=4, n_head_kv=4, n_ff=n_ff, n_vocab=512,
        expert_count=4, expert_used_count=2, rope__dimension_count=64,
    )  # fmt: skip


@pytest.mark.parametrize("n_ff", [256, 96])
@pytest.mark.parametrize("file_type", FILE_TYPES)
def test_every_type_loads_and_computes_what_is_finite_and_varies(
    file_type: shapes.FileType, n_ff: int, tmp_path: Path
) -> None:
    path = write_filled(tmp_path / "model.gguf", small_moe(n_ff), file_type)
    shape = describe_model(read_header(path))
    assert shape.title == "synthetic small"
    with loaded(path) as backend:
        prefill(backend, [5, 300, 77])
        row = logits(backend)
    assert np.isfinite(row).all()
    # Neither dead nor blown up.
    assert 0.01 < row.std() < 100


def test_the_same_seed_gives_the_same_bytes_and_another_others(tmp_path: Path) -> None:
    paths = [
        write_filled(tmp_path / f"{i}.gguf", small_moe(), "Q4_K_M", seed=seed)
        for i, seed in enumerate((1, 1, 2))
    ]
    first, again, other = (path.read_bytes() for path in paths)
    assert first == again
    assert first != other


def test_shrunk_it_has_its_first_layers_alone() -> None:
    spec = shrink(shapes.MODELS["deepseek-moe-16b"](), 2)
    names = [name for name, _ in spec.tensors]
    assert "blk.1.ffn_gate_exps.weight" in names
    assert not any(name.startswith("blk.2.") for name in names)
    assert spec.metadata["block_count"] == spec.n_layer == 2
