from __future__ import annotations

import pytest

from shimpy.errors import NotFoundError
from shimpy.registry.offers import (
    Offer,
    canonical,
    find_offer,
    find_path,
    list_offers,
    one_of_each,
)
from shimpy.registry.remote import Body, RemoteFile


def _unopened(_start: int, _end: int | None) -> Body:
    raise AssertionError


def file(path: str, size: int = 100) -> RemoteFile:
    return RemoteFile(path=path, size_bytes=size, digest="", open=_unopened)  # type: ignore[arg-type]


def offers(*paths: str, pattern: str | None = None) -> list[Offer]:
    return list_offers([file(path) for path in paths], pattern=pattern)


def test_each_quantization_is_an_offer() -> None:
    found = offers("README.md", "Model-Q8_0.gguf", "Model-Q4_K_M.gguf", "model.fp16.gguf")
    assert {offer.quantization: offer.path for offer in found} == {
        "q8_0": "Model-Q8_0.gguf",
        "q4_k_m": "Model-Q4_K_M.gguf",
        "f16": "model.fp16.gguf",
    }


def test_shards_are_one_model_in_order() -> None:
    names = [f"Q8_0/big-Q8_0-0000{i}-of-00003.gguf" for i in (3, 1, 2)]
    (offer,) = offers(*names)
    assert offer.quantization == "q8_0"
    assert [f.path for f in offer.files] == sorted(names)
    assert offer.size_bytes == 300


def test_a_model_that_lacks_a_shard_is_no_offer() -> None:
    assert offers("x-00001-of-00003.gguf", "x-00003-of-00003.gguf") == []


def test_a_whole_file_beside_shards_is_another_offer() -> None:
    found = offers("x-Q8_0.gguf", "x-Q8_0-00001-of-00002.gguf", "x-Q8_0-00002-of-00002.gguf")
    assert [len(offer.files) for offer in found] == [1, 2]
    assert find_offer(found, "Q8_0", where="org/x-GGUF").path == "x-Q8_0.gguf"


@pytest.mark.parametrize(
    ("path", "quantization"),
    [
        ("Q4_K_M/model.gguf", "q4_k_m"),
        ("BF16/model-00001-of-00001.gguf", "bf16"),
        ("gpt-oss-20b-mxfp4.gguf", "mxfp4"),
        ("Model-UD-Q4_K_XL.gguf", "ud-q4_k_xl"),
        ("Q8_0.gguf", "q8_0"),
        ("model.gguf", "latest"),
    ],
)
def test_the_quantization_is_in_the_files_or_the_folders_name(path: str, quantization: str) -> None:
    assert offers(path)[0].quantization == quantization


def test_a_projector_goes_with_its_model() -> None:
    found = offers("gemma-Q4_K_M.gguf", "gemma-Q8_0.gguf", "mmproj-gemma-f16.gguf")
    projectors = {offer.projector.path for offer in found if offer.projector is not None}
    assert len(found) == 2
    assert projectors == {"mmproj-gemma-f16.gguf"}
    assert [f.path for f in found[0].all_files] == ["gemma-Q4_K_M.gguf", "mmproj-gemma-f16.gguf"]


def test_of_several_projectors_the_f16_is_taken() -> None:
    (offer,) = offers("m-Q4_0.gguf", "mmproj-BF16.gguf", "mmproj-F16.gguf", "mmproj-F32.gguf")
    assert offer.projector is not None
    assert offer.projector.path == "mmproj-F16.gguf"


@pytest.mark.parametrize("path", ["imatrix.gguf", "Model-imatrix.gguf", "my-lora-f16.gguf"])
def test_what_is_no_model_is_no_offer(path: str) -> None:
    assert offers(path) == []


def test_a_name_that_only_sounds_like_an_adapter_is_a_model() -> None:
    assert len(offers("explorator-Q4_0.gguf")) == 1


def test_a_pattern_narrows_what_counts() -> None:
    found = offers("a/x-Instruct-Q8_0.gguf", "a/x-Base-Q8_0.gguf", pattern="*-Instruct-*")
    assert [offer.path for offer in found] == ["a/x-Instruct-Q8_0.gguf"]


def test_the_model_that_the_repository_is_named_for_comes_first() -> None:
    found = offers("Other-Q8_0.gguf", "Qwen-7B-Q8_0.gguf")
    assert find_offer(found, "q8_0", where="org/Qwen-7B-GGUF").path == "Qwen-7B-Q8_0.gguf"


def test_different_models_of_one_quantization_are_not_guessed_among() -> None:
    found = offers("a-Q8_0.gguf", "b-Q8_0.gguf")
    with pytest.raises(NotFoundError, match=r"2 different models of q8_0.*a-Q8_0.gguf, b-Q8_0"):
        find_offer(found, "q8_0", where="org/collection")


def test_what_is_missing_names_what_is_there() -> None:
    found = offers("x-Q8_0.gguf", "x-Q2_K.gguf")
    with pytest.raises(NotFoundError, match="org/x has no Q4_K_M; it has q2_k, q8_0"):
        find_offer(found, "Q4_K_M", where="org/x")
    with pytest.raises(NotFoundError, match=r"no model y.gguf; it has x-Q2_K.gguf, x-Q8_0.gguf"):
        find_path(found, "y.gguf", where="org/x")
    with pytest.raises(NotFoundError, match="it has no GGUF model"):
        find_offer([], "Q8_0", where="org/x")


def test_a_file_leads_to_all_shards_of_its_model() -> None:
    found = offers("x-00001-of-00002.gguf", "x-00002-of-00002.gguf")
    assert len(find_path(found, "x-00002-of-00002.gguf", where="org/x").files) == 2


def test_one_of_each_quantization() -> None:
    found = offers("x-Q8_0.gguf", "x-Q4_0.gguf", "sub/x-Q8_0.gguf")
    paths = [offer.path for offer in one_of_each(found, where="org/x")]
    assert sorted(paths) == ["x-Q4_0.gguf", "x-Q8_0.gguf"]


@pytest.mark.parametrize(
    ("text", "tag"), [("Q4_K_M", "q4_k_m"), ("FP16", "f16"), ("q6_k", "q6_k"), ("1B", "1b")]
)
def test_quantizations_are_written_one_way(text: str, tag: str) -> None:
    assert canonical(text) == tag
