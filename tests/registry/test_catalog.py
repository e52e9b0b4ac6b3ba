from __future__ import annotations

from pathlib import Path

import pytest

from shimpy.chat.gotemplate import GoTemplate, is_go_template
from shimpy.errors import NotFoundError, RegistryError, UnsupportedError
from shimpy.names import ModelName, parse_model_name
from shimpy.parameters import check_parameters
from shimpy.registry.catalog import Catalog, CatalogFile, load_catalog

CATALOG = load_catalog()

# What the project promises to know; see the README.
PROMISED = [
    "deepseek-moe-16b:f16",
    "deepseek-moe-16b:q8_0",
    "deepseek-moe-16b:q4_k_m",
    "deepseek-moe-16b:q2_k",
    "phi-3.5-moe:f16",
    "gpt-oss-20b",
    "mixtral-8x7b",
    "qwen3-0.6b",
    "qwen3-1.7b",
    "qwen3-4b",
    "qwen3-8b",
    "qwen3-14b",
    "qwen3-30b-a3b",
    "qwen2.5-coder",
    "deepseek-v2-lite",
    "deepseek-coder-v2-lite",
    "olmoe",
    "granite3-moe",
    "llama3.2",
    "gemma3",
    "smollm2",
    "nomic-embed-text",
    "bge-m3",
    "bge-reranker-v2-m3",
]


@pytest.mark.parametrize("name", PROMISED)
def test_the_promised_models_are_there(name: str) -> None:
    match = CATALOG.resolve(parse_model_name(name))
    assert match.entry.repositories()
    assert match.entry.title
    assert match.entry.license


@pytest.mark.parametrize(
    ("tag", "repo"),
    [
        ("f16", "MikeKuykendall/deepseek-moe-16b-cpu-offload-gguf"),
        ("q8_0", "MikeKuykendall/deepseek-moe-16b-q8-0-cpu-offload-gguf"),
        ("q4_k_m", "MikeKuykendall/deepseek-moe-16b-q4-k-m-cpu-offload-gguf"),
        ("q2_k", "MikeKuykendall/deepseek-moe-16b-q2-k-cpu-offload-gguf"),
    ],
)
def test_deepseek_moe_has_a_repository_for_each_quantization(tag: str, repo: str) -> None:
    assert CATALOG.entries["deepseek-moe-16b"].tags[tag] == repo


@pytest.mark.parametrize("name", CATALOG.entries)
def test_every_entry_can_be_used(name: str) -> None:
    """Options are Ollama's, with values that it takes; a template compiles."""
    settings = CATALOG.entries[name].settings
    assert check_parameters(settings.parameters) == settings.parameters
    if settings.template is not None:
        assert is_go_template(settings.template)
        GoTemplate(settings.template)


def test_no_two_entries_answer_to_one_name() -> None:
    names = [parse_model_name(name) for name in CATALOG.entries]
    names += [parse_model_name(a) for entry in CATALOG.entries.values() for a in entry.aliases]
    assert len(names) == len(set(names))


def test_a_model_that_can_not_work_says_why() -> None:
    with pytest.raises(UnsupportedError, match=r"grin-moe can't be pulled: .*no converter"):
        CATALOG.resolve(ModelName("grin-moe"))


@pytest.mark.parametrize(
    ("text", "name", "quantization"),
    [
        ("qwen3", "qwen3-8b", None),
        ("qwen3:q8_0", "qwen3-8b", "q8_0"),
        ("qwen3:30b", "qwen3-30b-a3b", None),
        ("qwen3:30b-q8_0", "qwen3-30b-a3b", "q8_0"),
        ("qwen3:30b-a3b-q4_k_m", "qwen3-30b-a3b", "q4_k_m"),
        ("qwen3-30b-a3b:iq4_xs", "qwen3-30b-a3b", "iq4_xs"),
        ("bge-large:f16", "bge-large-en", "f16"),
    ],
)
def test_aliases_are_read_as_ollama_users_write_them(
    text: str, name: str, quantization: str | None
) -> None:
    match = CATALOG.resolve(parse_model_name(text))
    assert (match.name, match.quantization) == (name, quantization)


