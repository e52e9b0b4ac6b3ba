"""Two busy models on one machine's cores: `python -m tests.benchmarks.threads`.

A worker gets all cores while it works alone and its share while others do, from one step to the
next. That is compared with halves that are fixed: tokens per second of two models that answer at
once, and of one that answers alone, by turns with a daemon whose `n_threads` is half of the cores.
Prints the medians of the ratios; exit status 1 when two are slower than with fixed halves, by more
than --slack.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import httpx

from tests.daemon import Daemon, running_daemon
from tests.synthetic import write_preset

_MODELS = ("one", "two")


async def rate(daemon: Daemon, models: tuple[str, ...], n_tokens: int) -> float:
    """Let each model say so much at once; return their tokens per second together."""

    async def say(client: httpx.AsyncClient, model: str) -> int:
        body = {
            "model": model,
            "prompt": "hi",
            "raw": True,
            "stream": False,
            "options": {"num_predict": n_tokens, "ignore_eos": True, "temperature": 0},
        }
        answer = (await client.post("/api/generate", json=body)).json()
        return int(answer["eval_count"])

    async with httpx.AsyncClient(base_url=daemon.url, timeout=300, trust_env=False) as client:
        started_s = time.perf_counter()
        counts = await asyncio.gather(*(say(client, model) for model in models))
        return sum(counts) / (time.perf_counter() - started_s)


def compare(folder: Path, preset: str, n_rounds: int, n_tokens: int) -> dict[str, float]:
    """Return the medians of the shared cores' rates over those of the fixed halves."""
    models = folder / "models"
    models.mkdir()
    for name in _MODELS:
        write_preset(models / f"{name}.gguf", preset)
    half = max(1, (os.cpu_count() or 1) // 2)
    ratios: dict[str, list[float]] = {"two at once": [], "one alone": []}
    with (
        running_daemon(folder / "shared", models, threads=None) as shared,
        running_daemon(folder / "halves", models, threads=half) as halves,
    ):
        for number in range(-1, n_rounds):
            order = (shared, halves) if number % 2 else (halves, shared)
            for kind, asked in (("two at once", _MODELS), ("one alone", _MODELS[:1])):
                rates = {id(one): asyncio.run(rate(one, asked, n_tokens)) for one in order}
                ratio = rates[id(shared)] / rates[id(halves)]
                if number < 0:
                    continue
                ratios[kind].append(ratio)
                shown = f"{rates[id(shared)]:.1f} tok/s, fixed halves {rates[id(halves)]:.1f}"
                print(f"{kind}: {shown}, ratio {ratio:.3f}", flush=True)
    return {kind: statistics.median(found) for kind, found in ratios.items()}


def main() -> int:
    """Compare and judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="dense-200m", help="a preset of tests.synthetic")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--slack", type=float, default=0.05)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        medians = compare(Path(folder), arguments.model, arguments.rounds, arguments.tokens)
    for kind, median in medians.items():
        print(f"{kind}: median ratio {median:.3f}")
    return int(medians["two at once"] < 1 - arguments.slack)


if __name__ == "__main__":
    sys.exit(main())
