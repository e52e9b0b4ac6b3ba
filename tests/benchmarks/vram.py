"""VRAM of the first card as nvidia-smi shows it, and another program that takes it."""

from __future__ import annotations

import subprocess
import sys
from typing import Self

from shimpy.units import MIB


def used_vram() -> int:
    """Return the bytes in use on the first card, as nvidia-smi shows them."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", "0"]
    return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout) * MIB


class Hog:
    """A process that holds VRAM until only so much is free."""

    _CODE = """
import sys, torch
held = None
for line in sys.stdin:
    held = None
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    held = torch.empty(max(0, int(free - float(line) * 2**30)), dtype=torch.uint8, device="cuda")
    print(torch.cuda.mem_get_info()[0], flush=True)
"""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", self._CODE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def leave(self, gib: float) -> None:
        """Hold all but so much of what is free now, beside what it held."""
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
