"""What placements take on NVIDIA cards, predicted and real; and with little VRAM left.

    python -m tests.benchmarks.memory MODEL [--n-ctx N ...] [--rungs N ...] [--squeeze GIB ...]

--rungs    experts of the first N layers in RAM: the prediction beside nvidia-smi's figure after
           one answer
--squeeze  another process takes VRAM until so much is left on each card: the model has to load and
           to answer, and may leave less than a layer's experts and 300 MiB of it unused
--heavy    then 16 prompts of 512 tokens at once, and what they add to it

One daemon serves them all: figures that were simulated and overheads that were learnt are there
for the next. Rows go to stdout and, with --json FILE, to a file that is whole after each row; of
several cards "off" is the worst of them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from shimpy.gguf.arch import describe_model
from shimpy.gguf.reader import read_header
from shimpy.names import name_from_stem
from shimpy.units import GIB, MIB
from tests.benchmarks.card import (
    completion_body,
    generate,
    home,
    random_prompts,
    resident,
    run_streams,
)
from tests.benchmarks.vram import Hog, used_by, used_vram, wait_until_free
from tests.daemon import Daemon, running_daemon

N_STREAMS = 16
ALLOWED_BYTES = 64 * MIB
ALLOWED_SHARE = 0.02
ALLOWED_UNUSED_BYTES = 300 * MIB


class Rows:
    """The results, in a file after each of them."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.rows: list[dict[str, Any]] = []

    def add(self, row: dict[str, Any]) -> None:
        """Print a row and keep it."""
        print(" ".join(f"{key} {_shown(value)}" for key, value in row.items()), flush=True)
        self.rows.append(row)
        if self._path is not None:
            self._path.write_text(json.dumps(self.rows, indent=1), encoding="utf-8")


