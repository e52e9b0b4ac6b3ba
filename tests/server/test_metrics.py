"""What /metrics says of requests, tokens, loads, unloads and deaths, read as Prometheus does."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from shimpy.scheduler.worker import ENGINE_ARGV
from tests.scheduler.workshop import FAKE_ENGINE
from tests.server.harness import Running, running_app
from tests.synthetic import write_chain

pytestmark = pytest.mark.slow

Samples = Mapping[tuple[str, frozenset[tuple[str, str]]], float]


@asynccontextmanager
async def counting_app(tmp_path: Path, argv: Sequence[str]) -> AsyncIterator[Running]:
    folder = tmp_path / "models"
    folder.mkdir()
    write_chain(folder / "chain.gguf")
    async with running_app(folder, tmp_path, engine_argv=argv) as running:
        services = running.services
        follow = asyncio.create_task(services.metrics.follow(services.scheduler))
        yield running
        follow.cancel()


@pytest.fixture
async def app(tmp_path: Path) -> AsyncIterator[Running]:
    async with counting_app(tmp_path, FAKE_ENGINE) as running:
        yield running


@pytest.fixture
async def real_app(tmp_path: Path) -> AsyncIterator[Running]:
    """With llama.cpp in the workers."""
    async with counting_app(tmp_path, ENGINE_ARGV) as running:
        yield running


async def scrape(app: Running) -> Samples:
    answer = await app.client.get("/metrics")
    assert answer.status_code == 200
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float:
    """The sum of a metric's samples that carry these labels."""
    return sum(
        number
        for (found, having), number in samples.items()
        if found == name and set(labels.items()) <= having
    )


async def generate(app: Running, n_tokens: int = 5) -> None:
    body = {"model": "chain", "prompt": "hi", "options": {"num_predict": n_tokens}}
    await app.lines("/api/generate", body)


async def test_a_generation_shows_in_every_histogram(real_app: Running) -> None:
    app = real_app
    await generate(app)
    samples = await scrape(app)
    assert value(samples, "shimpy_tokens_total", model="chain:latest", kind="generated") == 5
    assert value(samples, "shimpy_tokens_total", model="chain:latest", kind="prompt") > 0
    assert value(samples, "shimpy_time_to_first_token_seconds_count") == 1
    assert value(samples, "shimpy_load_seconds_count", model="chain:latest") == 1
    # The tokens after those that came first; some may have come together with them.
    assert 0 <= value(samples, "shimpy_inter_token_seconds_count") <= 4
    labels = {"route": "/api/generate", "status": "200", "method": "POST", "outcome": "length"}
    assert value(samples, "shimpy_requests_total", **labels) == 1


async def test_a_resident_is_there_in_predicted_and_real_bytes(real_app: Running) -> None:
    app = real_app
    before = await scrape(app)
    assert value(before, "shimpy_resident_bytes") == 0
    await generate(app)
    after = await scrape(app)
    for kind in ("predicted", "real"):
        assert value(after, "shimpy_resident_bytes", kind=kind, device="CPU") > 0
    assert value(after, "shimpy_resident_state", state="ready", mode="cpu") == 1


async def test_an_unload_is_counted_by_its_cause(app: Running) -> None:
    await generate(app)
    await app.client.post("/api/generate", json={"model": "chain", "keep_alive": 0})
    samples = await scrape(app)
    assert (
        value(samples, "shimpy_unloads_total", reason="asked")
        + value(samples, "shimpy_unloads_total", reason="keep_alive")
        == 1
    )


async def test_a_death_is_counted_by_its_kind(app: Running) -> None:
    await generate(app)
    (resident,) = app.services.scheduler.residents()
    assert resident.pid is not None
    events = app.services.scheduler.events()
    died = asyncio.ensure_future(anext(events))
    await asyncio.sleep(0)
    os.kill(resident.pid, signal.SIGKILL)
    assert (await died).kind == "died"
    samples = await scrape(app)
    assert value(samples, "shimpy_worker_deaths_total", reason="killed") == 1


async def test_labels_hold_nothing_that_a_client_makes_up(app: Running) -> None:
    """Else a scanner of paths or model names would fill the daemon's memory."""
    await app.client.get("/no/such/path")
    await app.client.post("/api/show", json={"model": "no-such-model"})
    await app.client.request("MADEUP", "/api/tags")
    await app.client.get("/v1/models/no-such-model")
    text = (await app.client.get("/metrics")).text
    for made_up in ("no-such-model", "/no/such/path", "MADEUP"):
        assert made_up not in text
    assert 'route="unknown"' in text


async def test_ready_tells_what_can_be_asked_for(app: Running) -> None:
    answer = await app.client.get("/ready")
    assert answer.json() == {"status": "ready", "models": 1}


async def test_a_stopping_daemon_is_not_ready(app: Running) -> None:
    app.services.lifecycle.is_stopping = True
    assert (await app.client.get("/ready")).status_code == 503
