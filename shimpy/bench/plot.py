"""Draws speed against memory, one dot for each placement."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from shimpy.bench.report import Report
from shimpy.bench.summary import Summary
from shimpy.errors import UnsupportedError
from shimpy.units import GIB

# A line of the list of placements.
_LABEL_INCHES = 0.16
_INSTALL = "pip install 'shimpy[bench]'"


def check_can_plot() -> None:
    """Raise UnsupportedError where matplotlib is missing: before minutes are spent measuring."""
    if find_spec("matplotlib") is None:
        raise UnsupportedError(f"--plot needs matplotlib, which is not installed: {_INSTALL}")


def plot_report(report: Report, path: Path) -> None:
    """Write a PNG: prefill and decode by VRAM; on the CPU alone, by placement.

    Raises:
        UnsupportedError: matplotlib is missing.
        OSError: the file can't be written.
    """
    check_can_plot()
    from matplotlib.figure import Figure

    height = 4 + _LABEL_INCHES * len(report.measurements)
    figure = Figure(figsize=(10, height), layout="constrained")
    figure.suptitle(str(report.model.name))
    left, right = figure.subplots(1, 2)
    prefill = [m.prefill_per_s for m in report.measurements]
    decode = [m.decode_per_s for m in report.measurements]
    for axes, title, rates in ((left, "prefill", prefill), (right, "decode", decode)):
        axes.set_title(f"{title}, one stream")
        axes.set_ylabel("tok/s")
        if any(m.vram_bytes for m in report.measurements):
            _dots(axes, report, rates)
        else:
            _bars(axes, report, rates)
    # Both have the same dots; their names are longer than a plot is wide.
    handles, labels = left.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", fontsize="x-small")
    figure.savefig(path, format="png", dpi=150)


def _dots(axes: object, report: Report, rates: Sequence[Summary]) -> None:
    from matplotlib.axes import Axes

    assert isinstance(axes, Axes)
    for measurement, rate in zip(report.measurements, rates, strict=True):
        card_bytes = measurement.worked.card_bytes or measurement.vram_bytes
        marker, size = ("*", 12) if measurement is report.best else ("o", 6)
        axes.errorbar(
            card_bytes / GIB,
            rate.median,
            yerr=rate.deviation,
            fmt=marker,
            markersize=size,
            label=measurement.candidate.label,
        )
    axes.set_xlabel("VRAM, GiB (whole card, after work)")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)


def _bars(axes: object, report: Report, rates: Sequence[Summary]) -> None:
    from matplotlib.axes import Axes

    assert isinstance(axes, Axes)
    labels = [measurement.candidate.label for measurement in report.measurements]
    medians, deviations = [r.median for r in rates], [r.deviation for r in rates]
    axes.bar(range(len(labels)), medians, yerr=deviations)
    axes.set_xticks(range(len(labels)), labels, rotation=20, ha="right", fontsize="x-small")
