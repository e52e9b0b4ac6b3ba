"""Models loaded for a test, text generated without an engine, and code run in a process apart."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shimpy.engine.backend import Chunk, DecodeStatus
from shimpy.engine.llama import LlamaBackend, open_backend
from shimpy.protocol.messages import Load, Sampling

GREEDY = Sampling(temperature=0)


def load(path: Path, **options: Any) -> LlamaBackend:
    options = {"n_ctx": 512, "n_slots": 4, **options}
    return open_backend(Load(path=str(path), **options), on_progress=lambda _: None)


@contextmanager
def loaded(path: Path, **options: Any) -> Iterator[LlamaBackend]:
    """Load a model and close it again; the context is 512 tokens for 4 slots."""
    backend = load(path, **options)
    try:
        yield backend
    finally:
        backend.close()


def prompt_ids(backend: LlamaBackend, text: str) -> list[int]:
    start = [backend.bos_id] if backend.add_bos else []
    return start + backend.tokenize(text, parse_special=False)


def prefill(backend: LlamaBackend, ids: Sequence[int], *, slot: int = 0, start: int = 0) -> None:
    """Decode tokens; the last one's logits are row 0."""
    assert backend.decode([Chunk(slot, start, ids, True)]) == DecodeStatus.OK


def logits(backend: LlamaBackend, row: int = 0) -> npt.NDArray[np.float32]:
    """Return a copy of an output's logits."""
    return backend._context.row(row).copy()


def generate_ids(
    backend: LlamaBackend,
    prompt: str | Sequence[int],
    sampling: Sampling = GREEDY,
    *,
    n: int = 32,
    slot: int = 0,
) -> list[int]:
    """Return up to `n` tokens, the one that ends the text included; the slot is emptied first."""
    ids = prompt_ids(backend, prompt) if isinstance(prompt, str) else list(prompt)
    assert backend.kv_remove(slot, 0, -1)
    sampler = backend.make_sampler(sampling, ids)
    try:
        prefill(backend, ids, slot=slot)
        return _go_on(backend, sampler, slot, len(ids), n)
    finally:
        sampler.close()


def _go_on(backend: LlamaBackend, sampler: Any, slot: int, pos: int, n: int) -> list[int]:
    chosen: list[int] = []
    while True:
        token, _ = sampler.sample(0)
        chosen.append(token)
        if len(chosen) == n or backend.is_eog(token):
            return chosen
        prefill(backend, [token], slot=slot, start=pos)
        pos += 1


def go_on(backend: LlamaBackend, *, slot: int, pos: int, n: int = 32) -> list[int]:
    """Return `n` greedy tokens after a prefill whose logits are row 0."""
    sampler = backend.make_sampler(GREEDY, [])
    try:
        return _go_on(backend, sampler, slot, pos, n)
    finally:
        sampler.close()


def text_of(backend: LlamaBackend, ids: Sequence[int]) -> str:
    return b"".join(backend.piece(token, special=False) for token in ids).decode(errors="replace")


def generate(backend: LlamaBackend, prompt: str, sampling: Sampling = GREEDY, **how: Any) -> str:
    return text_of(backend, generate_ids(backend, prompt, sampling, **how))


def run_apart(code: str, *arguments: object) -> str:
    """Run code in a process of its own and return what it prints; it must not die.

    For what could end the process: llama.cpp aborts where others raise.
    """
    prelude = "import sys\nfrom tests.engine.llama.running import *\n"
    done = subprocess.run(
        [sys.executable, "-c", prelude + textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
        cwd=Path(__file__).parents[3],
    )
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[-3000:]}"
    return done.stdout