@pytest.mark.parametrize(
    ("text", "said"),
    [("qwen3:99b", "qwen3:30b-a3b"), ("deepsek-moe-16b", "deepseek-moe-16b"), ("zzz", "hf.co/")],
)
def test_an_unknown_name_says_what_is_near(text: str, said: str) -> None:
    with pytest.raises(NotFoundError) as raised:
        CATALOG.resolve(parse_model_name(text))
    assert said in raised.value.message


def test_defaults_hold_for_every_quantization_of_an_entry() -> None:
    settings = CATALOG.settings(ModelName("qwen3-8b", "q5_k_m"))
    assert settings.parameters["temperature"] == 0.6
    assert CATALOG.settings(ModelName("something-else")).is_empty


def test_the_demo_gets_its_prompts_as_they_are() -> None:
    settings = CATALOG.settings(ModelName("demo"))
    assert (settings.raw, settings.template) == (True, None)
    assert settings.parameters["temperature"] == 0.2
    assert settings.parameters["num_predict"] == 256


def own(tmp_path: Path, text: str) -> Catalog:
    path = tmp_path / "registry.toml"
    path.write_text(text)
    return load_catalog(path)


def test_a_users_file_adds_models(tmp_path: Path) -> None:
    catalog = own(tmp_path, '[models.mine]\ntitle = "Mine"\nrepo = "me/mine-GGUF"\nstop = ["x"]')
    assert catalog.resolve(ModelName("mine")).entry.repo == "me/mine-GGUF"
    assert catalog.settings(ModelName("mine")).parameters == {"stop": ["x"]}
    assert "olmoe" in catalog.entries


def test_a_users_entry_changes_only_what_it_gives(tmp_path: Path) -> None:
    catalog = own(tmp_path, "[models.olmoe]\noptions = { temperature = 0.1 }")
    entry = catalog.entries["olmoe"]
    assert entry.options == {"temperature": 0.1}
    assert entry.repo == CATALOG.entries["olmoe"].repo


def test_a_users_place_takes_the_other_kinds_place(tmp_path: Path) -> None:
    catalog = own(tmp_path, '[models.grin-moe]\nrepo = "me/grin-GGUF"')
    assert catalog.resolve(ModelName("grin-moe")).entry.unavailable == ""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("= x", "not valid TOML"),
        ("[model.x]", "no such key: model"),
        ("models = 1", "must be a table"),
        ('[models.x]\ntitle = "X"', "must have one of repo, tags"),
        ('[models.x]\ntitle = "X"\nrepo = "a/b"\ntags = { q8_0 = "a/b" }', "repo and tags"),
        ('[models.x]\ntitle = "X"\nrepo = "b"', '"b" is no repository'),
        ('[models.x]\ntitle = "X"\nrepo = "a/b"\nsize = 1', "unknown field `size`"),
        ('[models.x]\ntitle = 1\nrepo = "a/b"', "title"),
        ('[models.X]\ntitle = "X"\nrepo = "a/b"', "lower case"),
        ('[models."x:y"]\ntitle = "X"\nrepo = "a/b"', "lower case"),
        ('[models.x]\ntitle = "X"\nrepo = "a/b"\naliases = [".."]', "invalid model name"),
        ('[models.x]\ntitle = "X"\ntags = { Q8_0 = "a/b" }', "tags are in lower case"),
        ("[models]\nx = 1", "Expected `object`"),
    ],
)
def test_a_mistake_names_the_file_and_the_entry(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(RegistryError) as raised:
        own(tmp_path, text)
    assert said in raised.value.message
    assert str(tmp_path / "registry.toml") in raised.value.message


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "registry.toml"
    file = CatalogFile(path)
    assert "mine" not in file.current().entries
    path.write_text('[models.mine]\ntitle = "Mine"\nrepo = "me/mine"')
    assert "mine" in file.current().entries
    assert file.settings(ModelName("mine")).is_empty
    path.unlink()
    assert "mine" not in file.current().entries
