"""Names for files that share one, and projectors for models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shimpy.names import ModelName
from shimpy.registry.discovery import FoundFile, FoundModel
from shimpy.registry.naming import assign_names, is_projector_name, pick_projector
from shimpy.registry.settings import ModelSettings


def _model(path: str, inode: int = 0, digest: str = "", **fields: Any) -> FoundModel:
    file = FoundFile(
        path=Path(path), size_bytes=1, mtime_ns=1, modified_s=1.0,
        identity=(1, inode or abs(hash(path))), digest=digest,
    )  # fmt: skip
    return FoundModel(files=(file,), source="/", **fields)


def _names(*models: FoundModel | str) -> list[str]:
    found = [_model(model) if isinstance(model, str) else model for model in models]
    return [str(named.name) for named in assign_names(found)[0]]


def test_each_file_has_the_name_of_its_stem() -> None:
    assert _names("/a/m-Q8_0.gguf", "/a/m-f16.gguf", "/b/n.gguf") == [
        "m:q8_0", "m:f16", "n:latest",
    ]  # fmt: skip


def test_second_of_a_name_gets_its_folder_in_front() -> None:
    """The first in the folders' order keeps the plain name, so that it does not change."""
    named, problems = assign_names([_model("/x/a/m-Q8_0.gguf"), _model("/x/b/m.Q8_0.gguf")])
    assert [str(one.name) for one in named] == ["m:q8_0", "b/m:q8_0"]
    assert "/x/b/m.Q8_0.gguf" in problems[0]
    assert "b/m:q8_0" in problems[0]


def test_more_folders_come_in_front_until_it_is_alone() -> None:
    assert _names("/a/q/m.gguf", "/b/q/m.gguf", "/c/q/m.gguf") == [
        "m:latest", "q/m:latest", "c/q/m:latest",
    ]  # fmt: skip


def test_names_that_differ_in_case_alone_get_numbers_at_last() -> None:
    assert _names("/m.gguf", "/M.gguf", "/M.GGUF") == ["m:latest", "m-2:latest", "m-3:latest"]


def test_folder_name_becomes_a_part_of_a_name() -> None:
    assert _names("/a/m.gguf", "/My Models!/m.gguf")[1] == "my-models/m:latest"


def test_second_link_to_one_file_is_no_second_model() -> None:
    named, problems = assign_names([_model("/a/m.gguf", 7), _model("/b/m.gguf", 7)])
    assert [(str(one.name), one.aliases) for one in named] == [("m:latest", ())]
    assert problems == []


def test_second_name_of_one_file_is_an_alias() -> None:
    """One model with two names: loaded once, listed once."""
    (named,), _ = assign_names([_model("/a/m.gguf", 7), _model("/a/other-f16.gguf", 7)])
    assert (str(named.name), named.aliases) == ("m:latest", (ModelName("other", "f16"),))


def test_copy_in_another_store_is_an_alias() -> None:
    """Stores that name files by their digests tell copies on two file systems."""
    models = [
        _model(
            "/hub/a.gguf", digest="sha256:1", tool="huggingface", name=ModelName("repo", "q8_0")
        ),
        _model("/o/sha256-1", digest="sha256:1", tool="ollama", name=ModelName("small")),
    ]
    (named,), problems = assign_names(models)
    assert (str(named.name), named.aliases) == ("repo:q8_0", (ModelName("small"),))
    assert problems == []


def test_names_that_a_tools_user_gave_stay_apart() -> None:
    """`ollama cp` makes a second name on purpose; it is listed there, and so here."""
    models = [
        _model("/o/1", 7, tool="ollama", name=ModelName("a")),
        _model("/o/1", 7, tool="ollama", name=ModelName("b")),
    ]
    assert _names(*models) == ["a:latest", "b:latest"]


def test_same_file_with_settings_of_its_own_is_a_model_of_its_own() -> None:
    settings = ModelSettings(system="You are a pirate.")
    models = [
        _model("/m.gguf", 7),
        _model("/o/1", 7, tool="ollama", name=ModelName("pirate"), settings=settings),
    ]
    assert _names(*models) == ["m:latest", "pirate:latest"]


def test_second_of_a_name_in_a_tools_store_gets_the_tool_in_front() -> None:
    models = [_model("/qwen3-8b.gguf", name=ModelName("qwen3", "8b")),
              _model("/o/1", tool="ollama", name=ModelName("qwen3", "8b"))]  # fmt: skip
    assert _names(*models) == ["qwen3:8b", "ollama/qwen3:8b"]


@pytest.mark.parametrize("name", ["mmproj-f16.gguf", "gemma-mmproj.gguf", "MMPROJ-x.gguf"])
def test_projector_by_name(name: str) -> None:
    assert is_projector_name(Path(name))


@pytest.mark.parametrize(
    ("model", "projectors", "n_names", "picked"),
    [
        ("m-Q8_0.gguf", [], 1, None),
        ("m-Q8_0.gguf", ["mmproj-model-f16.gguf"], 1, "mmproj-model-f16.gguf"),
        ("m-Q8_0.gguf", ["mmproj-model-f16.gguf"], 2, None),
        ("m-Q8_0.gguf", ["mmproj-f32.gguf", "mmproj-f16.gguf"], 1, "mmproj-f16.gguf"),
        ("m-Q8_0.gguf", ["mmproj-bf16.gguf", "mmproj-Q8_0.gguf"], 1, "mmproj-bf16.gguf"),
        ("gemma-3-4b-it-Q4_K_M.gguf", ["mmproj-gemma-3-4b-it-f16.gguf"], 3,
         "mmproj-gemma-3-4b-it-f16.gguf"),
        ("gemma-3-4b-it-Q4_K_M.gguf", ["gemma-3-4b-it-mmproj-f16.gguf"], 3,
         "gemma-3-4b-it-mmproj-f16.gguf"),
        ("gemma-3-12b-it-Q4_K_M.gguf", ["mmproj-gemma-3-4b-it-f16.gguf"], 3, None),
        ("gemma-3-12b-it-Q4_K_M.gguf",
         ["mmproj-gemma-3-f16.gguf", "mmproj-gemma-3-12b-it-f32.gguf"], 2,
         "mmproj-gemma-3-12b-it-f32.gguf"),
    ],
)  # fmt: skip
def test_projector_of_a_model(
    model: str, projectors: list[str], n_names: int, picked: str | None
) -> None:
    path = pick_projector(Path(model), map(Path, projectors), n_names_in_folder=n_names)
    assert (path and path.name) == picked
