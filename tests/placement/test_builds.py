"""Builds for the CPU alone are known by their files."""

from __future__ import annotations

from pathlib import Path

import pytest

from shimpy.placement.builds import cpu_build, installed_lib
from shimpy.placement.probe import ask_worker

CPU = ("libggml.so", "libggml-base.so", "libggml-cpu.so", "libllama.so", "libmtmd.so")


def make_lib(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).touch()
    return folder


def test_the_installed_build_is_known_as_it_says_itself() -> None:
    """A GPU that the files do not tell of would never be used."""
    said, told = ask_worker(), cpu_build(installed_lib())
    if told is None:
        pytest.skip("this build has more backends than the CPU's")
    assert said.llama_cpp.startswith(told.llama_cpp)
    assert not [device for device in said.devices if device.kind in ("gpu", "igpu")]


def test_a_cpu_build_is_known(tmp_path: Path) -> None:
    assert cpu_build(make_lib(tmp_path, *CPU, "libggml-cpu-haswell.so"), {}) is not None


@pytest.mark.parametrize(
    "names",
    [
        (*CPU, "libggml-cuda.so"),
        (*CPU, "libggml-metal.dylib"),
        (*CPU, "libggml-blas.so"),
        # One library, that may hold anything.
        ("libllama.so", "libggml.so"),
        (),
    ],
)
def test_any_other_has_to_be_asked(tmp_path: Path, names: tuple[str, ...]) -> None:
    assert cpu_build(make_lib(tmp_path, *names), {}) is None


@pytest.mark.parametrize("name", ["LLAMA_CPP_LIB_PATH", "GGML_BACKEND_PATH"])
def test_so_has_one_from_elsewhere(tmp_path: Path, name: str) -> None:
    assert cpu_build(make_lib(tmp_path, *CPU), {name: "/opt/lib"}) is None


def test_so_has_one_that_is_not_there(tmp_path: Path) -> None:
    assert cpu_build(tmp_path / "lib", {}) is None
    assert cpu_build(None, {}) is None
