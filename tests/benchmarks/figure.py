"""The reproduction in one figure: memory, prefill and decode of each model's placements."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from shimpy.units import GIB, MIB
from tests.benchmarks.published import PUBLISHED, Side

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Label, colour (Okabe and Ito's, which all readers can tell apart), published row to set beside it.
_SERIES: dict[str, tuple[str, str, Side | None]] = {
    "gpu": ("all on GPU", "#0072B2", "gpu"),
    "experts-in-ram": ("experts in RAM: page-locked, micro-batch 2048", "#E69F00", None),
    "llama.cpp": (
        "experts in RAM: mapped, micro-batch 512, as llama.cpp's --cpu-moe",
        "#999999",
        "experts-in-ram",
    ),
    "cpu": ("on the CPU alone", "#CC79A7", None),
}
_LABELS = [label for label, _, _ in _SERIES.values()]
_REST = "pale: CUDA context and workspace, beside llama.cpp's own buffers"
_PUBLISHED = "published: weights + KV + compute buffer, from llama.cpp's log on a GH200"
_BAR = 0.26


def draw_figure(data: dict[str, Any], path: Path) -> None:
    """Write the PNG: three panels of bars, a group for each model, in data's order from the top."""
    from matplotlib.figure import Figure

    present = [key for key in _SERIES if any(key in measured(case) for case in data.values())]
    height = 2.2 + 0.27 * len(data) * max(2, len(present))
    figure = Figure(figsize=(9, height), layout="constrained")
    figure.suptitle(_title(data), fontsize=9)
    vram, prefill, decode = figure.subplots(1, 3, sharey=True)
    for i, key in enumerate(present):
        offset = (i - (len(present) - 1) / 2) * _BAR
        cases = [(row, measured(case).get(key)) for row, case in enumerate(data.values())]
        runs = {row + offset: run for row, run in cases if run}
        _draw_vram(vram, key, runs)
        _draw_published(vram, key, {row + offset: name for row, name in enumerate(data)})
        _draw_rates(prefill, key, runs, "prefill_per_s")
        _draw_rates(decode, key, runs, "decode_per_s")
    for axes, title in (
        (vram, "VRAM of the whole card, GiB"),
        (prefill, "prefill"),
        (decode, "decode"),
    ):
        axes.set_title(title if axes is vram else f"{title}, tok/s (log scale)", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    vram.set_yticks(range(len(data)), ["\n".join(name.rsplit("-", 1)) for name in data])
    vram.set_ylim(len(data) - 0.5, -0.5)
    # Room for the numbers at the bars' ends.
    vram.set_xlim(0, vram.get_xlim()[1] * 1.12)
    for axes in (prefill, decode):
        axes.set_xlim(axes.get_xlim()[0] / 1.3, axes.get_xlim()[1] * 2)
    handles, labels = vram.get_legend_handles_labels()
    by_label = dict(zip(labels, handles, strict=True))
    order = [label for label in (*_LABELS, _REST, _PUBLISHED) if label in by_label]
    figure.legend(
        [by_label[label] for label in order], order,
        loc="outside lower center", fontsize=8, frameon=False,
    )  # fmt: skip
    figure.savefig(path, format="png", dpi=120)


def measured(case: dict[str, Any]) -> dict[str, Any]:
    """Return the runs of one stream that could be measured."""
    runs = case["runs"].items()
    return {key: run for key, run in runs if "error" not in run and not key.endswith("-16")}


def _draw_vram(axes: Axes, key: str, runs: dict[float, dict[str, Any]]) -> None:
    label, colour, _ = _SERIES[key]
    buffers = [run["buffers_vram_bytes"] / GIB for run in runs.values()]
    card = [(run["after_work"]["card_bytes"] or 0) / GIB for run in runs.values()]
    rest = [max(0.0, whole - part) for whole, part in zip(card, buffers, strict=True)]
    axes.barh(list(runs), buffers, _BAR, color=colour, label=label)
    bars = axes.barh(list(runs), rest, _BAR, left=buffers, color=colour, alpha=0.45, label=_REST)
    axes.bar_label(bars, [_number(value) for value in card], padding=3, fontsize=7.5)


def _draw_published(axes: Axes, key: str, names: dict[float, str]) -> None:
    """Mark what llama.cpp's log says, where all three parts of it are published."""
    side = _SERIES[key][2]
    for place, name in names.items():
        known = PUBLISHED.get((name, side)) if side else None
        if known and known.buffers:
            axes.plot(known.buffers * MIB / GIB, place, "D", color="white", markersize=4,
                      markeredgecolor="black", label=_PUBLISHED)  # fmt: skip


def _draw_rates(axes: Axes, key: str, runs: dict[float, dict[str, Any]], part: str) -> None:
    means = [run[part]["mean"] for run in runs.values()]
    deviations = [run[part]["deviation"] for run in runs.values()]
    lines = {"elinewidth": 0.9, "capsize": 1.5}
    bars = axes.barh(
        list(runs), means, _BAR, xerr=deviations, color=_SERIES[key][1], error_kw=lines
    )
    axes.bar_label(bars, [_number(mean) for mean in means], padding=3, fontsize=7.5)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:,.0f}")


def _number(value: float) -> str:
    return f"{value:#.3g}" if value < 100 else f"{value:,.0f}"


def _title(data: dict[str, Any]) -> str:
    machines = sorted({case["machine"] for case in data.values()})
    days = sorted({case["at"][:10] for case in data.values()})
    weights = "Synthetic weights in the published models' shapes; one stream, context 4096"
    return "\n".join([weights, *machines[:-1], f"{machines[-1]}; {', '.join(days)}"])
