"""create, set, cp, rm, gc and verify as a user types them, against a real daemon."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shimpy.cli.set_settings import typed
from tests.daemon import Daemon, running_daemon
from tests.synthetic import CHAIN_TEXT


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory, chain_model: Path) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("store-cli")
    models = folder / "models"
    models.mkdir()
    shutil.copy(chain_model, models / "chain.gguf")
    with running_daemon(folder / "home", models) as running:
        yield running


@pytest.fixture
def modelfile(tmp_path: Path, chain_model: Path) -> Path:
    """Of a file that the daemon does not know."""
    shutil.copy(chain_model, tmp_path / "chain-Q8_0.gguf")
    path = tmp_path / "Modelfile"
    path.write_text("FROM ./chain-Q8_0.gguf\nSYSTEM Be brief.\nPARAMETER num_predict 3\n")
    return path


def _blobs(daemon: Daemon) -> list[Path]:
    return list((Path(daemon.env["SHIMPY_HOME"]) / "data" / "store" / "blobs").glob("*"))


def test_a_model_is_created_run_verified_copied_and_removed(
    daemon: Daemon, modelfile: Path
) -> None:
    created = daemon.shimpy("create", "mine:v1", "-f", str(modelfile))
    assert (created.returncode, created.stdout) == (0, "")
    assert created.stderr.splitlines()[-1] == "success"
    shown = json.loads(daemon.shimpy("show", "mine:v1", "--json").stdout)
    assert (shown["system"], shown["source"]) == ("Be brief.", "store")
    assert "num_predict" in daemon.shimpy("show", "mine:v1", "--parameters").stdout
    answer = daemon.shimpy("run", "mine:v1", "x").stdout.strip()
    assert answer
    assert answer != CHAIN_TEXT

    assert daemon.shimpy("cp", "mine:v1", "other").returncode == 0
    assert len(_blobs(daemon)) == 1
    verified = daemon.shimpy("verify")
    assert verified.returncode == 0
    assert "mine:v1 chain-Q8_0.gguf: verified" in verified.stdout.splitlines()
    assert "other:latest chain-Q8_0.gguf: verified" in verified.stdout.splitlines()

    removed = daemon.shimpy("rm", "mine:v1", "nope", "chain", "other")
    assert removed.returncode == 1
    assert removed.stdout.splitlines() == ["deleted 'mine:v1'", "deleted 'other'"]
    missing, foreign = removed.stderr.splitlines()
    assert "'nope' not found" in missing
    assert "chain.gguf" in foreign
    assert _blobs(daemon) == []
    names = [m["name"] for m in json.loads(daemon.shimpy("list", "--json").stdout)]
    assert "mine:v1" not in names
    assert "chain:latest" in names


def test_the_demo_is_there_and_stays(daemon: Daemon) -> None:
    models = json.loads(daemon.shimpy("list", "demo", "--json").stdout)
    assert [(m["name"], m["source"]) for m in models] == [("demo:latest", "built-in")]
    done = daemon.shimpy("rm", "demo")
    assert done.returncode == 1
    assert "comes with shimpy" in done.stderr


def test_a_file_that_the_daemon_knows_is_not_copied(daemon: Daemon, tmp_path: Path) -> None:
    (model,) = json.loads(daemon.shimpy("list", "chain", "--json").stdout)
    path = tmp_path / "Modelfile"
    path.write_text(f"FROM {model['path']}\nSYSTEM x\n")
    assert daemon.shimpy("create", "linked", "-f", str(path)).returncode == 0
    assert _blobs(daemon) == []
    assert daemon.shimpy("run", "linked", "x").stdout == f"{CHAIN_TEXT}\n"
    assert daemon.shimpy("rm", "linked").returncode == 0
    assert Path(model["path"]).exists()


def test_a_damaged_file_fails_verify(daemon: Daemon, modelfile: Path) -> None:
    assert daemon.shimpy("create", "hurt", "-f", str(modelfile)).returncode == 0
    (blob,) = _blobs(daemon)
    with blob.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    done = daemon.shimpy("verify", "hurt", "--json")
    assert done.returncode == 1
    (found,) = json.loads(done.stdout)
    assert "damaged" in found["problem"]
    assert daemon.shimpy("rm", "hurt").returncode == 0


def test_settings_are_set_shown_and_taken_back(daemon: Daemon, tmp_path: Path) -> None:
    (tmp_path / "system.txt").write_text("Be kind.\nBe brief.")
    done = daemon.shimpy(
        "set", "chain", "num_ctx=512", "cpu_moe=on", "stop=a", "stop=b", "keep_alive=10m",
        f"system=@{tmp_path / 'system.txt'}", "temperature=0", "notes=12",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    settings = json.loads(daemon.shimpy("set", "chain", "--json").stdout)
    assert settings == {
        "parameters": {"num_ctx": 512, "stop": ["a", "b"], "temperature": 0},
        "system": "Be kind.\nBe brief.",
        "cpu_moe": "on",
        "keep_alive_s": 600.0,
        "notes": "12",
    }
    table = dict(line.split(None, 1) for line in done.stdout.splitlines() if " " in line)
    assert (table["num_ctx"], table["cpu_moe"], table["keep_alive"]) == ("512", "on", "10m0s")
    shown = {" ".join(line.split()) for line in daemon.shimpy("show", "chain").stdout.splitlines()}
    assert {"cpu_moe on", "keep_alive 10m0s", "notes 12"} <= shown
    undone = daemon.shimpy(
        "set", "chain", "--unset", "n_ctx", "--unset", "stop", "--unset", "system",
        "--unset", "cpu_moe", "--unset", "keep_alive", "--unset", "temperature", "--unset", "notes",
    )  # fmt: skip
    assert (undone.returncode, undone.stdout) == (0, "")


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("keep_alive", 600.0, "10m0s"),
        ("keep_alive", -1.0, "-1"),
        ("aliases", ["a", "b:c"], "a,b:c"),
        ("raw", False, "off"),
        ("cpu_moe", 3, "3"),
        ("notes", "für Bär", "für Bär"),
    ],
)
def test_a_setting_is_shown_as_it_would_be_typed(key: str, value: Any, text: str) -> None:
    assert typed(key, value) == text


@pytest.mark.parametrize("pair", ["num_ctx", "=3", "nope=1", "top_p=7", "system=@/nowhere"])
def test_a_setting_that_can_not_be_is_refused(daemon: Daemon, pair: str) -> None:
    done = daemon.shimpy("set", "chain", pair)
    assert done.returncode in (1, 2)
    assert done.stderr.startswith("Error: ")


def test_a_setting_that_is_none_is_told_with_the_nearest(daemon: Daemon) -> None:
    done = daemon.shimpy("set", "chain", "temperatures=1")
    assert done.stderr == "Error: there is no setting 'temperatures'; did you mean temperature?\n"


def test_gc_says_what_it_did(daemon: Daemon) -> None:
    done = daemon.shimpy("gc", "--all")
    assert (done.returncode, done.stdout) == (0, "removed 0 files, 0 B\n")
    assert json.loads(daemon.shimpy("gc", "--json").stdout)["n_files"] == 0


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("FROM ./nowhere.gguf", "nowhere.gguf"),
        ("FROM nope", "nope"),
        ("FROM a\nFROM b", "several"),
        ("NONSENSE", "NONSENSE"),
        ("FROM .", "no GGUF"),
    ],
)
def test_a_modelfile_that_makes_no_model_is_refused(
    daemon: Daemon, tmp_path: Path, text: str, word: str
) -> None:
    (tmp_path / "Modelfile").write_text(text)
    done = daemon.shimpy("create", "x", "-f", str(tmp_path / "Modelfile"))
    assert done.returncode == 1
    assert word in done.stderr


def test_what_was_left_unfinished_long_ago_goes_at_the_next_start(tmp_path: Path) -> None:
    """And nothing that is younger, nor the start for a manifest that can't be read."""
    store = tmp_path / "home" / "data" / "store"
    old, young = store / "partial" / "sha256-old", store / "partial" / "sha256-young"
    damaged = store / "manifests" / "m" / "latest.json"
    for path in (old, young, damaged):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("half")
    os.utime(old, (0, 0))
    (tmp_path / "models").mkdir()
    with running_daemon(tmp_path / "home", tmp_path / "models") as daemon:
        models = json.loads(daemon.shimpy("list", "m", "--json").stdout)
    assert (old.exists(), young.exists()) == (False, True)
    assert [model["name"] for model in models] == ["m:latest"]
    assert "manifest can't be read" in models[0]["error"]


def test_a_second_daemon_names_the_first_and_leaves(daemon: Daemon) -> None:
    """Two that write to one store would lose each other's models."""
    done = daemon.shimpy("serve", "--bind", "127.0.0.1:0")
    assert done.returncode == 1
    assert str(daemon.process.pid) in done.stderr
    assert str(Path(daemon.env["SHIMPY_HOME"]) / "data" / "store") in done.stderr
