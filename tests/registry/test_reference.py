from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from shimpy.errors import InvalidNameError
from shimpy.names import ModelName
from shimpy.registry.reference import (
    CatalogReference,
    HubReference,
    OllamaReference,
    UrlReference,
    is_name,
    parse_reference,
)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("deepseek-moe-16b", ModelName("deepseek-moe-16b")),
        ("Deepseek-MoE-16b:Q4_K_M", ModelName("deepseek-moe-16b", "q4_k_m")),
        ("user/model:tag", ModelName("user/model", "tag")),
    ],
)
def test_a_plain_name_is_the_catalogs(text: str, name: ModelName) -> None:
    assert parse_reference(text) == CatalogReference(name=name)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("hf.co/Org/Repo-GGUF", HubReference(repository="Org/Repo-GGUF")),
        ("HF.co/Org/Repo:latest", HubReference(repository="Org/Repo")),
        (
            "huggingface.co/Org/Repo:Q4_K_M",
            HubReference(repository="Org/Repo", quantization="Q4_K_M"),
        ),
        ("Org/Repo/a/x-Q8_0.gguf", HubReference(repository="Org/Repo", path="a/x-Q8_0.gguf")),
        ("hf.co/Org/Repo/x.gguf", HubReference(repository="Org/Repo", path="x.gguf")),
        ("https://huggingface.co/Org/Repo", HubReference(repository="Org/Repo")),
        ("https://huggingface.co/Org/Repo/tree/main", HubReference(repository="Org/Repo")),
        (
            "https://huggingface.co/Org/Repo/blob/main/a/x%2DQ8_0.gguf?download=true",
            HubReference(repository="Org/Repo", path="a/x-Q8_0.gguf"),
        ),
        (
            "https://hf.co/Org/Repo/resolve/v1.0/x.gguf",
            HubReference(repository="Org/Repo", revision="v1.0", path="x.gguf"),
        ),
    ],
)
def test_repositories_are_the_hubs(text: str, wanted: HubReference) -> None:
    """Their letters are kept: the hub tells them apart."""
    assert parse_reference(text) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("ollama:llama3.2", OllamaReference(name="llama3.2")),
        ("ollama:llama3.2:1b", OllamaReference(name="llama3.2", tag="1b")),
        ("ollama:me/mine:x", OllamaReference(namespace="me", name="mine", tag="x")),
        (
            "ollama:reg.example:5000/me/mine",
            OllamaReference(host="reg.example:5000", namespace="me", name="mine"),
        ),
        (
            "ollama:http://[::1]:5000/me/mine",
            OllamaReference(host="[::1]:5000", namespace="me", name="mine", is_insecure=True),
        ),
    ],
)
def test_ollama_names_lead_to_its_registry(text: str, wanted: OllamaReference) -> None:
    assert parse_reference(text) == wanted


def test_any_other_address_of_a_gguf_file_is_taken_as_it_is() -> None:
    text = "https://example.com/a/x-Q4_0.gguf?key=1#top"
    assert parse_reference(text) == UrlReference(url="https://example.com/a/x-Q4_0.gguf?key=1")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("file:///etc/passwd.gguf", "https://"),
        ("ftp://example.com/x.gguf", "https://"),
        ("https:///x.gguf", "https://"),
        ("https://example.com/x.bin", ".gguf"),
        ("https://me:secret@example.com/x.gguf", "password"),
        ("hf.co/just-one", "hf.co/org/repo"),
        ("hf.co/org/../x.gguf", "hf.co/org/repo"),
        ("hf.co/org/repo/a/../../x.gguf", "hf.co/org/repo"),
        ("hf.co/org/repo/.hidden.gguf", "hf.co/org/repo"),
        ("hf.co/org/repo/README.md", ".gguf"),
        ("hf.co/org/repo/x.gguf:Q4_0", "hf.co/org/repo"),
        ("ollama:a/b/c/d", "ollama:name:tag"),
        ("ollama:../x", "ollama:name:tag"),
        ("ollama:ftp://h/a/b", "ollama:name:tag"),
        ("ollama:", "ollama:name:tag"),
        ("", "empty"),
        ("x" * 3000, "3000 characters"),
        ("https://[", "no address"),
        ("so so", "invalid model name"),
    ],
)
def test_what_can_not_be_pulled_says_how_to_write_it(text: str, said: str) -> None:
    with pytest.raises(InvalidNameError, match=said.replace(".", r"\.")):
        parse_reference(text)


@given(st.text(max_size=80))
def test_any_text_is_a_reference_or_a_clear_error(text: str) -> None:
    try:
        reference = parse_reference(text)
    except InvalidNameError:
        return
    assert ".." not in str(reference).replace("...", "").split("/")


@pytest.mark.parametrize(
    "text",
    ["x", "x:q4", "hf.co/Org/Repo:Q4_K_M", "ollama:user/x:1b", "ollama:h:1/u/x:y"],
)
def test_a_reference_reads_back_as_itself(text: str) -> None:
    reference = parse_reference(text)
    assert parse_reference(str(reference)) == reference


def test_names_and_places_are_told_apart() -> None:
    assert is_name("qwen3:8b")
    assert is_name("hf.co/org/repo:q4_k_m")
    assert not is_name("ollama:qwen3:8b")
    assert not is_name("https://example.com/x.gguf")
    assert not is_name("org/repo/x.gguf")
