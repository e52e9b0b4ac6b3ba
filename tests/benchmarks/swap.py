"""How long a hot swap takes beside bare llama.cpp: `python -m tests.benchmarks.swap`.

Two models of which only one fits are asked by turns, so that each request evicts the other. The
time from the request to the first token is divided by that of a fresh process which loads the same
file with llama.cpp's own functions, and computes a prompt as long, right before or after it: with
the same context, batch and threads, without the start of Python and the import. The files are in
the page cache. Prints the rounds, the median of the ratios and what the daemon's time went into;
exit status 1 when the median is over --limit.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.daemon import Daemon, running_daemon
from tests.synthetic import write_preset

_TIMEOUT_S = 300.0
_NS_PER_S = 1e9
# What is left for models, in sizes of a file: enough for one of them with its KV cache, not two.
_ROOM = 1.6


@dataclass(frozen=True, kw_only=True)
class Bare:
    """What the bare process is to do, as the daemon did it."""

    path: str
    n_ctx: int
    n_slots: int
    n_ubatch: int
    n_threads: int
    flash_attn: bool
    n_prompt: int


@dataclass(frozen=True, kw_only=True)
class Swap:
    """One request that evicted another model, in seconds."""

    first_token_s: float
    load_s: float
    prefill_s: float
    n_prompt: int


def swap(client: httpx.Client, model: str, prompt: str) -> Swap:
    """Ask a model that is not loaded for one token."""
    body = {"model": model, "prompt": prompt, "raw": True, "options": {"num_predict": 1}}
    started_s = time.perf_counter()
    first_s = 0.0
    last: dict[str, Any] = {}
    with client.stream("POST", "/api/generate", json=body) as answer:
        for line in answer.iter_lines():
            first_s = first_s or time.perf_counter() - started_s
            last = json.loads(line)
            assert "error" not in last, last
    return Swap(
        first_token_s=first_s,
        load_s=last["load_duration"] / _NS_PER_S,
        prefill_s=last["prompt_eval_duration"] / _NS_PER_S,
        n_prompt=last["prompt_eval_count"],
    )


def run_bare(task: Bare) -> dict[str, float]:
    """Load and compute with llama.cpp's own functions; return the seconds that each took."""
    import numpy as np
    from llama_cpp import llama_cpp as ll

    # Kept: the library calls it for ever.
    quiet = ll.llama_log_callback(lambda *_: None)
    ll.llama_log_set(quiet, None)
    ll.llama_backend_init()
    started_s = time.perf_counter()
    model_params = ll.llama_model_default_params()
    model_params.n_gpu_layers = 0
    # As the daemon: repacked weights would take longer to load.
    model_params.use_extra_bufts = False
    model = ll.llama_model_load_from_file(os.fsencode(task.path), model_params)
    assert model, f"llama.cpp can't load {task.path}"
    params = ll.llama_context_default_params()
    params.n_ctx, params.n_seq_max = task.n_ctx, task.n_slots
    params.n_batch, params.n_ubatch = max(2048, task.n_ubatch), task.n_ubatch
    params.n_threads = params.n_threads_batch = task.n_threads
    params.flash_attn_type = -1 if task.flash_attn else 0
    params.kv_unified = True
    context = ll.llama_init_from_model(model, params)
    assert context, "llama.cpp can't make the context"
    loaded_s = time.perf_counter()
    n_vocab = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(model))
    draw = random.Random(task.n_prompt)
    ids = [draw.randrange(n_vocab // 20, n_vocab - n_vocab // 20) for _ in range(task.n_prompt)]
    tokens = (ctypes.c_int32 * task.n_prompt)(*ids)
    assert ll.llama_decode(context, ll.llama_batch_get_one(tokens, task.n_prompt)) == 0
    logits = np.ctypeslib.as_array(ll.llama_get_logits_ith(context, -1), (n_vocab,))
    int(logits.argmax())
    ended_s = time.perf_counter()
    return {"load_s": loaded_s - started_s, "prefill_s": ended_s - loaded_s}


def bare(task: Bare, environ: dict[str, str]) -> dict[str, float]:
    """Return what `run_bare` does in a process of its own."""
    argv = [sys.executable, "-m", "tests.benchmarks.swap", "--bare", json.dumps(asdict(task))]
    done = subprocess.run(argv, check=True, capture_output=True, text=True, env=environ)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def task_of(client: httpx.Client, path: Path, n_prompt: int) -> Bare:
    """Return how the daemon has loaded its one model."""
    (resident,) = [
        model
        for model in client.get("/api/ps").json()["models"]
        if model["state"] == "ready" and model["name"].startswith(path.stem)
    ]
    placement = resident["placement"]
    return Bare(
        path=str(path),
        n_ctx=resident["context_length"],
        n_slots=placement["n_slots"],
        n_ubatch=placement["n_ubatch"],
        n_threads=resident["n_threads"],
        flash_attn=placement["flash_attn"],
        n_prompt=n_prompt,
    )


def rounds(daemon: Daemon, paths: list[Path], n_rounds: int, n_words: int) -> list[float]:
    """Swap and compare by turns; print each round and return the ratios."""
    ratios = []
    # As the workers have it.
    environ = {**os.environ, "GOMP_SPINCOUNT": "1000"}
    with httpx.Client(base_url=daemon.url, timeout=_TIMEOUT_S, trust_env=False) as client:
        tasks: dict[Path, Bare] = {}
        for number in range(-2, n_rounds):
            path = paths[number % 2]
            prompt = " ".join(f"{number + 100}" for _ in range(n_words))
            time.sleep(2.5)  # for the spare worker, as between people's requests
            # The order changes every other round, so that neither always comes second.
            is_second = number % 4 > 1
            theirs = bare(tasks[path], environ) if is_second and path in tasks else {}
            mine = swap(client, path.stem, prompt)
            tasks[path] = task_of(client, path, mine.n_prompt)
            if number < 0:
                continue
            theirs = theirs or bare(tasks[path], environ)
            theirs_s = theirs["load_s"] + theirs["prefill_s"]
            ratios.append(mine.first_token_s / theirs_s)
            print(
                f"{path.stem}: {mine.first_token_s:.3f} s to the first token "
                f"(load {mine.load_s:.3f}, prefill of {mine.n_prompt} {mine.prefill_s:.3f}); "
                f"bare {theirs_s:.3f} s (load {theirs['load_s']:.3f}, "
                f"prefill {theirs['prefill_s']:.3f}); ratio {ratios[-1]:.3f}",
                flush=True,
            )
        evictions = [
            event
            for event in client.get("/api/ps").json()["recent"]
            if event["kind"] in {"evict", "shrunk"}
        ]
        assert len(evictions) >= min(n_rounds, 5), "both fit: there was no swap"
    return ratios


def free_bytes() -> int:
    """Return what the kernel says is available."""
    text = Path("/proc/meminfo").read_text(encoding="ascii")
    (line,) = (line for line in text.splitlines() if line.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024


def compare(folder: Path, arguments: argparse.Namespace) -> float:
    """Write the models and run the rounds; return the median ratio."""
    models = folder / "models"
    models.mkdir()
    paths = [models / "one.gguf", models / "two.gguf"]
    for path in paths:
        write_preset(path, arguments.model)
    for path in paths:
        # Into the page cache.
        with path.open("rb") as file:
            while file.read(64 * 1024 * 1024):
                pass
    room = int(paths[0].stat().st_size * _ROOM) + 512 * 1024 * 1024
    flags = ["--reserve-ram", str(max(0, free_bytes() - room)), "--keep-alive", "1h"]
    flags += ["--spare-worker", arguments.spare]
    with running_daemon(folder / "home", models, *flags, threads=None) as daemon:
        ratios = rounds(daemon, paths, arguments.rounds, arguments.words)
    return statistics.median(ratios)


def main() -> int:
    """Compare and judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="deepseek-8b", help="a preset of tests.synthetic")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--words", type=int, default=64, help="of the prompt")
    parser.add_argument("--limit", type=float, default=1.15)
    parser.add_argument("--spare", choices=["on", "off"], default="on")
    parser.add_argument("--folder", type=Path, help="where the files go; removed afterwards")
    parser.add_argument("--bare", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.bare:
        print(json.dumps(run_bare(Bare(**json.loads(arguments.bare)))))
        return 0
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        median = compare(Path(folder), arguments)
    print(f"median ratio {median:.3f}, at most {arguments.limit}")
    return int(median > arguments.limit)


if __name__ == "__main__":
    sys.exit(main())
