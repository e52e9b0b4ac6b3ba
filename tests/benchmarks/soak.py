"""Three models in turn for 30 clients, where two have room: `python -m tests.benchmarks.soak`.

The clients go through rounds together: all ask for one model, each several times; in the next
round for the next model. So the policy says what must happen: the model of a round is loaded
once, and from the third round on the one of the round before the last leaves for it, since it is
idle and was used least recently. In each round some ask for what can't be had, and get the
error that they asked for.

With --kills, as many rounds' time follows in which random workers get SIGKILL: every request
ends with an answer or an error that says so. Afterwards the daemon's memory and open files are
what they were before.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from shimpy.gguf.arch import describe_model
from shimpy.gguf.reader import read_header
from shimpy.placement.hardware import suppose
from shimpy.placement.placement import PlanOptions
from shimpy.placement.planner import plan_model
from shimpy.units import GIB, format_bytes
from tests.benchmarks.budgeted import RAM_BYTES
from tests.daemon import Daemon, running_daemon
from tests.synthetic import write_chain

MODELS = ("alder", "birch", "cedar")
N_CTX = 4096
N_SLOTS = 8
ASKS_PER_ROUND = 2
_PATIENCE_S = 120.0
# What a request that can't be had gets: its status, and a part of what it is told.
ASKED_FOR: dict[str, tuple[int, str]] = {
    "no such model": (404, "not found"),
    "bad option": (400, "num_ctx"),
    "too long": (400, "context"),
}
# The daemon's own words for a worker that was killed.
_KILLED = re.compile(r"SIGKILL|held back")
_FILES_SLACK = 4
_MEMORY_SLACK = 1.15


@dataclass
class Outcome:
    """What the clients met, and what the daemon did."""

    answers: int = 0
    asked_for: Counter[str] = field(default_factory=Counter)
    killed: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    rounds: int = 0
    kills: int = 0
    loads: int = 0
    evictions: int = 0
    # Resident bytes and open files of the daemon.
    before: tuple[int, int] = (0, 0)
    after: tuple[int, int] = (0, 0)
    first_chunk_s: list[float] = field(default_factory=list)

    def problems(self) -> list[str]:
        """Return what the policy does not allow; empty: all is well."""
        found = list(self.failures)
        if not self.kills:
            found += [
                f"{count} times {where}, but nobody was killed"
                for where, count in self.killed.items()
            ]
            expected = {"loads": self.rounds, "evictions": max(0, self.rounds - 2)}
            found += [
                f"{getattr(self, name)} {name} in {self.rounds} rounds, not {count}"
                for name, count in expected.items()
                if getattr(self, name) != count
            ]
        elif self.loads > self.rounds + self.kills:
            found.append(f"{self.loads} loads in {self.rounds} rounds with {self.kills} kills")
        n_asked = {kind: self.asked_for[kind] for kind in ASKED_FOR}
        if any(count != self.rounds for count in n_asked.values()):
            found.append(f"of each error {self.rounds} were asked for, these came: {n_asked}")
        if self.after[0] > self.before[0] * _MEMORY_SLACK:
            sizes = " to ".join(format_bytes(size) for size, _ in (self.before, self.after))
            found.append(f"the daemon's memory went from {sizes}")
        if self.after[1] > self.before[1] + _FILES_SLACK:
            found.append(f"its open files went from {self.before[1]} to {self.after[1]}")
        return found

    def __str__(self) -> str:
        lines = [
            f"{self.rounds} rounds, {self.kills} kills: {self.answers} answers",
            f"{self.loads} loads, {self.evictions} evictions",
            f"errors that were asked for: {dict(self.asked_for)}",
            f"told of a kill: {dict(self.killed)}",
            f"memory {format_bytes(self.before[0])} -> {format_bytes(self.after[0])}",
            f"files {self.before[1]} -> {self.after[1]}",
        ]
        if len(self.first_chunk_s) > 1:
            cuts = statistics.quantiles(self.first_chunk_s, n=100)
            lines.append(f"first chunk: p50 {cuts[49]:.2f} s, p99 {cuts[98]:.2f} s")
        return "\n".join(lines + [f"PROBLEM {problem}" for problem in self.problems()[:10]])


@contextmanager
def budgeted_daemon(folder: Path) -> Iterator[Daemon]:
    """Run a daemon with three models, and RAM for two of them and a half."""
    models = folder / "models"
    models.mkdir()
    for name in MODELS:
        write_chain(models / f"{name}.gguf", endless=True)
    shape = describe_model(read_header(models / f"{MODELS[0]}.gguf"))
    options = PlanOptions(n_ctx=N_CTX, n_slots=N_SLOTS)
    chosen = plan_model(shape, suppose(None, vram_bytes=[], ram_bytes=4 * GIB), options).chosen
    assert chosen is not None
    ram_bytes = int(2.5 * chosen.host.total_bytes) + chosen.host.margin_bytes
    flags = ("--n-slots", str(N_SLOTS), "--n-ctx", str(N_CTX), "--prefix-cache-size", "0")
    with running_daemon(
        folder / "home",
        models,
        *flags,
        environ={RAM_BYTES: str(ram_bytes)},
        module="tests.benchmarks.budgeted",
    ) as daemon:
        yield daemon


async def soak(
    daemon: Daemon,
    *,
    n_clients: int,
    seconds: float,
    min_rounds: int = 4,
    n_kills: int = 0,
    seed: int = 0,
) -> Outcome:
    """Run rounds for so long, and tell what happened.

    A daemon may be used again, but after kills some model may be held back for a while.
    """
    outcome = Outcome()
    draw = random.Random(seed)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=n_clients)
    async with httpx.AsyncClient(
        base_url=daemon.url, limits=limits, timeout=_PATIENCE_S, trust_env=False
    ) as http:
        # Whatever the daemon needs for so many connections at once, it has before the count.
        await _round(http, outcome, 0, n_clients, draw)
        await _unload_all(http)
        outcome = Outcome()
        loads, evictions = await _counts(http)
        outcome.before = _size(daemon)
        end_s = time.monotonic() + seconds
        async with asyncio.TaskGroup() as tasks:
            killer = None
            if n_kills:
                pause_s = seconds / (n_kills + 1)
                killer = tasks.create_task(_kill(http, outcome, n_kills, pause_s, draw))
            while (
                outcome.rounds < min_rounds
                or time.monotonic() < end_s
                or (killer is not None and not killer.done())
            ):
                await _round(http, outcome, outcome.rounds, n_clients, draw)
                outcome.rounds += 1
        now_loads, now_evictions = await _counts(http)
        outcome.loads, outcome.evictions = now_loads - loads, now_evictions - evictions
        await _unload_all(http)
        outcome.after = _size(daemon)
    return outcome


# --- the clients ------------------------------------------------------------------------------


async def _round(
    http: httpx.AsyncClient, outcome: Outcome, number: int, n_clients: int, draw: random.Random
) -> None:
    """Let all clients use one model, and some ask for what can't be had."""
    model = MODELS[number % len(MODELS)]
    lengths = [draw.randint(4, 24) for _ in range(n_clients * ASKS_PER_ROUND)]
    async with asyncio.TaskGroup() as tasks:
        for client in range(n_clients):
            mine = lengths[client * ASKS_PER_ROUND : (client + 1) * ASKS_PER_ROUND]
            tasks.create_task(_client(http, outcome, model, client, mine))
        for kind in ASKED_FOR:
            tasks.create_task(_ask_amiss(http, outcome, model, kind))


