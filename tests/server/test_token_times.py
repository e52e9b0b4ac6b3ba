"""Times between tokens, as Prometheus reads them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from shimpy.server.token_times import BOUNDS_S, NAME, TokenTimes

TEXT = "Between the tokens of one answer, as they reach the daemon."


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a:latest", "b:latest"]),
            st.integers(1, 4),
            st.one_of(st.sampled_from(BOUNDS_S), st.floats(0, 10)),
        )
    )
)
def test_it_says_what_prometheus_own_histogram_says(seen: list[tuple[str, int, float]]) -> None:
    """Dashboards must not see that the counting is done elsewhere."""
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    times = TokenTimes()
    ours.register(times)
    histogram = Histogram(NAME, TEXT, ["model"], buckets=BOUNDS_S, registry=theirs)
    for model, n_tokens, gap_s in seen:
        times.observe(model, n_tokens, gap_s)
        for _ in range(n_tokens):
            histogram.labels(model).observe(gap_s / n_tokens)
    assert _lines(ours) == _lines(theirs)


def _lines(registry: CollectorRegistry) -> list[str]:
    """What is told, with rounded sums and without the time of the start."""
    lines = []
    for line in generate_latest(registry).decode().splitlines():
        name, _, number = line.rpartition(" ")
        if "_sum{" in line:
            lines.append(f"{name} {float(number):.6f}")
        else:
            lines.append(name if "_created{" in line else line)
    return lines
