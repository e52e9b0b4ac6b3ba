"""Three models in turn for 30 clients, where two have room; the minute of it is a benchmark."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.benchmarks.soak import ASKED_FOR, Outcome, budgeted_daemon, soak
from tests.daemon import Daemon

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with budgeted_daemon(tmp_path_factory.mktemp("soak")) as daemon:
        yield daemon


def run(daemon: Daemon, **how: float) -> Outcome:
    n_kills = int(how.get("n_kills", 0))
    seconds = how.get("seconds", 0.0)
    return asyncio.run(soak(daemon, n_clients=30, seconds=seconds, n_kills=n_kills))


def test_loads_and_evictions_are_as_the_policy_says(daemon: Daemon) -> None:
    """Each round loads its model, and evicts the one that was used least recently."""
    outcome = run(daemon)
    assert outcome.problems() == []
    assert (outcome.rounds, outcome.loads, outcome.evictions) == (4, 4, 2)
    assert outcome.answers == 4 * 30 * 2
    assert outcome.asked_for == dict.fromkeys(ASKED_FOR, 4)


def test_every_request_ends_though_workers_are_killed(daemon: Daemon) -> None:
    outcome = run(daemon, seconds=3.0, n_kills=4)
    assert outcome.problems() == []
    assert outcome.kills == 4
    assert outcome.answers + sum(outcome.killed.values()) == outcome.rounds * 30 * 2
