"""Samples and what they come to. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

import msgspec


class Summary(msgspec.Struct, frozen=True):
    """Repeated measurements of one thing, in its unit; at least one."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one: a disturbance does not move it."""
        return statistics.median(self.samples)

    @property
    def mean(self) -> float:
        """The average."""
        return statistics.fmean(self.samples)

    @property
    def deviation(self) -> float:
        """The standard deviation of the samples (n - 1); 0 for a single one."""
        return statistics.stdev(self.samples) if len(self.samples) > 1 else 0.0


def summarize(samples: Iterable[float]) -> Summary:
    """Return the summary of some samples.

    Raises:
        ValueError: there are none.
    """
    found = tuple(samples)
    if not found:
        raise ValueError("nothing was measured")
    return Summary(found)
