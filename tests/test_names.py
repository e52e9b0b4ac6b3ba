"""Names: what people type, and what files are called."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shimpy.errors import InvalidNameError
from shimpy.names import MAX_NAME_CHARS, ModelName, name_from_stem, parse_model_name, parse_shard

# The machine may be busy with other things.
busy = settings(deadline=None)


@pytest.mark.parametrize(
    ("stem", "name"),
    [
        ("deepseek-moe-16b-Q4_K_M", "deepseek-moe-16b:q4_k_m"),
        ("deepseek-moe-16b-f16", "deepseek-moe-16b:f16"),
        ("Model-FP16", "model:f16"),
        ("Model-bf16", "model:bf16"),
        ("mistral-7b-instruct-v0.2.Q5_K_S", "mistral-7b-instruct-v0.2:q5_k_s"),
        ("Qwen3_30B_A3B_Q6_K", "qwen3_30b_a3b:q6_k"),
        ("gemma-3-4b-it-IQ3_XXS", "gemma-3-4b-it:iq3_xxs"),
        ("GLM-4.5-Air-UD-Q4_K_XL", "glm-4.5-air:ud-q4_k_xl"),
        ("llama-3-8b-Q4_0_4_8", "llama-3-8b:q4_0_4_8"),
        ("gpt-oss-20b-mxfp4", "gpt-oss-20b:mxfp4"),
        ("gpt-oss-20b-MXFP4_MOE", "gpt-oss-20b:mxfp4_moe"),
        ("nemotron-NVFP4", "nemotron:nvfp4"),
        ("bitnet-b1.58-TQ2_0", "bitnet-b1.58:tq2_0"),
        ("big-model-Q8_0-00001-of-00003", "big-model:q8_0"),
        ("big-model-00002-of-00003", "big-model:latest"),
        ("tinyllama", "tinyllama:latest"),
        # No quantization, though the end looks like one.
        ("faq4", "faq4:latest"),
        ("gguf16", "gguf16:latest"),
        ("Q4_K_M", "q4_k_m:latest"),
        # Characters that no name has.
        ("My Model (v2)-Q4_K_M", "my-model-v2:q4_k_m"),
        ("..hidden..", "hidden:latest"),
        ("日本語", "model:latest"),
    ],
)
def test_name_of_a_file(stem: str, name: str) -> None:
    assert str(name_from_stem(stem)) == name


@busy
@given(st.text(max_size=80))
def test_every_file_gets_a_name_that_can_be_asked_for(stem: str) -> None:
    """No file can be listed under a name that a request would be refused for."""
    name = name_from_stem(stem)
    assert parse_model_name(str(name)) == name


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("llama3", ModelName("llama3", "latest")),
        (" Llama3:Q4_K_M ", ModelName("llama3", "q4_k_m")),
        ("hf.co/org/Repo-GGUF:Q4_K_M", ModelName("hf.co/org/repo-gguf", "q4_k_m")),
    ],
)
def test_name_as_people_type_it(text: str, name: ModelName) -> None:
    assert parse_model_name(text) == name


@pytest.mark.parametrize(
    "text",
    ["", "  ", "a:b:c", "a:", ":b", "a//b", "/etc/passwd", "../x", "a/../b", "./a", "a b", "a\0",
     "a\nb", "c:\\x.gguf", "a?", "-a", "ä", "x" * (MAX_NAME_CHARS + 1)],
)  # fmt: skip
def test_what_is_no_name(text: str) -> None:
    """Paths above all: a request must not reach files by naming them."""
    with pytest.raises(InvalidNameError):
        parse_model_name(text)


def test_long_name_is_refused_with_its_length() -> None:
    with pytest.raises(InvalidNameError, match=f"{MAX_NAME_CHARS + 1} characters"):
        parse_model_name("x" * (MAX_NAME_CHARS + 1))


@pytest.mark.parametrize(
    ("stem", "shard"),
    [
        ("m-00002-of-00005", ("m", 2, 5)),
        ("m-2-of-5", None),
        ("m-00002-of-00005-x", None),
        ("m", None),
    ],
)
def test_shard_of_a_stem(stem: str, shard: tuple[str, int, int] | None) -> None:
    assert parse_shard(stem) == shard


def test_names_sort_by_name_then_tag() -> None:
    assert sorted([ModelName("b"), ModelName("a", "q8_0"), ModelName("a", "f16")]) == [
        ModelName("a", "f16"),
        ModelName("a", "q8_0"),
        ModelName("b"),
    ]
