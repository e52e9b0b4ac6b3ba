"""The reproduction's own machinery, on a model of two tiny layers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shimpy.bench.report import measurement_to_json
from shimpy.units import GIB
from tests.bench.support import measurement
from tests.benchmarks import reproduce
from tests.benchmarks.published import PUBLISHED
from tests.benchmarks.tables import report_lines
from tests.docs import DOCS
from tests.placement.machines import machine
from tests.shapes import MODELS, n_bytes, quantized
from tests.synthetic.test_filled import small_moe

QUICK = ("--repeat", "2", "--prompt", "16", "--predict", "4", "--threads", "1")


@pytest.mark.slow
def test_a_step_is_measured_once_written_whole_and_left_clean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reproduce, "SUITE", {"small-Q2_K": ("small", "Q2_K")})
    monkeypatch.setitem(reproduce.MODELS, "small", small_moe)
    models, out = tmp_path / "models", tmp_path / "out"
    models.mkdir()
    arguments = ["--out", str(out), "--folder", str(models), *QUICK]
    reproduce.main(arguments)
    assert list(models.iterdir()) == []
    case = json.loads((out / "reproduction.json").read_text())["small-Q2_K"]
    assert len(case["sha256"]) == 64
    assert len(case["runs"]["cpu"]["decode_per_s"]["samples"]) == 2
    text = (out / "reproduction.md").read_text()
    assert "`synthetic-small-Q2_K.gguf`" in text
    assert case["sha256"] in text
    assert (out / "images" / "reproduction.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    reproduce.main(arguments)
    assert "small-Q2_K: all is there" in capsys.readouterr().out


def test_runs_of_a_card_are_those_that_are_compared() -> None:
    arguments = reproduce.parse(["--out", "x"])
    many = reproduce.Run(name="", options=reproduce.PlanOptions(), streams=(1, 4, 16)).effort(
        arguments
    )
    runs = {run.name: run for run in reproduce.runs_on(machine(80), 28, many)}
    assert [runs[name].options.n_ctx for name in runs] == [4096, 4096, 4096, 9216, 9216]
    assert runs["llama.cpp"].options.load_mode == "mmap"
    assert runs["experts-in-ram-16"].options.n_slots == 16
    assert reproduce.runs_on(machine(), 28, many)[0].name == "cpu"


def test_steps_are_merged_and_what_is_here_already_stays(tmp_path: Path) -> None:
    def case(**runs: str) -> dict[str, object]:
        return {"a": {"file": "f", "runs": runs}}

    first, second = tmp_path / "1.json", tmp_path / "2.json"
    first.write_text(json.dumps(case(gpu="old")))
    second.write_text(json.dumps(case(gpu="new", cpu="c") | {"b": {"file": "g", "runs": {}}}))
    results = reproduce.Results(tmp_path)
    results.merge(first)
    results.merge(second)
    assert results.data["a"]["runs"] == {"gpu": "old", "cpu": "c"}
    assert set(results.data) == {"a", "b"}


def test_the_report_keeps_the_order_of_the_suite(tmp_path: Path) -> None:
    """Not that in which steps were measured and merged."""
    names = ["gpt-oss-20b-MXFP4", "phi-3.5-moe-Q2_K-2-layers", "deepseek-moe-16b-F16"]
    case = {"file": "f", "file_bytes": 1, "sha256": "0", "machine": "m", "ram_bytes": 1,
            "at": "2026-11-22", "runs": {}}  # fmt: skip
    results = reproduce.Results(tmp_path, dict.fromkeys(names, case))
    results.save()
    assert list(json.loads(results.path.read_text())) == names[::-1]
    titles = [
        line for line in (tmp_path / "reproduction.md").read_text().splitlines() if "## " in line
    ]
    assert titles == [f"## {name}" for name in names[::-1]]


@pytest.mark.slow
def test_the_page_in_the_docs_is_what_its_json_gives(tmp_path: Path) -> None:
    """`python -m tests.benchmarks.reproduce --out docs --report` writes it anew."""
    reproduce.main(["--out", str(tmp_path), "--report", "--merge", str(DOCS / "reproduction.json")])
    for name in ("reproduction.json", "reproduction.md"):
        assert (tmp_path / name).read_text() == (DOCS / name).read_text()
    drawn, kept = ((folder / "images" / "reproduction.png") for folder in (tmp_path, DOCS))
    assert drawn.stat().st_size > 10_000
    assert 10_000 < kept.stat().st_size < 150_000


def test_the_tables_set_measured_beside_published() -> None:
    name = "deepseek-moe-16b-F16"
    run = measurement_to_json(measurement(28, 25.0, card_mib=3571))
    case = {
        "file": "synthetic.gguf",
        "file_bytes": 1 << 30,
        "sha256": "0" * 64,
        "machine": "a machine",
        "ram_bytes": 1 << 37,
        "at": "2026-11-22",
        "command": "c",
        "runs": {"experts-in-ram": run, "gpu": {"error": "CUDA0 lacks 1.0 GiB"}},
    }
    lines = list(report_lines({name: case}))
    (speed,) = (line for line in lines if "25.0 ± 1.0" in line)
    assert speed.endswith("| 6.5 |")
    assert any("2048 + 1024 + 64 = 3136 | 2355 (weights) | 3571" in line for line in lines)
    assert any("CUDA0 lacks 1.0 GiB" in line for line in lines)


def test_every_model_of_the_suite_has_published_figures_and_a_shape() -> None:
    for name, (shape, _) in reproduce.SUITE.items():
        assert shape in reproduce.MODELS
        assert (name, "gpu") in PUBLISHED
        assert (name, "experts-in-ram") in PUBLISHED


def test_the_published_gpt_oss_has_its_dense_weights_as_f16() -> None:
    """So it is larger than the file that is measured."""
    sizes = {
        name: n_bytes(type_name, shape)
        for name, shape, type_name in quantized(MODELS["gpt-oss-20b"](), "F16")
        if name != "token_embd.weight"
    }
    dense = sum(size for name, size in sizes.items() if "_exps" not in name)
    for side, size in (("gpu", sum(sizes.values())), ("experts-in-ram", dense)):
        published = PUBLISHED["gpt-oss-20b-MXFP4", side].weights
        assert published is not None
        assert published / 1024 == round(size / GIB, 1)


def test_a_model_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        reproduce.parse(["--out", "x", "--only", "gpt-5"])
    assert "there is no model gpt-5" in capsys.readouterr().err
    assert list(reproduce.names_of(["phi"])) == [
        "phi-3.5-moe-Q2_K", "phi-3.5-moe-Q4_K_M", "phi-3.5-moe-Q8_0", "phi-3.5-moe-F16",
    ]  # fmt: skip
