"""What Prometheus may read: counters and histograms of requests, gauges of what is loaded.

Made once by `daemon` with a registry of its own. Requests report themselves when they end; what
the scheduler holds is read when somebody asks, so that no gauge can go stale. Labels have few
values: routes as they are declared, never paths; models that exist, never names as they were
sent. No prompt, answer, key or address is ever in a metric.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

import shimpy
from shimpy.scheduler.reports import HistoryEvent, ResidentInfo
from shimpy.scheduler.scheduler import Scheduler
from shimpy.server.record import Record
from shimpy.server.token_times import TokenTimes

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# From a token of a small model on a card to a prompt of 100k tokens on a CPU.
_FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_LOAD_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600)
_TOTAL_S = (0.005, 0.025, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)

# llama.cpp's name for host memory.
_HOST = "CPU"
_UNLOADS = frozenset({"unload", "evict", "reload", "shrunk", "moved_up"})


class Metrics:
    """All metrics of one daemon; it belongs to the event loop's thread."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._registry = registry = CollectorRegistry()
        self._loading_since: dict[str, float] = {}
        Gauge("shimpy_info", "The version that runs.", ["version"], registry=registry).labels(
            shimpy.__version__
        ).set(1)
        self._requests = Counter(
            "shimpy_requests",
            "Requests that have ended, by route, status and outcome.",
            ["method", "route", "status", "outcome"],
            registry=registry,
        )
        self._request_s = Histogram(
            "shimpy_request_seconds",
            "From a request's head to the end of its answer.",
            ["route"],
            buckets=_TOTAL_S,
            registry=registry,
        )
        self._tokens = Counter(
            "shimpy_tokens",
            "Tokens of prompts that were computed (prompt) or reused (cached), and of answers.",
            ["model", "kind"],
            registry=registry,
        )
        self._first_token_s = Histogram(
            "shimpy_time_to_first_token_seconds",
            "From a request's arrival to its first token, loading and queueing included.",
            ["model"],
            buckets=_FIRST_TOKEN_S,
            registry=registry,
        )
        token_times = TokenTimes()
        registry.register(token_times)
        # Told of tokens that follow others: the model, how many came together, and the seconds
        # since those before them.
        self.on_tokens = token_times.observe
        self._load_s = Histogram(
            "shimpy_load_seconds",
            "From the start of a worker until its model is loaded.",
            ["model"],
            buckets=_LOAD_S,
            registry=registry,
        )
        self._loads = Counter(
            "shimpy_loads", "Loads by how they ended.", ["model", "result"], registry=registry
        )
        self._unloads = Counter(
            "shimpy_unloads",
            "Models unloaded, by why: evict (memory for another), reload, keep_alive, asked, ...",
            ["model", "reason"],
            registry=registry,
        )
        self._prefix_tokens = Counter(
            "shimpy_prefix_tokens",
            "Tokens of prompts whose KV cache was saved as a model was unloaded, or restored.",
            ["model", "kind"],
            registry=registry,
        )
        self._deaths = Counter(
            "shimpy_worker_deaths",
            "Workers that ended unasked, by the kind of their exit.",
            ["model", "reason"],
            registry=registry,
        )
        registry.register(_Residents(scheduler))
        ProcessCollector(registry=registry)

    def render(self) -> bytes:
        """Return everything in Prometheus' text format."""
        return generate_latest(self._registry)

    def on_request(self, *, method: str, route: str, record: Record, total_s: float) -> None:
        """Count a request that has ended; `route` is a route's pattern, not a path."""
        status = "none" if record.status is None else str(record.status)
        self._requests.labels(method, route, status, record.outcome or "done").inc()
        self._request_s.labels(route).observe(total_s)
        if record.model is None:
            return
        if record.first_token_s is not None:
            self._first_token_s.labels(record.model).observe(record.first_token_s)
        n_cached = record.n_cached or 0
        counts = {
            "prompt": (record.n_prompt or 0) - n_cached,
            "cached": n_cached,
            "generated": record.n_generated or 0,
        }
        for kind, n_tokens in counts.items():
            if n_tokens > 0:
                self._tokens.labels(record.model, kind).inc(n_tokens)

    def on_event(self, event: HistoryEvent) -> None:
        """Count what the scheduler did or met."""
        match event.kind:
            case "load":
                self._loading_since[event.model] = event.at_s
            case "ready":
                self._loads.labels(event.model, "ready").inc()
                since_s = self._loading_since.pop(event.model, None)
                if since_s is not None:
                    self._load_s.labels(event.model).observe(event.at_s - since_s)
            case "load_failed" | "retry":
                self._loads.labels(event.model, event.kind).inc()
            case "died":
                self._deaths.labels(event.model, event.cause).inc()
            case "saved" | "restored":
                self._prefix_tokens.labels(event.model, event.kind).inc(event.n_tokens)
            case _ if event.kind in _UNLOADS:
                self._unloads.labels(event.model, event.cause).inc()
            case _:
                pass

    async def follow(self, scheduler: Scheduler) -> None:
        """Count the scheduler's events, for ever."""
        async for event in scheduler.events():
            self.on_event(event)


