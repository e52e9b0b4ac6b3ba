"""How fast a model is on an NVIDIA card, beside llama-server: all on the GPU, and experts in RAM.

    python -m tests.benchmarks.card MODEL [--rounds N] [--peer llama-server]

Aggregate tok/s and mean time to the first token at 1, 4 and 16 streams of prompts of 512 tokens,
over HTTP. Both have the model loaded at once and are asked in turn, in as many rounds as wanted;
a ratio is the median of the rounds' own. Tables on stdout and, with --json FILE, JSON. The daemon
is a real one on a free port; everything is bounded in time. tests.benchmarks.memory measures what
placements take.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import shutil
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from shimpy.units import GIB
from tests.benchmarks.peers.client import stream
from tests.benchmarks.vram import used_vram
from tests.daemon import Daemon, running_daemon

N_PROMPT = 512
N_GENERATED = 64
STREAMS = (1, 4, 16)


def generate(daemon: Daemon, model: str, n_predict: int = 16) -> dict[str, Any]:
    """Have a short text generated, which loads the model."""
    body = {
        "model": model,
        "prompt": "Once upon a time",
        "raw": True,
        "stream": False,
        "options": {"num_predict": n_predict, "temperature": 0},
    }
    response = httpx.post(f"{daemon.url}/api/generate", json=body, timeout=300)
    answer: dict[str, Any] = response.json()
    return answer


def resident(daemon: Daemon) -> dict[str, Any]:
    """Return what /api/ps says of the only loaded model."""
    models = httpx.get(f"{daemon.url}/api/ps", timeout=30).json()["models"]
    assert len(models) == 1, models
    first: dict[str, Any] = models[0]
    return first


@contextlib.contextmanager
def home() -> Iterator[Path]:
    """A folder for one daemon's state."""
    with tempfile.TemporaryDirectory(prefix="shimpy-card-") as path:
        yield Path(path)


async def run_streams(url: str, bodies: list[dict[str, Any]]) -> tuple[float, float]:
    """Return (aggregate generated tok/s over the whole run, mean seconds to first text)."""
    found = await asyncio.gather(*(stream(url, body) for body in bodies))
    took_s = max(one.end_s for one in found)
    return len(bodies) * N_GENERATED / took_s, statistics.mean(one.first_s for one in found)


def random_prompts(n: int, seed: int, n_vocab: int = 100_000) -> list[list[int]]:
    """Return prompts of random token ids that share no beginning."""
    rng = random.Random(seed)
    return [[rng.randrange(1000, n_vocab) for _ in range(N_PROMPT)] for _ in range(n)]


@dataclass(frozen=True, slots=True)
class Measured:
    """One contender's figures at so many streams; a list has one for each round."""

    who: str
    placement: str
    n_streams: int
    tok_per_s: list[float]
    first_s: list[float]


def take_turns(urls: dict[str, str], model: str, rounds: int, placement: str) -> list[Measured]:
    """Have all of them work on the same prompts, in turn; return the figures of each."""
    make_body = completion_body(model)
    for url in urls.values():
        # Work of each size before it counts: kernels are loaded, and paces learnt.
        for n in STREAMS:
            asyncio.run(run_streams(url, [make_body(p) for p in random_prompts(n, n)]))
    rows = []
    for n in STREAMS:
        of_n = {who: Measured(who, placement, n, [], []) for who in urls}
        for number in range(rounds):
            # No prompt is asked for twice: a cached one would not be computed.
            bodies = [make_body(p) for p in random_prompts(n, 100 * (number + 1) + n)]
            for who in sorted(urls, reverse=bool(number % 2)):
                rate, first_s = asyncio.run(run_streams(urls[who], bodies))
                of_n[who].tok_per_s.append(rate)
                of_n[who].first_s.append(first_s)
        rows += of_n.values()
        _show(list(of_n.values()))
    return rows


def _show(rows: list[Measured]) -> None:
    """Print what was measured at one number of streams; the first row is the one compared."""
    first = rows[0]
    for row in rows:
        rate, first_ms = statistics.median(row.tok_per_s), statistics.median(row.first_s) * 1000
        by = ""
        if row is not first:
            by = (
                f"; {first.who} by it: {median_ratio(first.tok_per_s, row.tok_per_s):.2f} tok/s, "
                f"{median_ratio(first.first_s, row.first_s):.2f} first text"
            )
        print(
            f"{row.placement}, {row.n_streams:2} streams, {row.who:12} {rate:7.1f} tok/s, "
            f"first text {first_ms:7.0f} ms{by}",
            flush=True,
        )


def median_ratio(ones: list[float], others: list[float]) -> float:
    """Return the median of the rounds' own ratios."""
    return statistics.median(one / other for one, other in zip(ones, others, strict=True))


def completion_body(model: str) -> Any:
    """Return what makes a request of token ids for llama.cpp's /completion, which both serve."""

    def make(prompt: list[int]) -> dict[str, Any]:
        return {
            "model": model,
            "prompt": prompt,
            "n_predict": N_GENERATED,
            "temperature": 0,
            "stream": True,
            "ignore_eos": True,
        }

    return make


@contextlib.contextmanager
def peer(binary: str, path: Path, *flags: str) -> Iterator[str]:
    """Run llama-server on a free port and wait until it is healthy."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [binary, "-m", str(path), "--port", str(port), "-ngl", "99", "-c", "16384"]
    command += ["-np", "16", "-t", "16", "--no-webui", *flags]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/health", timeout=5).status_code == httpx.codes.OK:
                    break
            time.sleep(0.2)
        yield url
    finally:
        process.kill()
        process.wait(30)


def measure_speed(path: Path, model: str, binary: str | None, rounds: int) -> list[Measured]:
    """Return the speeds of shimpy and of llama-server, all on the GPU and experts in RAM."""
    rows = []
    for placement, moe, flags in (
        ("all on GPU", ("--cpu-moe", "off"), ()),
        ("experts in RAM", ("--cpu-moe", "on"), ("-cmoe",)),
    ):
        options = ("--n-ctx", "16384", "--n-slots", "16", *moe)
        with contextlib.ExitStack() as stack:
            state = stack.enter_context(home())
            daemon = stack.enter_context(running_daemon(state, path.parent, *options, threads=None))
            generate(daemon, model)
            urls = {"shimpy": f"{daemon.url}/completion"}
            if binary:
                url = stack.enter_context(peer(binary, path, *flags))
                urls["llama-server"] = f"{url}/completion"
            rows += take_turns(urls, model, rounds, placement)
    return rows


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.card", description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", default=shutil.which("llama-server"))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    from shimpy.names import name_from_stem

    path = arguments.model.absolute()
    model = str(name_from_stem(path.stem))
    results: dict[str, Any] = {"model": model, "used_gib": sum(used_vram()) / GIB}
    rows = measure_speed(path, model, arguments.peer, arguments.rounds)
    results["speed"] = [asdict(row) for row in rows]
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
