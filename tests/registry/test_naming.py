"""Names for files that share one, and projectors for models."""

from __future__ import annotations

from pathlib import Path

import pytest

from shimpy.registry.discovery import FoundFile, FoundModel
from shimpy.registry.naming import assign_names, is_projector_name, pick_projector


def _model(path: str, inode: int = 0) -> FoundModel:
    file = FoundFile(
        path=Path(path), size_bytes=1, mtime_ns=1, modified_s=1.0,
        identity=(1, inode or abs(hash(path))),
    )  # fmt: skip
    return FoundModel(files=(file,), source="/")


def _names(*paths: str) -> list[str]:
    return [str(name) for name in assign_names([_model(path) for path in paths])[0]]


def test_each_file_has_the_name_of_its_stem() -> None:
    assert _names("/a/m-Q8_0.gguf", "/a/m-f16.gguf", "/b/n.gguf") == [
        "m:q8_0", "m:f16", "n:latest",
    ]  # fmt: skip


def test_second_of_a_name_gets_its_folder_in_front() -> None:
    """The first in the folders' order keeps the plain name, so that it does not change."""
    names, problems = assign_names([_model("/x/a/m-Q8_0.gguf"), _model("/x/b/m.Q8_0.gguf")])
    assert [str(name) for name in names] == ["m:q8_0", "b/m:q8_0"]
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
    names, problems = assign_names([_model("/a/m.gguf", 7), _model("/b/m.gguf", 7)])
    assert (str(names[0]), names[1], problems) == ("m:latest", None, [])


def test_second_name_of_one_file_is_a_name_too() -> None:
    names, _ = assign_names([_model("/a/m.gguf", 7), _model("/a/alias.gguf", 7)])
    assert list(map(str, names)) == ["m:latest", "alias:latest"]


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