class _Residents(Collector):
    """Gauges of what the scheduler holds at the moment of asking."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def collect(self) -> Iterable[Metric]:
        residents = self._scheduler.residents()
        waiting = self._scheduler.waiting()
        yield _gauge(
            "shimpy_queue_depth",
            "Requests that wait for a model.",
            ["model"],
            [
                *(((str(r.model.name),), r.n_waiting) for r in residents),
                *(((w.name,), w.n_waiting) for w in waiting),
            ],
        )
        yield _gauge(
            "shimpy_leases",
            "Requests that a loaded model serves.",
            ["model"],
            [((str(r.model.name),), r.n_leases) for r in residents],
        )
        yield _gauge(
            "shimpy_models_held_back",
            "1 for a model that is not loaded for now because its workers died.",
            ["model"],
            [((w.name,), 1) for w in waiting if w.held_until_s is not None],
        )
        yield _gauge(
            "shimpy_resident_state",
            "1 for each loaded model, with its state and where it was placed.",
            ["model", "state", "mode"],
            [((str(r.model.name), r.state, r.rung.placement.mode), 1) for r in residents],
        )
        yield _gauge(
            "shimpy_resident_bytes",
            "Memory of each loaded model by device: as predicted, and as it reported.",
            ["model", "device", "kind"],
            [sample for r in residents for sample in _memory(r)],
        )
        yield _gauge(
            "shimpy_experts_in_ram_layers",
            "Layers of each loaded model whose experts are in host memory beside a GPU.",
            ["model"],
            [((str(r.model.name),), r.rung.placement.moe_layers_in_ram) for r in residents],
        )


_Sample = tuple[tuple[str, ...], float]


def _memory(resident: ResidentInfo) -> list[_Sample]:
    name = str(resident.model.name)
    samples: list[_Sample] = [
        ((name, use.name, "predicted"), use.total_bytes) for use in resident.rung.devices
    ]
    samples.append(((name, _HOST, "predicted"), resident.rung.host.total_bytes))
    real: dict[str, int] = {}
    for use in resident.ready.memory if resident.ready is not None else ():
        taken = use.model_bytes + use.context_bytes + use.compute_bytes
        real[use.device] = real.get(use.device, 0) + taken
    return samples + [((name, device, "real"), taken) for device, taken in real.items()]


def _gauge(
    name: str, text: str, labels: Sequence[str], samples: Iterable[_Sample]
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=labels)
    # A model may be stopping and loading at once: one line for both.
    totals: dict[tuple[str, ...], float] = {}
    for values, number in samples:
        totals[values] = totals.get(values, 0) + number
    for values, number in totals.items():
        family.add_metric(list(values), number)
    return family