def _shown(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


@dataclass(kw_only=True)
class Sweep:
    """One daemon, one model, and what to do with it."""

    daemon: Daemon
    state: Path
    model: str
    # The bytes of the largest layer's experts.
    layer_bytes: int
    is_heavy: bool
    # The bytes in use on each card while it is not loaded.
    before: list[int] = field(default_factory=used_vram)
    # How long the cards showed the last worker after it had gone.
    linger_s: float = 0.0

    def rung(self, n_ctx: int, n_cpu_moe: int) -> dict[str, Any]:
        """Load the model with the experts of so many layers in RAM; return the figures in MiB."""
        self._set({"cpu_moe": n_cpu_moe, "num_ctx": n_ctx})
        return {"n_ctx": n_ctx, "N": n_cpu_moe} | self._serve()

    def squeeze(self, hog: Hog, left_gib: float) -> dict[str, Any]:
        """Have the model loaded where only so much VRAM is free; return the figures in MiB."""
        self._set({}, unset=["cpu_moe", "num_ctx"])
        hog.leave(left_gib)
        self.before = used_vram()
        row = {"left_gib": left_gib} | self._serve()
        if row.get("mode") in {"experts-in-ram", "partial-gpu"}:
            allowed = len(self.before) * (self.layer_bytes + ALLOWED_UNUSED_BYTES)
            row["well_used"] = row["unused"] * MIB < allowed
        return row

    def _set(self, settings: dict[str, Any], unset: Sequence[str] = ()) -> None:
        body = {"model": self.model, "set": settings, "unset": list(unset)}
        httpx.post(f"{self.daemon.url}/api/settings", json=body, timeout=30).raise_for_status()
        self.daemon.shimpy("stop", self.model)
        self.linger_s = wait_until_free(self.before)

    def _serve(self) -> dict[str, Any]:
        row = _serve(self.daemon, self.model, self.before, is_heavy=self.is_heavy)
        return row | {"simulated_s": _simulated_s(self.state), "linger_s": self.linger_s}


def _serve(daemon: Daemon, model: str, before: list[int], *, is_heavy: bool) -> dict[str, Any]:
    started = time.perf_counter()
    answer = generate(daemon, model)
    load_s = time.perf_counter() - started
    if "error" in answer:
        return {"error": answer["error"]}
    entry = resident(daemon)
    placement = entry["placement"]
    taken = _taken(before)
    devices = placement["devices"]
    # By the card's number; a card that no device is named of should take nothing.
    predicted = [0] * len(taken)
    for device in devices:
        predicted[int(device["name"].removeprefix("CUDA"))] = device["total_bytes"]
    buffers = sum(device["real"]["total_bytes"] for device in devices)
    off_bytes = sum(d["total_bytes"] - d["overhead_bytes"] for d in devices) - buffers
    offs = [one - other for one, other in zip(predicted, taken, strict=True)]
    row = {
        "mode": placement["mode"],
        "ngl": placement["n_gpu_layers"],
        "n_cpu_moe": placement["n_cpu_moe"],
        "ctx": placement["n_ctx"],
        "kv": placement["kv_type"],
        "held": placement["load_mode"],
        "ubatch": placement["n_ubatch"],
        "figures": placement["figures"],
        "buffers_off": off_bytes / MIB,
        "buffers": buffers // MIB,
        "predicted": sum(predicted) // MIB,
        "process": used_by(entry["pid"]) // MIB,
        "smi": sum(taken) // MIB,
        "off": max(offs, key=abs) / MIB,
        "ok": all(
            abs(off) <= max(ALLOWED_BYTES, ALLOWED_SHARE * n)
            for off, n in zip(offs, taken, strict=True)
        ),
        "unused": sum(d["free_bytes"] - d["total_bytes"] for d in devices) // MIB,
        "load_s": load_s,
    }
    if len(taken) > 1:
        row |= {"each_predicted": [n // MIB for n in predicted], "each": [n // MIB for n in taken]}
    return row | (_work(daemon, model, before) if is_heavy else {})


def _taken(before: list[int]) -> list[int]:
    """Return the bytes on each card that came into use since then."""
    return [now - then for now, then in zip(used_vram(), before, strict=True)]


def _work(daemon: Daemon, model: str, before: list[int]) -> dict[str, Any]:
    bodies = [completion_body(model)(prompt) for prompt in random_prompts(N_STREAMS, 5)]
    rate, _ = asyncio.run(run_streams(f"{daemon.url}/completion", bodies))
    # Decoding alone, after the cards are warm.
    alone = generate(daemon, model, 96)
    return {
        "smi_heavy": sum(_taken(before)) // MIB,
        "tok_s_16": rate,
        "tok_s_1": alone["eval_count"] / max(1e-9, alone["eval_duration"] / 1e9),
    }


def _simulated_s(state: Path) -> float:
    """Return how long the daemon has simulated so far, by its log."""
    log = (state / "serve.log").read_text(errors="replace")
    return sum(float(s) for s in re.findall(r'"s": ?([\d.]+)[^\n]*"event": ?"simulated"', log))


@contextlib.contextmanager
def _state(path: Path | None) -> Iterator[Path]:
    if path is None:
        with home() as state:
            yield state
    else:
        path.mkdir(parents=True, exist_ok=True)
        yield path


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.memory", description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--n-ctx", type=int, nargs="+", default=[4096])
    parser.add_argument("--rungs", type=int, nargs="+", default=[])
    parser.add_argument("--squeeze", type=float, nargs="+", default=[], metavar="GIB")
    parser.add_argument("--heavy", action="store_true", help="16 streams on each, too")
    parser.add_argument("--load-mode", choices=["mmap", "locked"], help="mmap loads sooner")
    parser.add_argument("--threads", type=int, help="of each worker; as the daemon finds it best")
    parser.add_argument("--state", type=Path, help="a folder that is kept")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    model, rows = arguments.model.absolute(), Rows(arguments.json)
    print(f"{sum(used_vram()) / GIB:.2f} GiB in use before", flush=True)
    # Nothing is to move while it is measured.
    flags = ["--replan-interval", "0"]
    if arguments.load_mode:
        flags += ["--load-mode", arguments.load_mode]
    layers = describe_model(read_header(model)).layers
    with (
        _state(arguments.state) as state,
        running_daemon(state, model.parent, *flags, threads=arguments.threads) as daemon,
    ):
        sweep = Sweep(
            daemon=daemon,
            state=state,
            model=str(name_from_stem(model.stem)),
            layer_bytes=max((layer.expert_bytes for layer in layers), default=0),
            is_heavy=arguments.heavy,
        )
        for n_ctx in arguments.n_ctx:
            for n_cpu_moe in arguments.rungs:
                rows.add(sweep.rung(n_ctx, n_cpu_moe))
        if arguments.squeeze:
            with Hog() as hog:
                for left_gib in arguments.squeeze:
                    rows.add(sweep.squeeze(hog, left_gib))
        overheads = state / "state" / "overheads.json"
        if overheads.exists():
            print(overheads.read_text(encoding="utf-8"), flush=True)


if __name__ == "__main__":
    main()
