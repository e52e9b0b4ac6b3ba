"""The times between the tokens of answers, counted for Prometheus.

prometheus_client's own Histogram takes longer over one observation than all else that is done
for a token; this one adds to two lists and is made into a metric when somebody asks.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterable
from itertools import accumulate
from typing import Final

from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

NAME: Final = "shimpy_inter_token_seconds"
# The upper bounds of the buckets, in seconds; one more holds what is above all.
BOUNDS_S: Final = (
    0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5,
)  # fmt: skip
_LABELS: Final = tuple(map(floatToGoString, (*BOUNDS_S, float("inf"))))


class TokenTimes(Collector):
    """A histogram for each model; it belongs to the event loop's thread."""

    def __init__(self) -> None:
        self._of: dict[str, _Times] = {}

    def observe(self, model: str, n_tokens: int, gap_s: float) -> None:
        """Count tokens that came together, so long after those before them."""
        times = self._of.get(model)
        if times is None:
            times = self._of[model] = _Times()
        times.total_s += gap_s
        times.counts[bisect_left(BOUNDS_S, gap_s / n_tokens)] += n_tokens

    def collect(self) -> Iterable[Metric]:
        """Return the histograms, as Prometheus has them: each bucket counts those below, too."""
        family = HistogramMetricFamily(
            NAME, "Between the tokens of one answer, as they reach the daemon.", labels=["model"]
        )
        for model, times in self._of.items():
            counts = map(float, accumulate(times.counts))
            family.add_metric([model], list(zip(_LABELS, counts, strict=True)), times.total_s)
            family.add_sample(f"{NAME}_created", {"model": model}, times.created_s)
        yield family


class _Times:
    """The counts of one model's buckets, the sum, and since when, in seconds."""

    __slots__ = ("counts", "created_s", "total_s")

    def __init__(self) -> None:
        self.counts = [0] * len(_LABELS)
        self.total_s = 0.0
        self.created_s = time.time()
