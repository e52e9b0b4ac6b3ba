"""What loads would take, by llama.cpp's own arithmetic: all is laid out, nothing is allocated.

A simulated model takes 40 ms, or 0.2 s with a vocabulary of 100,000 tokens, and each context
of it some 10 ms. On a card the process holds a context of the driver's (330 MiB on an H200)
until it ends. Verified there: it is what the real load takes, to 0.1 MiB.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from shimpy.engine.llama.context import Context
from shimpy.engine.llama.embed import Embedder
from shimpy.engine.llama.loader import Model, load_model
from shimpy.errors import ShimpyError
from shimpy.protocol.messages import BufferUse, Load, Simulated

_NO_FIGURES = "this build of llama.cpp does not tell what a context takes"


def simulate(loads: Sequence[Load]) -> Iterator[Simulated]:
    """Yield what each load would take, as it is known; loads that share a model come together."""
    groups: dict[object, list[int]] = {}
    for index, load in enumerate(loads):
        groups.setdefault(_model_key(load), []).append(index)
    for indices in groups.values():
        try:
            model = load_model(loads[indices[0]], on_progress=lambda _: True, simulated=True)
        except ShimpyError as error:
            yield from (Simulated(index=index, error=error.message) for index in indices)
            continue
        try:
            for index in indices:
                yield _simulate_context(model, loads[index], index)
        finally:
            model.close()


def _model_key(load: Load) -> object:
    """Return what the model's own part of a load depends on."""
    return (
        load.path,
        *load.shards,
        load.n_gpu_layers,
        load.n_cpu_moe,
        *load.devices,
        *load.tensor_split,
    )


def _simulate_context(model: Model, load: Load, index: int) -> Simulated:
    try:
        memory = _context_memory(model, load)
    except ShimpyError as error:
        return Simulated(index=index, error=error.message)
    if not any(use.model_bytes for use in memory):
        # The log, which is read where the breakdown can't be, says 0 of what is not allocated.
        return Simulated(index=index, error=_NO_FIGURES)
    return Simulated(index=index, memory=memory)


def _context_memory(model: Model, load: Load) -> list[BufferUse]:
    context = Embedder(model, load) if load.embedding else Context(model, load)
    try:
        return context.memory()
    finally:
        context.close()