async def _client(
    http: httpx.AsyncClient, outcome: Outcome, model: str, client: int, lengths: list[int]
) -> None:
    for number, length in enumerate(lengths):
        body = {
            "model": model,
            "prompt": f"client {client} asks {number}",
            "options": {"num_predict": length},
        }
        try:
            await _ask(http, outcome, body, length)
        except (httpx.HTTPError, ValueError) as error:
            outcome.failures.append(f"{type(error).__name__}: {error}")


async def _ask(
    http: httpx.AsyncClient, outcome: Outcome, body: dict[str, Any], length: int
) -> None:
    started_s = time.monotonic()
    async with http.stream("POST", "/api/generate", json=body) as answer:
        last: dict[str, Any] = {}
        n_lines = 0
        async for line in answer.aiter_lines():
            if not n_lines and answer.status_code == 200:
                outcome.first_chunk_s.append(time.monotonic() - started_s)
            n_lines += 1
            last = json.loads(line)
    if answer.status_code == 200 and last.get("done"):
        if last["eval_count"] == length:
            outcome.answers += 1
        else:
            outcome.failures.append(f"{last['eval_count']} tokens came, not {length}")
        return
    message = str(last.get("error", ""))
    where = "in mid-answer" if answer.status_code == 200 else str(answer.status_code)
    if _KILLED.search(message):
        outcome.killed[where] += 1
    else:
        outcome.failures.append(f"{where}: {last}")


