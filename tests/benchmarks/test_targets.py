from __future__ import annotations

import pytest

from tests.benchmarks.peers.targets import (
    Target,
    Verdict,
    at_least,
    at_most,
    of_streams,
    summary,
    verdicts,
)

ROUNDS = [
    {"shimpy": {"ttft_ms": 10.0, "tok_per_s": 90.0}, "bare": {"tok_per_s": 100.0}},
    {"shimpy": {"ttft_ms": 30.0, "tok_per_s": 50.0}, "bare": {"tok_per_s": 40.0}},
    {"shimpy": {"ttft_ms": 20.0, "tok_per_s": 70.0}, "bare": {"tok_per_s": 70.0}},
]


def test_a_number_is_its_median_and_a_ratio_that_of_the_rounds() -> None:
    targets = at_most("ttft_ms", 20), at_most("ttft_ms", 19), at_least("tok_per_s", 1, "bare")
    found = list(verdicts("work", targets, ROUNDS))
    assert [(one.found, one.is_met) for one in found] == [(20, True), (20, False), (1, True)]


def test_where_rounds_are_many_it_is_told_how_far_they_differ() -> None:
    rounds = [{"shimpy": {"n": float(n)}} for n in (50, 10, 40, 20, 30)]
    (found,) = verdicts("work", [at_most("n", 35)], rounds)
    assert str(found) == "met 30 (20 to 40) work: n <= 35"


def test_who_was_not_there_is_no_target() -> None:
    assert not list(verdicts("work", [at_least("tok_per_s", 1, "xllamacpp")], ROUNDS))


@pytest.mark.parametrize(
    ("target", "shimpy", "end"),
    [
        (at_least("tok_per_s", 1.5, "llama_cpp.server"), 120, "(the bare loop: 1.25)"),
        (at_least("tok_per_s", 1.5, "llama_cpp.server"), 122, "(as good as the bare loop: 1.25)"),
        (at_least("tok_per_s", 1.5, "llama_cpp.server"), 149, "(as good as the bare loop: 1.25)"),
        (at_least("tok_per_s", 1.5, "llama_cpp.server"), 150, ">= 1.5"),
        (at_most("tok_per_s", 0.5, "llama_cpp.server"), 129, "(the bare loop: 1.25)"),
        (at_most("tok_per_s", 0.5, "llama_cpp.server"), 128, "(as good as the bare loop: 1.25)"),
        (at_most("tok_per_s", 0.5, "llama_cpp.server"), 50, "<= 0.5"),
    ],
)
def test_to_be_as_good_as_the_bare_loop_is_told_but_meets_nothing(
    target: Target, shimpy: float, end: str
) -> None:
    numbers = {"shimpy": shimpy, "bare": 125.0, "llama_cpp.server": 100.0}
    rounds = [{who: {"tok_per_s": n} for who, n in numbers.items()}]
    (found,) = verdicts("work", [target], rounds)
    assert found.is_met == end.endswith(f" {target.bound}")
    assert found.is_at_limit == end.startswith("(as good")
    assert str(found).startswith("met" if found.is_met else "MISSED")
    assert str(found).endswith(end)


@pytest.mark.parametrize(
    ("prefill_ms", "word"), [(9.2, "met"), (10.4, "within"), (10.5, "within"), (10.6, "MISSED")]
)
def test_of_short_work_the_daemon_may_add_a_moment(prefill_ms: float, word: str) -> None:
    numbers = {"shimpy": prefill_ms, "bare": 9.0}
    rounds = [{who: {"prefill_per_s": 32e3 / n, "prefill_ms": n} for who, n in numbers.items()}]
    targets = [one for one in of_streams(1) if one.metric == "prefill_per_s"]
    (found,) = verdicts("work", targets, rounds)
    assert str(found).startswith(f"{word} ")
    assert (found.is_met, found.is_within) == (word == "met", word == "within")
    assert found.is_green == (word != "MISSED")
    if word != "met":
        assert str(found).endswith(f"({prefill_ms - 9:.2f} ms more; 1.5 may be added)")


def test_of_long_work_a_moment_is_no_excuse() -> None:
    numbers = {"shimpy": 1040.0, "bare": 1000.0}
    rounds = [{who: {"prefill_per_s": 1e6 / n, "prefill_ms": n} for who, n in numbers.items()}]
    targets = [one for one in of_streams(8) if one.metric == "prefill_per_s"]
    (found,) = verdicts("work", targets, rounds)
    assert not found.is_green


def test_what_was_missed_is_told_last() -> None:
    targets = at_least("tok_per_s", 1.5, "bare"), at_most("ttft_ms", 20)
    lines = summary(list(verdicts("work", targets, ROUNDS))).splitlines()
    assert lines == [
        "met 20 work: ttft_ms <= 20",
        "MISSED 1 work: tok_per_s by bare >= 1.5",
        "1 of 2 targets are met",
    ]


def test_what_was_missed_with_the_bare_loop_is_counted_by_itself() -> None:
    target = at_least("tok_per_s", 1.5, "xllamacpp")
    found = [Verdict("work", target, n, bare=1.25) for n in (1.0, 1.25, 1.5, 1.3)]
    assert summary(found).splitlines() == [
        "met 1.5 work: tok_per_s by xllamacpp >= 1.5",
        "MISSED 1.25 work: tok_per_s by xllamacpp >= 1.5 (as good as the bare loop: 1.25)",
        "MISSED 1.3 work: tok_per_s by xllamacpp >= 1.5 (as good as the bare loop: 1.25)",
        "MISSED 1 work: tok_per_s by xllamacpp >= 1.5 (the bare loop: 1.25)",
        "1 of 4 targets are met; in 2 more shimpy is as good as the bare loop",
    ]
