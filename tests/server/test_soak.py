"""Three models in turn for 30 clients, where two have room; the minute of it is a benchmark."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.benchmarks.soak import ASKED_FOR, budgeted_daemon, soak
from tests.daemon import Daemon

pytestmark = pytest.mark.slow


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    # One for each test: kills may leave a model held back.
    with budgeted_daemon(tmp_path) as daemon:
        yield daemon


def test_loads_and_evictions_are_as_the_policy_says(daemon: Daemon) -> None:
    """Each round loads its model, and evicts the one that was used least recently."""
    outcome = asyncio.run(soak(daemon, n_clients=30, seconds=0.0, min_rounds=4))
    assert outcome.problems() == []
    assert (outcome.rounds, outcome.loads, outcome.evictions) == (4, 4, 2)
    assert outcome.answers == 4 * 30 * 2
    assert outcome.asked_for == dict.fromkeys(ASKED_FOR, 4)


def test_every_request_ends_though_workers_are_killed(daemon: Daemon) -> None:
    outcome = asyncio.run(soak(daemon, n_clients=30, seconds=2.0, min_rounds=2, n_kills=3))
    assert outcome.problems() == []
    assert outcome.kills == 3
    assert outcome.answers + sum(outcome.killed.values()) == outcome.rounds * 30 * 2