async def _ask_amiss(http: httpx.AsyncClient, outcome: Outcome, model: str, kind: str) -> None:
    """Ask for what must be refused, whatever the workers do meanwhile."""
    body: dict[str, Any] = {"model": model, "prompt": "x", "stream": False}
    if kind == "no such model":
        body["model"] = "oak"
    elif kind == "bad option":
        body["options"] = {"num_ctx": -1}
    else:
        body |= {"prompt": "word " * 2 * N_CTX, "truncate": False}
    status, text = ASKED_FOR[kind]
    answer = await http.post("/api/generate", json=body)
    if (answer.status_code == status and text in answer.text) or _KILLED.search(answer.text):
        outcome.asked_for[kind] += 1
    else:
        outcome.failures.append(f"{kind}: {answer.status_code} {answer.text}")


# --- the kills, and what is counted -----------------------------------------------------------


async def _kill(
    http: httpx.AsyncClient, outcome: Outcome, n_kills: int, pause_s: float, draw: random.Random
) -> None:
    """Send SIGKILL to so many random workers, whatever they are doing."""
    while outcome.kills < n_kills:
        await asyncio.sleep(pause_s * draw.uniform(0.5, 1.5))
        residents = (await http.get("/api/ps")).json()["models"]
        pids = [resident["pid"] for resident in residents if resident.get("pid")]
        if pids:
            try:
                os.kill(draw.choice(pids), signal.SIGKILL)
            except ProcessLookupError:
                continue
            outcome.kills += 1


async def _counts(http: httpx.AsyncClient) -> tuple[int, int]:
    """Return how many loads were begun, and how many models were evicted, since the start."""
    text = (await http.get("/metrics")).text
    loads = re.findall(r"^shimpy_loads_total{[^}]*} (\S+)$", text, re.MULTILINE)
    evictions = re.findall(
        r'^shimpy_unloads_total{[^}]*reason="evict"[^}]*} (\S+)$', text, re.MULTILINE
    )
    return int(sum(map(float, loads))), int(sum(map(float, evictions)))


async def _unload_all(http: httpx.AsyncClient) -> None:
    for model in MODELS:
        body = {"model": model, "keep_alive": 0}
        await http.post("/api/generate", json=body)
    while (await http.get("/api/ps")).json()["models"]:  # noqa: ASYNC110 - over HTTP
        await asyncio.sleep(0.05)


def _size(daemon: Daemon) -> tuple[int, int]:
    process = psutil.Process(daemon.process.pid)
    return process.memory_info().rss, process.num_fds()


def main() -> int:
    """Run the soak and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--kills", type=int, default=20)
    arguments = parser.parse_args()
    n_problems = 0
    with tempfile.TemporaryDirectory() as folder, budgeted_daemon(Path(folder)) as daemon:
        for n_kills in dict.fromkeys((0, arguments.kills)):
            outcome = asyncio.run(
                soak(
                    daemon,
                    n_clients=arguments.clients,
                    seconds=arguments.seconds,
                    n_kills=n_kills,
                )
            )
            print(outcome)
            n_problems += len(outcome.problems())
    return 1 if n_problems else 0


if __name__ == "__main__":
    sys.exit(main())
