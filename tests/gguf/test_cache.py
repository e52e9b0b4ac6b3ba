"""What each layer caches, against llama.cpp itself and by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shimpy.errors import GgufError
from shimpy.gguf.arch import ModelShape, describe_model
from shimpy.gguf.reader import parse_header, read_header
from tests.gguf.build import Gguf, Value, dense_tensors, llama
from tests.gguf.llama_reference import MODELS, N_CTX, N_SEQUENCES, N_UBATCH, file_of

_MIB = 1 << 20
_F16 = 2


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What llama.cpp says of each model, and their shapes; in a process, since it may abort."""
    folder = tmp_path_factory.mktemp("reference")
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-m", "tests.gguf.llama_reference", str(folder)],
        cwd=root, capture_output=True, text=True, timeout=120, check=False,
        env={"OMP_NUM_THREADS": "1", "GGML_NO_BACKTRACE": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    found: dict[str, Any] = json.loads(run.stdout)
    for number, name in enumerate(MODELS):
        found[name]["shape"] = describe_model(read_header(file_of(folder, number)))
    return found


def _n_swa_cells(n_swa: int) -> int:
    """Return the cells of the cache for windowed layers (llama_kv_cache_iswa)."""
    return -(-min(N_CTX, n_swa + N_UBATCH) // 256) * 256


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("name", MODELS)
def test_cache_is_as_llama_cpp_allocates_it(name: str, reference: dict[str, Any]) -> None:
    """Every rule of gguf.cache restates llama.cpp's code; this is the proof that it still does."""
    shape: ModelShape = reference[name]["shape"]
    n_cells = [_n_swa_cells(shape.n_swa) if layer.is_swa else N_CTX for layer in shape.layers]
    kv = [
        sum(layer.n_embd_k * n for layer, n in zip(shape.layers, n_cells, strict=True)),
        sum(layer.n_embd_v * n for layer, n in zip(shape.layers, n_cells, strict=True)),
    ]
    # Two caches are rounded to 0.01 MiB each.
    assert [width * _F16 / _MIB for width in kv] == pytest.approx(reference[name]["kv"], abs=0.011)
    state = sum(layer.state_bytes for layer in shape.layers) * N_SEQUENCES / _MIB
    assert state == pytest.approx(sum(reference[name]["state"]), abs=0.011)
    assert shape.n_params == reference[name]["n_params"]
    assert shape.n_layer == reference[name]["n_layer"]
    assert shape.n_ctx_train == reference[name]["n_ctx_train"]


def test_reference_sees_caches_and_states(reference: dict[str, Any]) -> None:
    """Without this, a change of llama.cpp's log would make all of the above 0 == 0."""
    assert reference["llama"]["kv"] == [2.0, 2.0]
    assert reference["mamba"]["state"][1] > 1


def _shape(arch: str, n_layer: int = 8, **extra: Value) -> ModelShape:
    model = Gguf(metadata=llama(n_layer, arch, **extra), tensors=dense_tensors(n_layer))
    return describe_model(parse_header(model.header(), name="m.gguf"))


def _windowed(shape: ModelShape) -> str:
    return "".join("w" if layer.is_swa else "F" for layer in shape.layers)


@pytest.mark.parametrize(
    ("arch", "extra", "pattern", "n_swa"),
    [
        ("llama", {"attention__sliding_window": 99}, "FFFFFFFF", 0),
        ("phi3", {"attention__sliding_window": 99}, "FFFFFFFF", 0),
        ("gemma2", {}, "wFwFwFwF", 4096),
        ("gemma3", {"attention__sliding_window": 0}, "FFFFFFFF", 0),
        ("gemma3", {"attention__sliding_window": 9}, "wwwwwFww", 9),
        (
            "gemma3",
            {"attention__sliding_window": 9, "attention__sliding_window_pattern": 2},
            "wFwFwFwF",
            9,
        ),
        (
            "gemma3",
            {
                "attention__sliding_window": 9,
                "attention__sliding_window_pattern": [True] * 3 + [False] * 5,
            },
            "wwwFFFFF",
            9,
        ),
        ("smallthinker", {"attention__sliding_window": 9}, "FwwwFwww", 4096),
        ("llama4", {"attention__sliding_window": 0}, "FFFFFFFF", 0),
        ("exaone4", {"attention__sliding_window": 9}, "FFFFFFFF", 0),
    ],
)
def test_which_layers_are_windowed(
    arch: str, extra: dict[str, Value], pattern: str, n_swa: int
) -> None:
    shape = _shape(arch, **extra)
    assert (_windowed(shape), shape.n_swa) == (pattern, n_swa)


def test_pattern_that_must_be_in_the_file() -> None:
    with pytest.raises(GgufError, match="sliding_window_pattern is missing"):
        _shape("mimo2", attention__sliding_window=9)


_SSM: dict[str, Value] = {
    "ssm__conv_kernel": 4,
    "ssm__inner_size": 128,
    "ssm__state_size": 16,
    "ssm__time_step_rank": 8,
    "ssm__group_count": 2,
}
# (conv - 1) * (inner + 2 * groups * state) and inner * state, in float32.
_SSM_BYTES = 4 * (3 * (128 + 2 * 2 * 16) + 128 * 16)


@pytest.mark.parametrize(
    ("arch", "extra", "kinds"),
    [
        ("falcon-h1", {}, "BBBBBBBB"),
        ("granitehybrid", {"attention__head_count_kv": [0, 2, 0, 0, 2, 0, 0, 2]}, "SKSSKSSK"),
        (
            "nemotron_h",
            {
                "attention__head_count_kv": [0, 2, 0, 0, 2, 0, 0, 2],
                "feed_forward_length": [0, 0, 128, 0, 0, 128, 0, 0],
            },
            "SK-SK-SK",
        ),
        ("qwen3next", {}, "SSSKSSSK"),
        ("qwen3next", {"full_attention_interval": 2}, "SKSKSKSK"),
        ("qwen3next", {"nextn_predict_layers": 1}, "SSSKSSS-"),
        ("qwen35", {"attention__recurrent_layers": [True, False] * 4}, "SKSKSKSK"),
    ],
)
def test_hybrids(arch: str, extra: dict[str, Value], kinds: str) -> None:
    """State, KV cache, both or neither, layer by layer; llama.cpp was seen to agree."""
    shape = _shape(arch, **_SSM | extra)
    assert {layer.state_bytes for layer in shape.layers} <= {0, _SSM_BYTES}
    assert kinds == "".join(
        {(False, False): "-", (True, False): "K", (False, True): "S", (True, True): "B"}[
            bool(layer.n_embd_k), bool(layer.state_bytes)
        ]
        for layer in shape.layers
    )


def test_gemma3n_caches_in_its_first_twenty_layers() -> None:
    shape = _shape("gemma3n", 24, attention__sliding_window=512)
    assert [bool(layer.n_embd_k) for layer in shape.layers] == [True] * 20 + [False] * 4


def test_sparse_attention_keeps_a_key_more() -> None:
    """DeepSeek-V3.2: the latent as K, no V, and the indexer's own key."""
    shape = _shape(
        "deepseek32",
        attention__head_count_kv=1,
        attention__key_length=48,
        attention__key_length_mla=40,
        attention__value_length_mla=24,
        attention__indexer__key_length=16,
    )
    assert shape.is_mla
    assert {(layer.n_embd_k, layer.n_embd_v) for layer in shape.layers} == {(48 + 16, 0)}


def test_prediction_blocks_cache_nothing_and_take_nothing() -> None:
    """llama.cpp skips them when it loads (TENSOR_SKIP), yet counts them as layers."""
    shape = _shape("glm4moe", nextn_predict_layers=1)
    assert shape.n_layer == 8
    assert shape.layers[6].n_embd_k == 64
    assert shape.layers[6].dense_bytes > 0
    assert (shape.layers[7].n_embd_k, shape.layers[7].dense_bytes) == (0, 0)


def test_file_of_prediction_blocks_alone_is_a_model() -> None:
    shape = _shape("llama", nextn_predict_layers=8)
    assert all(layer.n_embd_k and layer.dense_bytes for layer in shape.layers)


def test_encoder_caches_nothing() -> None:
    assert all(layer.n_embd_k == layer.n_embd_v == 0 for layer in _shape("bert").layers)


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"attention__head_count": [4, 4]}, "attention.head_count is no list of 8"),
        ({"attention__head_count_kv": ["a"] * 8}, "head_count_kv is no list of 8 whole numbers"),
        ({"attention__head_count_kv": [-1] * 8}, "head_count_kv is no list of 8 whole numbers"),
        ({"attention__head_count_kv": "2"}, "head_count_kv is '2', not an integer"),
        ({"attention__key_length": -2}, "key_length is -2, below 0"),
    ],
)
def test_senseless_number_is_named(metadata: dict[str, Value], words: str) -> None:
    with pytest.raises(GgufError, match=words):
        _shape("llama", **metadata)
