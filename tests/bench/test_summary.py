"""Medians, means and deviations."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shimpy.bench.summary import summarize


@given(st.lists(st.floats(0.001, 1e6), min_size=2))
def test_a_summary_is_what_the_standard_library_says(samples: list[float]) -> None:
    summary = summarize(samples)
    assert min(samples) <= summary.median <= max(samples)
    assert math.isclose(summary.mean, statistics.fmean(samples))
    assert math.isclose(summary.deviation, statistics.stdev(samples))


def test_a_single_sample_does_not_deviate() -> None:
    assert summarize([3.0]).deviation == 0.0


def test_nothing_is_no_measurement() -> None:
    with pytest.raises(ValueError, match="nothing was measured"):
        summarize([])
