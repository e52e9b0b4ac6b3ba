"""Counts the bytecode instructions that our own code runs: a cost without a clock.

On a busy machine times mean nothing, and the CPU has no counters in many virtual ones. The
instructions of the interpreter are the same in each run; between versions of Python they
differ by a few in a hundred.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any


@dataclass
class Opcodes:
    """How many instructions were run."""

    n: int = 0


@contextmanager
def counted_opcodes(*folders: Path) -> Iterator[Opcodes]:
    """Count what this thread runs of the code in some folders or files."""
    found = Opcodes()
    prefixes = tuple(str(folder) for folder in folders)

    def on_event(frame: FrameType, event: str, _: Any) -> Any:
        if event == "opcode":
            found.n += 1
        return on_event

    def on_call(frame: FrameType, _: str, __: Any) -> Any:
        if not frame.f_code.co_filename.startswith(prefixes):
            return None
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        return on_event

    before = sys.gettrace()
    sys.settrace(on_call)
    try:
        yield found
    finally:
        sys.settrace(before)
