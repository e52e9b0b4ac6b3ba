"""A worker process on the fake model, for what a real one can't be made to do on demand.

The path in Load says what happens: "stuck-load" never ends loading, "stuck-decode" never ends
its first decode, "stuck-save" never ends saving a prefix, "no-memory" fails, anything else serves.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from shimpy.engine import prefix_store
from shimpy.engine.__main__ import serve
from shimpy.engine.backend import Backend, Chunk
from shimpy.engine.channel import Channel
from shimpy.errors import LoadError
from shimpy.protocol.messages import Load
from tests.fake_backend import FakeBackend


class Stuck(FakeBackend):
    """Decodes for ever, after a line on stdout that says so."""

    def decode(self, chunks: Sequence[Chunk]) -> int:
        wait_for_ever()
        raise AssertionError


class StuckSaving(FakeBackend):
    """Never ends writing a state, after its first bytes."""

    def save_state(self, slot: int, path: str) -> int:
        Path(path).write_bytes(b"half")
        wait_for_ever()
        raise AssertionError


def wait_for_ever() -> None:
    """Block the main thread where no Python code runs, as llama.cpp does."""
    os.write(1, b"stuck\n")
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def open_fake(load: Load, *, on_progress: Callable[[float], bool]) -> Backend:
    on_progress(0.5)
    match Path(load.path).name:
        case "stuck-load":
            wait_for_ever()
        case "no-memory":
            raise LoadError("CUDA0 lacks 2.0 GiB; lower num_ctx", out_of_memory=True)
        case "stuck-decode":
            return Stuck(n_ctx=load.n_ctx, n_slots=load.n_slots)
        case "stuck-save":
            prefix_store.OVERTIME_S = 0.2  # type: ignore[misc]
            return StuckSaving(n_ctx=load.n_ctx, n_slots=load.n_slots, n_batch=load.n_batch)
    return FakeBackend(n_ctx=load.n_ctx, n_slots=load.n_slots, n_batch=load.n_batch)


if __name__ == "__main__":
    sys.exit(serve(Channel(socket.socket(fileno=int(sys.argv[2]))), lambda: open_fake))
