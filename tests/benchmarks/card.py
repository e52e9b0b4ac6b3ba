"""How fast a model is on an NVIDIA card, beside llama-server: all on the GPU, and experts in RAM.

    python -m tests.benchmarks.card MODEL [--rounds N] [--peer llama-server]

Aggregate tok/s and mean time to the first token at 1, 4 and 16 streams, over HTTP; tables on
stdout and, with --json FILE, JSON. The daemon is a real one on a free port; everything is bounded
in time. tests.benchmarks.memory measures what placements take.
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
from pathlib import Path
from typing import Any

import httpx

from shimpy.units import GIB
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


async def one_stream(client: httpx.AsyncClient, url: str, body: dict[str, Any]) -> float:
    """Return the seconds to the first text of one request that is answered to its end."""
    started = time.perf_counter()
    first = None
    async with client.stream("POST", url, json=body) as response:
        async for line in response.aiter_lines():
            if not line:
                continue
            # A refusal is quick: it must not count as an answer.
            assert not line.startswith('{"error"'), line
            if first is None:
                first = time.perf_counter() - started
    assert first is not None
    return first


async def run_streams(url: str, bodies: list[dict[str, Any]]) -> tuple[float, float]:
    """Return (aggregate generated tok/s over the whole run, mean seconds to first text)."""
    # A new connection for each request: llama-server closes idle ones.
    limits = httpx.Limits(max_keepalive_connections=0)
    async with httpx.AsyncClient(timeout=300, limits=limits) as client:
        started = time.perf_counter()
        firsts = await asyncio.gather(*(one_stream(client, url, body) for body in bodies))
        took = time.perf_counter() - started
    return len(bodies) * N_GENERATED / took, statistics.mean(firsts)


def random_prompts(n: int, seed: int, n_vocab: int = 100_000) -> list[list[int]]:
    """Return prompts of random token ids that share no beginning."""
    rng = random.Random(seed)
    return [[rng.randrange(1000, n_vocab) for _ in range(N_PROMPT)] for _ in range(n)]


def speed_of(url: str, model: str, rounds: int, label: str) -> list[Any]:
    """Print and return the medians over the rounds for each number of streams."""
    rows = []
    url, make_body = f"{url}/completion", completion_body(model)
    asyncio.run(run_streams(url, [make_body(p) for p in random_prompts(2, 0)]))
    for n in STREAMS:
        results = [
            asyncio.run(
                run_streams(url, [make_body(p) for p in random_prompts(n, 100 * (r + 1) + n)])
            )
            for r in range(rounds)
        ]
        rate = statistics.median(r for r, _ in results)
        first = statistics.median(f for _, f in results)
        rows.append((label, n, rate, first))
        print(f"{label:40} {n:2} streams: {rate:7.1f} tok/s, first text {first * 1000:7.0f} ms")
    return rows


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
            "cache_prompt": False,
        }

    return make


@contextlib.contextmanager
def peer(binary: str, path: Path, *flags: str) -> Iterator[str]:
    """Run llama-server on a free port and wait until it is healthy."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [binary, "-m", str(path), "--port", str(port), "-ngl", "99", "-c", "16384"]
    command += ["-np", "16", "-fa", "on", "-t", "16", "--no-webui", "--cache-ram", "0"]
    command += ["--fit", "off", *flags]
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


def measure_speed(folder: Path, model: str, path: Path, binary: str | None, rounds: int) -> Any:
    """Return the speeds of shimpy and of llama-server, all on the GPU and experts in RAM."""
    rows = []
    for label, moe, flags in (
        ("all on GPU", ("--cpu-moe", "off"), ()),
        ("experts in RAM", ("--cpu-moe", "on"), ("-cmoe",)),
    ):
        options = ("--n-ctx", "16384", "--n-slots", "16", *moe)
        with home() as state, running_daemon(state, folder, *options, threads=None) as daemon:
            generate(daemon, model)
            rows += speed_of(daemon.url, model, rounds, f"shimpy, {label}")
        if binary:
            with peer(binary, path, *flags) as url:
                rows += speed_of(url, model, rounds, f"llama-server, {label}")
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
    results: dict[str, Any] = {"model": model, "free_gib": used_vram() / GIB}
    results["speed"] = measure_speed(path.parent, model, path, arguments.peer, arguments.rounds)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
