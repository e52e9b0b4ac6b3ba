"""VRAM as nvidia-smi shows it, and another program that takes it; on all cards.

With CUDA_VISIBLE_DEVICES, a list of numbers, on those.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Self

from shimpy.units import MIB

# What a process holds may go a moment after the process has gone.
_PATIENCE_S = 15.0
_LOOK_S = 0.05
_ALLOWED_BYTES = 8 * MIB


def used_vram() -> list[int]:
    """Return the bytes in use on each card."""
    return [int(line) * MIB for line in _query("--query-gpu=memory.used")]


def used_by(pid: int) -> int:
    """Return the bytes that a process holds on all cards; 0: it has none, or is not listed."""
    rows = (line.split(",") for line in _query("--query-compute-apps=pid,used_memory"))
    return sum(int(used) * MIB for one, used in rows if int(one) == pid)


def wait_until_free(used: list[int]) -> float:
    """Wait until no more than this is in use on any card; return the seconds that took."""
    started_s = time.monotonic()
    while any(now > then + _ALLOWED_BYTES for now, then in zip(used_vram(), used, strict=True)):
        waited_s = time.monotonic() - started_s
        assert waited_s < _PATIENCE_S, f"{used_vram()} bytes are in use, not {used}"
        time.sleep(_LOOK_S)
    return time.monotonic() - started_s


def _query(what: str) -> list[str]:
    command = ["nvidia-smi", what, "--format=csv,noheader,nounits"]
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        command += ["-i", visible]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.split("\n")[:-1]


class Hog:
    """A process that holds VRAM until only so much is free on each card."""

    _CODE = """
import sys, torch
cards = range(torch.cuda.device_count())
held = []
for line in sys.stdin:
    held.clear()
    torch.cuda.empty_cache()
    for card in cards:
        free, _ = torch.cuda.mem_get_info(card)
        n_bytes = max(0, int(free - float(line) * 2**30))
        held.append(torch.empty(n_bytes, dtype=torch.uint8, device=f"cuda:{card}"))
    print([torch.cuda.mem_get_info(card)[0] for card in cards], flush=True)
"""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", self._CODE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def leave(self, gib: float) -> None:
        """Hold all but so much of what is free now on each card, beside what it held."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{gib}\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline(), "the process that holds VRAM has ended"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Give it all back."""
        self._process.kill()
        self._process.wait(30)
