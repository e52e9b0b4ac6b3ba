"""Shapes of models: experts by name, bytes by layer, what a model can do."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shimpy.errors import GgufError
from shimpy.gguf.arch import ModelShape, NotAModelError, describe_model
from shimpy.gguf.reader import parse_header, read_header
from tests.gguf.build import Gguf, Tensor, Value, dense_tensors, llama, n_bytes

# The machine may be busy with other things.
busy = settings(deadline=None)

_EXPERTS = ("gate", "down", "up")


def _shape(metadata: dict[str, Value], tensors: list[Tensor]) -> ModelShape:
    return describe_model(
        parse_header(Gguf(metadata=metadata, tensors=tensors).header(), name="m.gguf")
    )


def _with(*names: str, n_layer: int = 2) -> ModelShape:
    """Return the shape of a model with these tensors, each of 64 x 8 halves, beside the usual."""
    extra: list[Tensor] = [(name, (64, 8), "F16") for name in names]
    return _shape(llama(n_layer), dense_tensors(n_layer) + extra)


_EXTRA_BYTES = 64 * 8 * 2


@pytest.mark.parametrize(
    "name",
    [
        "blk.1.ffn_gate_exps.weight",
        "blk.1.ffn_down_exps.weight",
        "blk.1.ffn_up_exps.weight",
        "blk.1.ffn_gate_up_exps.weight",
        "blk.1.ffn_up_chexps.weight",
        "blk.1.ffn_down_exps.bias",
        "blk.1.ffn_gate_exps.scale",
    ],
)
def test_expert_tensor(name: str) -> None:
    """What llama.cpp's --cpu-moe would move: weights, biases, scales, fused and chunked ones."""
    shape = _with(name)
    assert shape.is_moe
    assert shape.moe_layers == (1,)
    assert (shape.n_expert_tensors, shape.expert_bytes) == (1, _EXTRA_BYTES)
    assert shape.layers[1].largest_expert_bytes == _EXTRA_BYTES


@pytest.mark.parametrize(
    "name",
    [
        "blk.1.ffn_gate_inp.weight",
        "blk.1.ffn_gate_shexp.weight",
        "blk.1.ffn_gate_inp_shexp.weight",
        "blk.1.ffn_norm_exps.weight",
        "blk.1.exp_probs_b.bias",
        "blk.1.ffn_gate.weight",
    ],
)
def test_tensor_that_is_no_expert(name: str) -> None:
    """Router, shared experts and norms stay on the GPU."""
    shape = _with(name)
    assert not shape.is_moe
    assert shape.layers[1].dense_bytes == shape.layers[0].dense_bytes + _EXTRA_BYTES


@pytest.mark.parametrize("name", ["v.blk.1.ffn_up_exps.weight", "mm.ffn_up_exps.weight"])
def test_experts_of_an_encoder_are_none_of_the_model(name: str) -> None:
    assert not _with(name).is_moe


def test_experts_are_not_read_off_the_metadata() -> None:
    """A dense merge may carry expert counts."""
    metadata = llama(expert_count=8, expert_used_count=2)
    shape = _shape(metadata, dense_tensors())
    assert (shape.is_moe, shape.n_expert, shape.n_expert_used) == (False, 8, 2)
    plain = _with(*(f"blk.0.ffn_{part}_exps.weight" for part in _EXPERTS))
    assert (plain.is_moe, plain.n_expert) == (True, 0)


def test_deepseek_shape(deepseek_model: Path) -> None:
    """A leading dense layer, experts after it, shared ones told apart."""
    header = read_header(deepseek_model)
    shape = describe_model(header)
    assert shape.arch == "deepseek"
    assert shape.layers[0].n_expert_tensors == 0
    assert shape.moe_layers == tuple(range(1, shape.n_layer))
    assert shape.n_expert_tensors == 3 * (shape.n_layer - 1)
    assert shape.n_expert_shared > 0
    assert shape.expert_bytes == sum(t.n_bytes for t in header.tensors if "_exps." in t.name)


@pytest.mark.parametrize(
    "fixture", ["llama_model", "mixtral_model", "qwen3moe_model", "bert_model"]
)
def test_every_byte_is_counted_once(fixture: str, request: pytest.FixtureRequest) -> None:
    """Inputs, layers and outputs together are all tensors, a tied output apart."""
    header = read_header(request.getfixturevalue(fixture))
    shape = describe_model(header)
    tied = 0
    if not shape.is_embedding and all(t.name != "output.weight" for t in header.tensors):
        tied = next(t.n_bytes for t in header.tensors if t.name == "token_embd.weight")
    layers = sum(layer.dense_bytes + layer.expert_bytes for layer in shape.layers)
    assert shape.input_bytes + layers + shape.output_bytes == tied + sum(
        t.n_bytes for t in header.tensors
    )
    assert shape.n_params == sum(t.n_elements for t in header.tensors)


