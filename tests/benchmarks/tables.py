"""The reproduction as Markdown and a figure, from its JSON."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from shimpy.units import GIB, MIB
from tests.benchmarks.figure import draw_figure, measured
from tests.benchmarks.published import PUBLISHED, Side

# Which published row a run is to be compared with.
_SIDES: dict[str, Side] = {
    "gpu": "gpu",
    "experts-in-ram": "experts-in-ram",
    "llama.cpp": "experts-in-ram",
}
_LABELS = {
    "gpu": "all on GPU",
    "experts-in-ram": "experts in RAM, page-locked, micro-batch 2048",
    "llama.cpp": "experts in RAM, mapped, micro-batch 512 (llama.cpp's --cpu-moe)",
    "gpu-16": "all on GPU",
    "experts-in-ram-16": "experts in RAM, page-locked, micro-batch 2048",
    "cpu": "on the CPU alone",
}

_HEAD = """\
# All on the GPU against experts in RAM

Written from reproduction.json by `python -m tests.benchmarks.reproduce --out docs --report`; the
same without `--report` measures what is missing in it.

All weights are synthetic: random, in the published models' shapes and types, the same at each
run. Speeds are means with standard deviations, one stream unless said; prefill and decode are the
engine's own times, TTFT is from the request to its first text, load from the start of a worker
until it answers. "Published" is what others have published of these models, measured otherwise
([performance.md](performance.md#the-published-figures-again)).""".splitlines()


def write_report(data: dict[str, Any], missing: Sequence[str], folder: Path) -> None:
    """Write reproduction.md, and where there is matplotlib images/reproduction.png."""
    text = "\n".join(report_lines(data, missing)) + "\n"
    (folder / "reproduction.md").write_text(text, encoding="utf-8")
    if data and importlib.util.find_spec("matplotlib") is not None:
        (folder / "images").mkdir(exist_ok=True)
        draw_figure(data, folder / "images" / "reproduction.png")


def report_lines(data: dict[str, Any], missing: Sequence[str] = ()) -> Iterator[str]:
    """Yield the report's lines."""
    yield from _HEAD
    if missing:
        yield ""
        yield f"Not measured: {', '.join(missing)}."
    yield ""
    yield "![VRAM, prefill and decode of each model's placements](images/reproduction.png)"
    for name, case in data.items():
        yield ""
        yield f"## {name}"
        yield ""
        yield f"`{case['file']}`, {case['file_bytes'] / GIB:.2f} GiB, sha256 `{case['sha256']}`"
        yield ""
        yield f"{case['machine']}; {case['ram_bytes'] / GIB:.0f} GiB RAM; {case['at']}"
        yield ""
        yield from _speed_lines(name, case)
        yield ""
        yield from _memory_lines(name, case)
        many = [(key, run) for key, run in case["runs"].items() if len(run.get("streams", [])) > 1]
        if many:
            yield ""
            yield from _stream_lines(many)


def _speed_lines(name: str, case: dict[str, Any]) -> Iterator[str]:
    yield "| placement | n | load s | prefill tok/s | decode tok/s | TTFT ms | published tok/s |"
    yield "|---|---|---|---|---|---|---|"
    for key, run in measured(case).items():
        published = PUBLISHED.get((name, _SIDES.get(key, "gpu")))
        theirs = "" if published is None or published.per_s is None else f"{published.per_s}"
        first = run["streams"][0]["first_text_s"]
        yield (
            f"| {_LABELS[key]} | {len(run['decode_per_s']['samples'])} | {run['start_s']:.1f} "
            f"| {rate(run['prefill_per_s'])} | {rate(run['decode_per_s'])} "
            f"| {rate(first, 1000)} | {theirs} |"
        )
    for key, run in case["runs"].items():
        if "error" in run:
            yield f"| {_LABELS[key]} | | | {run['error']} | | | |"


def _memory_lines(name: str, case: dict[str, Any]) -> Iterator[str]:
    yield (
        "| placement | VRAM, MiB: weights + KV + compute | published | per process | whole card "
        "after load / work | published card | planned | RAM |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for key, run in measured(case).items():
        published = PUBLISHED.get((name, _SIDES.get(key, "gpu")))
        theirs = published.memory_text() if published else ""
        card = f"{published.card:.0f}" if published and published.card else ""
        devices = run["placement"]["devices"]
        held = [use for use in run["buffers"] if use["device"] in devices]
        parts = [
            sum(use[part] for use in held)
            for part in ("model_bytes", "context_bytes", "compute_bytes")
        ]
        ours = " + ".join(_mib(part) for part in parts)
        loaded, worked = run["after_load"], run["after_work"]
        yield (
            f"| {_LABELS[key]} | {ours} = {_mib(sum(parts))} | {theirs} "
            f"| {_mib(worked['process_bytes'])} "
            f"| {_mib(loaded['card_bytes'])} / {_mib(worked['card_bytes'])} | {card} "
            f"| {_mib(run['planned_vram_bytes'])} | {_mib(worked['rss_bytes'])} |"
        )


def _stream_lines(runs: list[tuple[str, dict[str, Any]]]) -> Iterator[str]:
    yield "| placement | streams | tok/s of all, prefill included | TTFT ms |"
    yield "|---|---|---|---|"
    for key, run in runs:
        for figures in run["streams"]:
            yield (
                f"| {_LABELS[key]} | {figures['n_streams']} | {rate(figures['per_s'])} "
                f"| {rate(figures['first_text_s'], 1000)} |"
            )


def rate(summary: dict[str, Any], factor: float = 1.0) -> str:
    """Return "61.2 ± 0.4", mean and deviation."""
    mean, deviation = summary["mean"] * factor, summary["deviation"] * factor
    digits = 0 if mean >= 100 else 1 if mean >= 10 else 2
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}"


def _mib(n_bytes: int | None) -> str:
    return "-" if n_bytes is None else f"{n_bytes / MIB:.0f}"
