"""Medians over the rounds, as a table, as JSON and as pictures.

Ratios are taken within a round and their median is shown: what slows the machine for a while
slows both.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

# By round, then by contender.
Rounds = Sequence[Mapping[str, Mapping[str, float]]]

US = "shimpy"


def numbers_of(rounds: Rounds, contender: str, metric: str) -> list[float]:
    """Return a contender's number of each round that has one."""
    return [
        one[contender][metric] for one in rounds if contender in one and metric in one[contender]
    ]


def ratios_to(rounds: Rounds, contender: str, metric: str, *, of: str = US) -> list[float]:
    """Return shimpy's number, or `of`'s, by another's, of each round that has both."""
    return [
        one[of][metric] / one[contender][metric]
        for one in rounds
        if metric in one.get(of, {}) and one.get(contender, {}).get(metric)
    ]


def differences_to(rounds: Rounds, contender: str, metric: str) -> list[float]:
    """Return what shimpy's number is over another's, of each round that has both."""
    return [
        one[US][metric] - one[contender][metric]
        for one in rounds
        if metric in one.get(US, {}) and metric in one.get(contender, {})
    ]


def median_of(rounds: Rounds, contender: str, metric: str) -> float | None:
    """Return a contender's median; None: it has no such number."""
    return _median(numbers_of(rounds, contender, metric))


def ratio_to(rounds: Rounds, contender: str, metric: str, *, of: str = US) -> float | None:
    """Return the median of `ratios_to`; None: there are none."""
    return _median(ratios_to(rounds, contender, metric, of=of))


def _median(found: Sequence[float]) -> float | None:
    return statistics.median(found) if found else None


def rows_of(name: str, headline: Sequence[str], rounds: Rounds) -> list[str]:
    """Return the table's rows of one scenario: a metric, each contender, the ratios."""
    contenders = list(dict.fromkeys(who for one in rounds for who in one))
    rows = []
    for metric in headline:
        cells = []
        for who in ("bare", US, "xllamacpp", "llama_cpp.server"):
            value = median_of(rounds, who, metric) if who in contenders else None
            cell = "" if value is None else _number(value)
            ratio = None if who == US else ratio_to(rounds, who, metric)
            cells.append(cell if ratio is None else f"{cell} ({ratio:.2f})")
        if any(cells):
            rows.append(f"| {name} | {metric} | {' | '.join(cells)} | {len(rounds)} |")
    return rows


def table(results: Mapping[str, Any]) -> str:
    """Return all results as Markdown; in brackets shimpy's number by that contender's."""
    lines = [
        "| work | number | bare loop | shimpy | xllamacpp | llama_cpp.server | rounds |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        lines += rows_of(name, result["headline"], result["rounds"])
    return "\n".join(lines)


def machine_of(peers_python: str) -> dict[str, str]:
    """Return what the numbers are worth nothing without."""
    code = (
        "from importlib.metadata import version, PackageNotFoundError\n"
        "for n in ('llama-cpp-python', 'xllamacpp'):\n"
        "    try: print(n, version(n))\n"
        "    except PackageNotFoundError: pass\n"
    )
    peers = subprocess.run([peers_python, "-c", code], capture_output=True, text=True, check=True)
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": _cpu(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "shimpy": version("shimpy"),
        "llama-cpp-python": version("llama-cpp-python"),
        "peers": ", ".join(peers.stdout.split("\n")[:-1]),
    }


def save(file: Path, machine: Mapping[str, str], results: Mapping[str, Any]) -> None:
    """Write everything that was measured."""
    content = {"machine": dict(machine), "results": dict(results)}
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def plot(folder: Path, results: Mapping[str, Any]) -> list[Path]:
    """Draw each scenario's headline numbers as bars; needs matplotlib."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, result in results.items():
        rounds, headline = result["rounds"], result["headline"]
        contenders = list(dict.fromkeys(who for one in rounds for who in one))
        figure, axes = plt.subplots(1, len(headline), figsize=(3.2 * len(headline), 3))
        for axis, metric in zip([axes] if len(headline) == 1 else axes, headline, strict=True):
            known = [who for who in contenders if median_of(rounds, who, metric) is not None]
            axis.bar(known, [median_of(rounds, who, metric) for who in known])
            axis.set_title(metric)
            axis.tick_params(axis="x", rotation=30)
        figure.suptitle(name)
        figure.tight_layout()
        slug = "".join(c if c.isalnum() else "-" for c in name)
        file = folder / f"{slug}.svg"
        figure.savefig(file)
        plt.close(figure)
        files.append(file)
    return files


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()