def test_tied_output_counts_again() -> None:
    tensors = [tensor for tensor in dense_tensors() if tensor[0] != "output.weight"]
    tied, untied = _shape(llama(), tensors), _shape(llama(), dense_tensors())
    assert tied.output_bytes == untied.output_bytes
    assert tied.input_bytes == n_bytes((64, 10), "F16")


def test_embedding_norm_runs_with_the_first_layer() -> None:
    shape = _with("token_embd_norm.weight")
    assert shape.layers[0].dense_bytes == shape.layers[1].dense_bytes + _EXTRA_BYTES


def test_split_experts_are_recognised_and_explained() -> None:
    """Mixtral files from before April 2024."""
    shape = _with(*(f"blk.0.ffn_{part}.{e}.weight" for part in _EXPERTS for e in range(8)))
    assert shape.has_split_experts
    assert not shape.is_moe
    assert shape.explanation is not None
    assert "blk.0.ffn_gate.0.weight" in shape.explanation
    assert _with().explanation is None


def test_heads_and_widths() -> None:
    shape = _shape(llama(attention__head_count_kv=2), dense_tensors())
    assert (shape.n_head, shape.n_embd, shape.n_embd_head, shape.n_ff) == (4, 64, 16, 128)
    assert [(layer.n_embd_k, layer.n_embd_v) for layer in shape.layers] == [(32, 32)] * 2
    assert shape.n_ctx_train == 4096


@pytest.mark.parametrize(
    ("metadata", "label"),
    [
        ({"general.file_type": 15}, "Q4_K_M"),
        ({"general.file_type": 15 + 1024}, "Q4_K_M"),
        ({"general.file_type": 999}, "Q8_0"),
        ({"general.file_type": "Q4"}, "Q8_0"),
        ({}, "Q8_0"),
    ],
)
def test_quantization(metadata: dict[str, Value], label: str) -> None:
    """As the file says it; else the type of most of its bytes, here of all but the norm."""
    assert _shape(llama() | metadata, dense_tensors(type_name="Q8_0")).quantization == label


@pytest.mark.parametrize(
    ("metadata", "title"),
    [
        ({"general.name": "Tiny", "general.basename": "base"}, "Tiny"),
        ({"general.name": " ", "general.basename": "base"}, "base"),
        ({}, "llama"),
    ],
)
def test_title(metadata: dict[str, Value], title: str) -> None:
    assert _shape(llama() | metadata, dense_tensors()).title == title


def test_vocabulary_is_counted_from_its_tokens() -> None:
    tokens: dict[str, Value] = {"tokenizer.ggml.tokens": ["a", "b", "c"]}
    assert _shape(llama(vocab_size=7) | tokens, dense_tensors()).n_vocab == 3
    assert _shape(llama(vocab_size=7), dense_tensors()).n_vocab == 7


@pytest.mark.parametrize(
    ("arch", "extra", "is_embedding", "is_reranker"),
    [
        ("llama", {}, False, False),
        ("llama", {"pooling_type": 0}, False, False),
        ("bert", {}, True, False),
        ("nomic-bert-moe", {}, True, False),
        ("gemma-embedding", {"attention__sliding_window": 9}, True, False),
        ("qwen3", {"pooling_type": 3}, True, False),
        ("qwen3", {"pooling_type": 4}, True, True),
        ("bert", {"pooling_type": 4}, True, True),
    ],
)
def test_embedding_and_ranking(
    arch: str, extra: dict[str, Value], is_embedding: bool, is_reranker: bool
) -> None:
    shape = _shape(llama(arch=arch, **extra), dense_tensors())
    assert (shape.is_embedding, shape.is_reranker) == (is_embedding, is_reranker)


def test_encoder_with_a_classifier_ranks() -> None:
    classifier: list[Tensor] = [("cls.output.weight", (64,), "F32")]
    assert _shape(llama(arch="bert"), dense_tensors() + classifier).is_reranker


@pytest.mark.parametrize(
    ("metadata", "has_fim"),
    [
        ({}, False),
        ({"tokenizer.ggml.tokens": ["a"]}, False),
        ({"tokenizer.ggml.tokens": ["<|fim_prefix|>", "<|fim_suffix|>"]}, False),
        ({"tokenizer.ggml.tokens": ["<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"]}, True),
        ({"tokenizer.ggml.tokens": ["\u2581<MID>", "\u2581<PRE>", "\u2581<SUF>"]}, True),
        ({"tokenizer.ggml.tokens": ["x<PRE>", "x<SUF>", "x<MID>"]}, False),
        (
            {
                "tokenizer.ggml.fim_pre_token_id": 1,
                "tokenizer.ggml.suffix_token_id": 2,
                "tokenizer.ggml.fim_mid_token_id": 3,
            },
            True,
        ),
    ],
)
def test_filling_in_the_middle(metadata: dict[str, Value], has_fim: bool) -> None:
    assert _shape(llama() | metadata, dense_tensors()).has_fim is has_fim


