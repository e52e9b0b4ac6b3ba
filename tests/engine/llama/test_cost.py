"""What a token costs beside llama.cpp's own work, in instructions of the interpreter."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

import shimpy
from shimpy.engine.intake import Intake
from shimpy.engine.loop import Engine
from shimpy.engine.outbox import INTERVAL_S
from shimpy.protocol.messages import Sampling, Submit, Text, ToDaemon
from tests.engine.llama.running import loaded
from tests.opcodes import counted_opcodes

ENGINE = Path(shimpy.__file__).parent / "engine"
N_STEPS = 20


def opcodes_per_token(
    model: Path,
    n_streams: int,
    sampling: Sampling,
    *,
    kv_unified: bool = True,
    tick_s: float = 2 * INTERVAL_S,
) -> float:
    """Return the engine's instructions for a token while so many answers are generated.

    `tick_s`: between two looks at the clock; by default so long that each step sends its text.
    """
    with loaded(
        model, n_ctx=1024, n_slots=n_streams, n_threads=1, kv_unified=kv_unified
    ) as backend:
        sent: list[ToDaemon] = []
        ticks = itertools.count(step=tick_s)
        intake = Intake(send=sent.append, clock=ticks.__next__)
        intake.serve(backend, embeds=False)
        engine = Engine(backend, inbox=intake.inbox, send=sent.append, clock=ticks.__next__)

        def n_generated() -> int:
            return sum(one.sequence.n_generated for one in engine._generations.values())

        for request in range(n_streams):
            prompt = [Text(f"{request} once upon a time", parse_special=True)]
            intake.on_message(Submit(request, prompt, sampling=sampling))
        # Prefill, first pieces, first candidates.
        for _ in range(10):
            engine.step(goes_on=True)
        n_before = n_generated()
        with counted_opcodes(ENGINE) as opcodes:
            while n_generated() < n_before + N_STEPS * n_streams:
                engine.step(goes_on=True)
        return opcodes.n / (n_generated() - n_before)


@pytest.mark.parametrize(
    ("n_streams", "sampling", "limit"),
    [
        (1, Sampling(temperature=0.0), 1075 * 1.2),
        (8, Sampling(temperature=0.0), 566 * 1.2),
        (8, Sampling(temperature=0.8), 676 * 1.2),
    ],
    ids=["alone", "batched", "drawn"],
)
def test_a_token_costs_few_instructions(
    llama_model: Path, n_streams: int, sampling: Sampling, limit: float
) -> None:
    """Measured with Python 3.11, and a fifth: who adds work to each token should know it."""
    cost = opcodes_per_token(llama_model, n_streams, sampling)
    assert cost <= limit


@pytest.mark.parametrize(("n_streams", "limit"), [(1, 1050 * 1.2), (8, 565 * 1.2)])
def test_cells_of_its_own_cost_a_slot_no_more(
    llama_model: Path, n_streams: int, limit: float
) -> None:
    sampling = Sampling(temperature=0.0)
    assert opcodes_per_token(llama_model, n_streams, sampling, kv_unified=False) <= limit


@pytest.mark.parametrize(("n_streams", "limit"), [(1, 450 * 1.2), (8, 239 * 1.2)])
def test_a_token_of_a_quick_model_costs_fewer(
    llama_model: Path, n_streams: int, limit: float
) -> None:
    """Steps of a millisecond, of which a frame tells some sixteen."""
    sampling = Sampling(temperature=0.0)
    cost = opcodes_per_token(llama_model, n_streams, sampling, tick_s=0.0005)
    assert cost <= limit
