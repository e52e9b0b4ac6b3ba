"""`shimpy plan` as it is typed, with no daemon running."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, get_args

import pytest
from click.testing import CliRunner, Result

from shimpy.cli.errors import EXIT_USAGE
from shimpy.cli.options import KV_TYPES
from shimpy.cli.plan import command
from shimpy.protocol.messages import KvType
from tests.daemon import shimpy
from tests.shapes import MODELS, write_gguf

SUPPOSED = ("--vram", "8GiB", "--ram", "32GiB")


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    return write_gguf(
        folder / "deepseek-moe-16b-Q4_K_M.gguf", MODELS["deepseek-moe-16b"](), "Q4_K_M"
    )


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("SHIMPY_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("SHIMPY_HOME", str(tmp_path / "home"))


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def as_json(*arguments: str | Path) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    data: dict[str, Any] = json.loads(result.stdout)
    return data


def test_a_file_is_planned_for_a_supposed_card(model_file: Path) -> None:
    data = as_json(model_file, *SUPPOSED)
    assert data["placement"]["mode"] == "experts-in-ram"
    assert data["placement"]["load_mode"] == "locked"
    assert data["devices"][0]["free_bytes"] == 8 << 30
    assert data["experts"]["tensors"] == 81


def test_a_name_is_found_in_the_folders_of_the_config(
    model_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHIMPY_MODEL_DIRS", str(model_file.parent))
    assert as_json("deepseek-moe-16b", *SUPPOSED)["model"] == "deepseek-moe-16b:q4_k_m"


def test_the_table_shows_the_ladder_and_marks_the_choice(model_file: Path) -> None:
    output = run(model_file, *SUPPOSED).stdout
    rows = output.split("\n\n")[1].splitlines()
    assert "PLACEMENT" in rows[0]
    marks = [row[0] for row in rows[1:]]
    assert marks.count("*") == 1
    assert marks[0] == "x"
    assert "GPU0 lacks 3.2 GiB" in rows[1]
    assert "on the CPU alone" in rows[-1]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--n-ctx", "2048"), {"n_ctx": 2048}),
        (("--slots", "3"), {"n_slots": 3}),
        (("--cpu-moe", "on"), {"n_cpu_moe": 28, "moe_layers_in_ram": 27}),
        (("--cpu-moe", "OFF"), {"n_cpu_moe": 0, "mode": "partial-gpu"}),
        (("--cpu-moe", "20"), {"n_cpu_moe": 20, "moe_layers_in_ram": 19}),
        (("--kv-type", "q8_0"), {"kv_type": "q8_0"}),
        (("--load-mode", "mmap"), {"load_mode": "mmap"}),
        (("--load-mode", "locked"), {"load_mode": "locked"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_options_are_kept_to(
    model_file: Path, arguments: tuple[str, ...], expected: dict[str, Any]
) -> None:
    placement = as_json(model_file, *SUPPOSED, *arguments)["placement"]
    assert {key: placement[key] for key in expected} == expected


def test_several_cards_are_supposed_by_repeating(model_file: Path) -> None:
    data = as_json(model_file, "--vram", "8GiB", "--vram", "8G", "--ram", "32GiB")
    assert [device["name"] for device in data["devices"]] == ["GPU0", "GPU1"]
    assert sum(data["placement"]["tensor_split"]) == 29


def test_without_a_card_nothing_is_page_locked(model_file: Path) -> None:
    output = run(model_file, "--vram", "0", "--ram", "32GiB", "--load-mode", "locked").stdout
    assert "page-locked" not in output
    assert "weights in RAM private" in output
    assert output.rstrip().endswith("private")


def test_no_card_is_supposed_by_zero(model_file: Path) -> None:
    assert as_json(model_file, "--vram", "0", "--ram", "32GiB")["placement"]["mode"] == "cpu"


def test_what_fits_nowhere_is_explained_not_an_error(model_file: Path) -> None:
    data = as_json(model_file, "--vram", "1GiB", "--ram", "4GiB")
    assert data["fits"] is False
    assert "lacks" in data["reason"]


def test_the_config_counts_where_no_option_is_given(
    model_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHIMPY_N_CPU_MOE", "20")
    monkeypatch.setenv("SHIMPY_N_CTX", "2048")
    placement = as_json(model_file, *SUPPOSED)["placement"]
    assert (placement["n_cpu_moe"], placement["n_ctx"]) == (20, 2048)
    assert as_json(model_file, *SUPPOSED, "--cpu-moe", "on")["placement"]["n_cpu_moe"] == 28
    # "auto" is an option that is given, too.
    chosen = as_json(model_file, *SUPPOSED, "--cpu-moe", "auto")["placement"]["n_cpu_moe"]
    monkeypatch.delenv("SHIMPY_N_CPU_MOE")
    assert chosen == as_json(model_file, *SUPPOSED)["placement"]["n_cpu_moe"] != 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--vram", "8Gx"), "8Gx"),
        (("--ram", "lots"), "lots"),
        (("--cpu-moe", "some"), "some"),
        (("--cpu-moe", "-1"), "-1"),
        (("--kv-type", "q9"), "q9"),
        (("--n-ctx", "0"), "--n-ctx"),
        (("--slots", "-2"), "--slots"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_bad_value_is_a_usage_error(
    model_file: Path, arguments: tuple[str, ...], message: str
) -> None:
    result = run(model_file, *arguments)
    assert result.exit_code == EXIT_USAGE
    assert message in result.output


def test_the_types_of_a_kv_cache_are_those_that_workers_know() -> None:
    assert get_args(KvType) == KV_TYPES


@pytest.mark.slow
def test_this_machine_is_planned_for_without_a_daemon(model_file: Path, tmp_path: Path) -> None:
    """The whole program in a process of its own, with llama.cpp asked for its devices."""
    env = {**os.environ, "SHIMPY_HOME": str(tmp_path)}
    done = shimpy("plan", str(model_file), "--json", env=env)
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert data["host"]["available_bytes"] > 0
    assert data["ladder"][-1]["placement"]["mode"] == "cpu"
    # The header alone is enough for llama.cpp to simulate it.
    assert data["figures"] == "exact" or not data["fits"]


@pytest.mark.slow
def test_a_model_that_is_not_there_is_a_failure(tmp_path: Path) -> None:
    env = {**os.environ, "SHIMPY_HOME": str(tmp_path)}
    done = shimpy("plan", "nothing-like-it", "--vram", "0", "--ram", "1G", env=env)
    assert done.returncode == 1
    assert 'there is no model "nothing-like-it' in done.stderr