def test_chat_template() -> None:
    template: dict[str, Value] = {"tokenizer.chat_template": "{{ messages }}"}
    assert _shape(llama() | template, dense_tensors()).chat_template == "{{ messages }}"
    assert _shape(llama(), dense_tensors()).chat_template is None
    assert _shape(llama() | {"tokenizer.chat_template": 1}, dense_tensors()).chat_template is None


# --- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key",
    [
        "general.architecture",
        "llama.block_count",
        "llama.context_length",
        "llama.embedding_length",
        "llama.attention.head_count",
    ],
)
def test_missing_key_is_named(key: str) -> None:
    metadata = llama()
    del metadata[key]
    with pytest.raises(GgufError, match=f"m.gguf: metadata {key} is missing"):
        _shape(metadata, dense_tensors())


@pytest.mark.parametrize("n_layer", [0, 513])
def test_layers_that_llama_cpp_aborts_at(n_layer: int) -> None:
    with pytest.raises(GgufError, match=f"block_count is {n_layer}"):
        _shape(llama(n_layer), dense_tensors())


@pytest.mark.parametrize(
    "extra",
    [
        {"expert_count": 8},
        {"expert_count": 8, "expert_used_count": 9},
        {"expert_used_count": 2},
        {"expert_count": 2000, "expert_used_count": 8},
    ],
)
def test_expert_counts_that_llama_cpp_aborts_at(extra: dict[str, Value]) -> None:
    """An abort costs a worker and says little; the reason is known beforehand."""
    with pytest.raises(GgufError, match="expert_count"):
        _shape(llama(**extra), dense_tensors())


def test_dense_hunyuan_may_count_one_expert() -> None:
    shape = _shape(llama(arch="hunyuan-dense", expert_count=1), dense_tensors())
    assert shape.n_expert == 0


@pytest.mark.parametrize(
    ("metadata", "words", "is_projector"),
    [
        ({"general.architecture": "clip"}, "projector", True),
        ({"general.architecture": "llama", "general.type": "adapter"}, "LoRA", False),
        ({"general.architecture": "controlvector"}, "control vector", False),
        ({"general.type": "imatrix"}, "importance matrix", False),
    ],
)
def test_part_of_a_model_is_no_model(
    metadata: dict[str, Value], words: str, is_projector: bool
) -> None:
    with pytest.raises(NotAModelError, match=words) as caught:
        _shape(metadata, dense_tensors())
    assert caught.value.is_projector is is_projector


def test_vocabulary_alone_is_no_model() -> None:
    with pytest.raises(GgufError, match="no tensors"):
        _shape(llama(), [])


_KEYS = (
    "block_count", "embedding_length", "feed_forward_length", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.sliding_window",
    "attention.sliding_window_pattern", "nextn_predict_layers", "expert_count",
    "expert_used_count", "ssm.conv_kernel", "full_attention_interval", "pooling_type",
    "attention.shared_kv_layers", "attention.recurrent_layers", "wkv.head_size",
)  # fmt: skip
_NUMBERS = st.integers(-3, 5) | st.integers(-(2**31), 2**64 - 1)
_VALUES = (
    _NUMBERS
    | st.floats(width=32)
    | st.booleans()
    | st.text(max_size=5)
    | st.lists(st.integers(0, 5), min_size=1, max_size=6)
    | st.lists(st.booleans(), min_size=1, max_size=6)
)


@busy
@given(
    st.sampled_from(["llama", "gemma3", "jamba", "nemotron_h", "qwen3next", "rwkv7", "gemma4",
                     "minimax-01", "exaone4", "mimo2", "falcon-h1", "deepseek32"]),
    st.dictionaries(st.sampled_from(_KEYS), _VALUES, max_size=6),
)  # fmt: skip
def test_senseless_metadata_never_fails_otherwise(arch: str, changes: dict[str, Value]) -> None:
    """Whatever a file claims, the outcome is a shape or a GgufError that names the file."""
    metadata = llama(4, arch) | {f"{arch}.{key}": item for key, item in changes.items()}
    header = parse_header(
        Gguf(metadata=metadata, tensors=dense_tensors(4)).header(), name="fuzz.gguf"
    )
    try:
        shape = describe_model(header)
    except GgufError as error:
        if "fuzz.gguf" not in str(error):
            raise
    else:
        assert len(shape.layers) == shape.n_layer
