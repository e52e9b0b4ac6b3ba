"""What the daemon does for a token, from a worker's frame to a chunk for the socket, and for a
whole request.

Counted in instructions of the interpreter: about 10 ns each.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from pathlib import Path
from typing import cast

import pytest

import shimpy
from shimpy.placement.placement import Rung
from shimpy.protocol.codec import encode_frame
from shimpy.protocol.messages import Delta, Events, Prefilled, Ready, Submit
from shimpy.scheduler.lease import Lease
from shimpy.scheduler.worker import Worker
from shimpy.server.generation import generate_on
from shimpy.server.ollama.answers import generate_chunks
from shimpy.server.prompts import Prepared
from shimpy.server.record import Record
from shimpy.server.streaming import ndjson_line
from tests.opcodes import counted_opcodes
from tests.scheduler.workshop import FAKE_ENGINE
from tests.server.harness import running_app
from tests.synthetic import write_chain

N_STEPS = 20
N_REQUESTS = 5
READY = Ready([], n_ctx=64, n_ctx_train=64, n_slots=8, n_vocab=9, n_embd=8, load_s=0.0)


async def opcodes_per_token(n_streams: int) -> float:
    """Return our own instructions for each token of so many streams of /api/generate."""
    worker = Worker(uses_gpu=False)
    n_chunks = 0

    async def answer() -> None:
        nonlocal n_chunks
        # Where the model was placed is nothing that a token asks for.
        lease = Lease(worker=worker, ready=READY, rung=cast("Rung", None), load_s=0.0)
        record = Record(request_id="one", model="m", on_tokens=lambda *_: None)
        prepared = Prepared(submit=Submit(0, []), make_parser=lambda: None)
        events = generate_on(lease, prepared, record, 0.0)
        async with aclosing(generate_chunks(events, model="m", wants_context=False)) as chunks:
            async for chunk in chunks:
                assert ndjson_line(chunk)
                n_chunks += 1

    async def step(frame: bytes, n_expected: int) -> None:
        for message in worker._decoder.feed(frame):
            worker._on_message(message)
        # Only turns of the loop: nothing here waits for anything outside.
        while n_chunks < n_expected:  # noqa: ASYNC110
            await asyncio.sleep(0)

    tasks = [asyncio.ensure_future(answer()) for _ in range(n_streams)]
    while len(worker._mailboxes) < n_streams:  # noqa: ASYNC110
        await asyncio.sleep(0)
    requests = range(1, n_streams + 1)
    await step(encode_frame(Events([Prefilled(request, 9, 0) for request in requests])), 0)
    frame = encode_frame(Events([Delta(request, " word", 1) for request in requests]))
    await step(frame, n_streams)
    with counted_opcodes(Path(shimpy.__file__).parent) as opcodes:
        for index in range(N_STEPS):
            await step(frame, (index + 2) * n_streams)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return opcodes.n / (N_STEPS * n_streams)


@pytest.mark.parametrize(("n_streams", "limit"), [(1, 538 * 1.2), (8, 429 * 1.2)])
async def test_a_token_costs_few_instructions(n_streams: int, limit: float) -> None:
    """Measured with Python 3.11, and a fifth: who adds work to each token should know it."""
    cost = await opcodes_per_token(n_streams)
    assert cost <= limit


@pytest.mark.slow
async def test_a_request_costs_few_instructions(tmp_path: Path) -> None:
    """Mostly what its client waits for before the worker hears of the prompt."""
    folder = tmp_path / "models"
    folder.mkdir()
    write_chain(folder / "chain.gguf")
    async with running_app(folder, tmp_path, engine_argv=FAKE_ENGINE) as app:
        body = {"model": "chain", "prompt": "hi", "max_tokens": 1, "temperature": 0, "stream": True}
        for _ in range(3):
            # The first one loads the model; what is looked up once is known after another.
            (await app.client.post("/v1/completions", json=body)).raise_for_status()
        with counted_opcodes(Path(shimpy.__file__).parent) as opcodes:
            for _ in range(N_REQUESTS):
                await app.client.post("/v1/completions", json=body)
    assert opcodes.n / N_REQUESTS <= 7880 * 1.2
