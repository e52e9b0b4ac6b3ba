"""What a placement really takes on an NVIDIA card, and how fast it is, beside llama-server.

    python -m tests.benchmarks.card MODEL [--rungs] [--squeeze] [--speed] [--peer llama-server]

--rungs    predicted VRAM beside nvidia-smi's for the experts of N layers in RAM
--squeeze  another process takes VRAM until little is left; the model has to load and answer
--speed    aggregate tok/s and mean time to first token at 1, 4 and 16 streams, over HTTP

Results are tables on stdout and, with --json FILE, JSON. The daemon is a real one on a free
port; everything is bounded in time.
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
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from shimpy.units import GIB, MIB
from tests.daemon import Daemon, running_daemon

N_PROMPT = 512
N_GENERATED = 64
STREAMS = (1, 4, 16)


def used_vram() -> int:
    """Return the bytes in use on the first card, as nvidia-smi shows them."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", "0"]
    return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout) * MIB


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


def measure_rungs(folder: Path, model: str, n_ctxs: list[int], rungs: list[int]) -> list[Any]:
    """Return (n_ctx, N, predicted bytes, nvidia-smi's bytes) for each rung."""
    rows = []
    for n_ctx in n_ctxs:
        for n_cpu_moe in rungs:
            flags = ("--n-ctx", str(n_ctx), "--n-cpu-moe", str(n_cpu_moe))
            before = used_vram()
            with home() as path, running_daemon(path, folder, *flags) as daemon:
                answer = generate(daemon, model)
                placement = resident(daemon)["placement"]
                taken = used_vram() - before
                predicted = sum(d["total_bytes"] for d in placement["devices"])
            ok = abs(taken - predicted) <= max(64 * MIB, 0.02 * taken)
            rows.append((n_ctx, n_cpu_moe, predicted, taken, placement["load_mode"], ok))
            print(
                f"n_ctx {n_ctx:6} N {n_cpu_moe:2} {placement['load_mode']:6} "
                f"ubatch {placement['n_ubatch']:4} predicted {predicted / MIB:8.0f} MiB, "
                f"nvidia-smi {taken / MIB:8.0f} MiB, {(predicted - taken) / MIB:+6.0f} "
                f"{'ok' if ok else 'OFF'} {answer.get('error', '')}"
            )
    return rows


def squeeze(folder: Path, model: str, left_gib: list[float]) -> list[Any]:
    """Leave so much VRAM and see the model load and answer; return how much it left unused."""
    rows = []
    for left in left_gib:
        with hog(left), home() as path, running_daemon(path, folder) as daemon:
            answer = generate(daemon, model)
            if "error" in answer:
                rows.append((left, None, None, answer["error"]))
                print(f"left {left:5.1f} GiB: {answer['error']}")
                continue
            placement = resident(daemon)["placement"]
            free = sum(d["free_bytes"] - d["total_bytes"] for d in placement["devices"])
            taken = used_vram()
            rows.append((left, placement["mode"], placement["n_cpu_moe"], free))
            print(
                f"left {left:5.1f} GiB: {placement['mode']} N {placement['n_cpu_moe']} "
                f"ngl {placement['n_gpu_layers']} n_ctx {placement['n_ctx']} "
                f"{placement['load_mode']}/{placement['n_ubatch']}, unused by the plan "
                f"{free / MIB:.0f} MiB, used on the card {taken / MIB:.0f} MiB, "
                f"{answer['eval_count']} tokens"
            )
    return rows


@contextlib.contextmanager
def hog(left_gib: float) -> Iterator[None]:
    """Hold VRAM in another process until only `left_gib` is free."""
    code = (
        "import torch,sys\n"
        "free,total=torch.cuda.mem_get_info()\n"
        f"n=int(free-{left_gib}*2**30)\n"
        "x=torch.empty(max(n,0),dtype=torch.uint8,device='cuda')\n"
        "free,total=torch.cuda.mem_get_info()\n"
        "print(free,flush=True)\nsys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    try:
        yield
    finally:
        process.kill()
        process.wait(30)


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
    parser.add_argument("--rungs", type=int, nargs="*")
    parser.add_argument("--n-ctx", type=int, nargs="*", default=[4096])
    parser.add_argument("--squeeze", type=float, nargs="*", metavar="GIB")
    parser.add_argument("--speed", type=int, metavar="ROUNDS")
    parser.add_argument("--peer", default=shutil.which("llama-server"))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    from shimpy.names import name_from_stem

    path = arguments.model.absolute()
    model = str(name_from_stem(path.stem))
    results: dict[str, Any] = {"model": model, "free_gib": used_vram() / GIB}
    if arguments.rungs:
        results["rungs"] = measure_rungs(path.parent, model, arguments.n_ctx, arguments.rungs)
    if arguments.squeeze:
        results["squeeze"] = squeeze(path.parent, model, arguments.squeeze)
    if arguments.speed:
        results["speed"] = measure_speed(path.parent, model, path, arguments.peer, arguments.speed)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
