"""Many streaming clients at once, some slow, some leaving: `python -m tests.benchmarks.load`.

Prints what failed, how the daemon's memory and files went, and the latency that the daemon
itself adds: a request's time less its waits for a model, a slot, and the model's work, over the
clients that read as fast as they can. Where cores are few, most of that is waiting for one: what
the kernel counts of it is printed beside. Exit status 1 when a request failed that was not meant
to, or when something grew.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import psutil

from tests.daemon import Daemon, running_daemon
from tests.synthetic import write_chain

_SAMPLE_S = 1.0
_PATIENCE_S = 300.0
# What may come and go: connections in their last moments, the log's buffers.
_FILES_SLACK = 32
_MEMORY_SLACK = 1.25


@dataclass
class Tally:
    """What the clients met."""

    ended: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    first_chunk_s: list[float] = field(default_factory=list)


async def client(
    kind: str, index: int, http: aiohttp.ClientSession, tally: Tally, end_s: float
) -> None:
    """Ask again and again until the time is over."""
    draw = random.Random(index)
    n_asked = 0
    while time.monotonic() < end_s:
        n_asked += 1
        body = {
            "model": "endless",
            "prompt": f"client {index} asks {n_asked}",
            "options": {"num_predict": draw.randint(8, 48)},
        }
        try:
            done = await ask(kind, f"{kind}-{index}-{n_asked}", body, http, tally, draw)
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            tally.failures.append(f"{kind}: {type(error).__name__}: {error}")
            continue
        tally.ended[f"{kind}: {done}"] += 1


async def ask(  # noqa: PLR0917 - one call, above
    kind: str,
    request_id: str,
    body: dict[str, object],
    http: aiohttp.ClientSession,
    tally: Tally,
    draw: random.Random,
) -> str:
    """Stream one answer in a client's way and return how it ended."""
    started_s = time.monotonic()
    headers = {"X-Request-Id": request_id}
    async with http.post("/api/generate", json=body, headers=headers) as answer:
        if answer.status != 200:
            tally.failures.append(f"{kind}: {answer.status} {await answer.read()!r}")
            return "refused"
        leaves_after = draw.randint(1, 6) if kind == "leaving" else -1
        last = {}
        n_lines = 0
        async for line in answer.content:
            if not n_lines:
                tally.first_chunk_s.append(time.monotonic() - started_s)
            n_lines += 1
            last = json.loads(line)
            if "error" in last:
                tally.failures.append(f"{kind}: in mid-stream: {last['error']}")
                return "failed"
            if n_lines == leaves_after:
                return "left"
            if kind == "slow":
                await asyncio.sleep(draw.uniform(0.05, 0.4))
        if not last.get("done"):
            tally.failures.append(f"{kind}: the answer has no end: {last}")
        return str(last.get("done_reason"))


async def watch(daemon: Daemon, samples: list[tuple[int, int]]) -> None:
    """Note the daemon's resident memory and open files, for ever."""
    process = psutil.Process(daemon.process.pid)
    while True:
        samples.append((process.memory_info().rss, process.num_fds()))
        await asyncio.sleep(_SAMPLE_S)


async def load(
    daemon: Daemon, n_clients: int, seconds: float
) -> tuple[Tally, list[tuple[int, int]]]:
    """Run all clients for a time, and let what runs then end."""
    tally = Tally()
    samples: list[tuple[int, int]] = []
    # aiohttp's client, for its parser in C: this process shares the cores with the daemon.
    async with aiohttp.ClientSession(
        daemon.url,
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=_PATIENCE_S),
    ) as http:
        async with http.post("/api/generate", json={"model": "endless"}) as loaded:
            await loaded.read()
        watcher = asyncio.create_task(watch(daemon, samples))
        kinds = ["fast"] * 7 + ["slow"] * 2 + ["leaving"]
        end_s = time.monotonic() + seconds
        async with asyncio.TaskGroup() as tasks:
            for index in range(n_clients):
                kind = kinds[index % len(kinds)]
                tasks.create_task(client(kind, index, http, tally, end_s))
        watcher.cancel()
    return tally, samples


def core_times(daemon: Daemon) -> tuple[float, float]:
    """Return the seconds that the daemon's first thread ran, and waited for a core.

    Source: Linux, Documentation/scheduler/sched-stats.rst, /proc/PID/schedstat.
    """
    ran_ns, waited_ns, _ = Path(f"/proc/{daemon.process.pid}/schedstat").read_text().split()
    return int(ran_ns) / 1e9, int(waited_ns) / 1e9


def added_latencies(log: Path) -> list[float]:
    """Return, from the canonical lines of fast clients, the seconds that were the daemon's own."""
    found = []
    for line in log.read_text(encoding="utf-8").splitlines():
        fields = json.loads(line) if line.startswith("{") else {}
        if fields.get("event") != "request" or not str(fields["request"]).startswith("fast-"):
            continue
        if fields.get("outcome") not in {"stop", "length"}:
            continue
        waits = sum(
            fields.get(name, 0.0) for name in ("acquire_s", "queue_s", "prefill_s", "decode_s")
        )
        found.append(max(0.0, fields["total_s"] - waits))
    return found


def report(tally: Tally, samples: list[tuple[int, int]], added: list[float]) -> bool:
    """Print the results; whether they are good."""
    for how, n_requests in sorted(tally.ended.items()):
        print(f"{n_requests:7d}  {how}")
    for failure, n_times in Counter(tally.failures).most_common(10):
        print(f"{n_times:7d}  FAILED {failure}")
    quarter = len(samples) // 4
    early = [
        statistics.median(column) for column in zip(*samples[quarter : 2 * quarter], strict=True)
    ]
    late = [statistics.median(column) for column in zip(*samples[-quarter:], strict=True)]
    print(f"memory: {early[0] / 1e6:.1f} MB in the second quarter, {late[0] / 1e6:.1f} in the last")
    print(f"files: {early[1]:.0f} in the second quarter, {late[1]:.0f} in the last")
    for name, values in (("first chunk", tally.first_chunk_s), ("added by the daemon", added)):
        cuts = statistics.quantiles(values, n=100)
        print(f"{name}: p50 {cuts[49] * 1e3:.1f} ms, p99 {cuts[98] * 1e3:.1f} ms of {len(values)}")
    has_grown = late[0] > early[0] * _MEMORY_SLACK or late[1] > early[1] + _FILES_SLACK
    return not tally.failures and not has_grown


def main() -> int:
    """Run the load and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=120.0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder) / "models"
        models.mkdir()
        write_chain(models / "endless.gguf", endless=True)
        flags = ("--n-slots", "16", "--n-ctx", "8192", "--max-queue", "1000")
        with running_daemon(Path(folder) / "home", models, *flags) as daemon:
            run = load(daemon, arguments.clients, arguments.seconds)
            tally, samples = asyncio.run(run)
            ran_s, waited_s = core_times(daemon)
            added = added_latencies(daemon.log)
    print(f"the daemon ran for {ran_s:.1f} s, and waited {waited_s:.1f} s for a core")
    return 0 if report(tally, samples, added) else 1


if __name__ == "__main__":
    sys.exit(main())
