"""What a report says, as tables, as JSON and as a picture."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from msgspec.structs import replace

from shimpy.bench import plot
from shimpy.bench.report import (
    memory_headers,
    memory_rows,
    placement_headers,
    placement_rows,
    report_to_json,
)
from shimpy.bench.summary import Summary
from shimpy.errors import UnsupportedError
from shimpy.units import GIB, MIB
from tests.bench.support import measurement, report


def test_the_soonest_answer_is_the_best() -> None:
    slow, fast = measurement(0, 50), measurement(8, 60)
    assert report(slow, fast).best is fast
    assert report().best is None


def test_rows_have_a_cell_for_each_header() -> None:
    found = report(measurement(0, 60), measurement(8, 50))
    headers = placement_headers(found)
    assert headers[-3:] == ("TTFT@1 ms", "TTFT@4 ms", "ALL@4 tok/s")
    rows = placement_rows(found)
    assert [len(row) for row in rows] == [len(headers)] * 2
    assert rows[0] == (
        "*", "N = 0", "1.2", "1100 ± 100", "60.0 ± 1.0", "50.0 ± 0.0", "200 ± 0", "90.0 ± 0.0",
    )  # fmt: skip
    assert rows[1][0] == ""


def test_memory_is_told_as_planned_and_by_three_readings() -> None:
    found = report(measurement(8, 50))
    (row,) = memory_rows(found)
    assert len(row) == len(memory_headers(found)) == 8
    assert row[3:] == ("3.1 GiB", "4.9 GiB", "4.9 GiB", "4.9 GiB", "2.0 GiB")
    found = report(measurement(0, 50, vram=0))
    assert memory_headers(found) == ("", "PLACEMENT", "RAM")
    assert memory_rows(found) == [("*", "N = 0", "2.0 GiB")]


def test_the_noise_of_a_speed_is_the_larger_deviation() -> None:
    found = measurement(0, 50)
    assert found.speed.noise == 100 / 1100
    assert replace(found, decode_per_s=Summary((50.0, 51.0))).speed.noise == 0.25


def test_json_has_every_sample() -> None:
    data = json.loads(json.dumps(report_to_json(report(measurement(0, 60), measurement(8, 50)))))
    first, second = data["measurements"]
    assert (first["is_best"], second["is_best"]) == (True, False)
    assert first["decode_per_s"] == {
        "median": 60.0, "mean": 60.0, "deviation": 1.0, "samples": [59.0, 60.0, 61.0],
    }  # fmt: skip
    assert second["placement"]["n_cpu_moe"] == 8
    assert second["buffers_vram_bytes"] == 3 * GIB + 64 * MIB
    assert second["after_work"]["rss_bytes"] == 2 * GIB
    assert data["left_out"] == ["N = 0: CUDA0 lacks 1.0 GiB"]
    assert data["model"]["name"] == "some:tag"


@pytest.mark.slow
def test_a_plot_is_a_png(tmp_path: Path) -> None:
    """Of a card; that of a CPU is drawn in tests/cli."""
    path = tmp_path / "plot.png"
    plot.plot_report(report(measurement(0, 60), measurement(8, 50)), path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"pip install 'shimpy\[bench\]'"):
        plot.plot_report(report(measurement(0, 60)), tmp_path / "plot.png")
    assert importlib.util.find_spec("matplotlib") is not None
