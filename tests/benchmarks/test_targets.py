from __future__ import annotations

from tests.benchmarks.peers.targets import at_least, at_most, summary, verdicts

ROUNDS = [
    {"shimpy": {"ttft_ms": 10.0, "tok_per_s": 90.0}, "bare": {"tok_per_s": 100.0}},
    {"shimpy": {"ttft_ms": 30.0, "tok_per_s": 50.0}, "bare": {"tok_per_s": 40.0}},
    {"shimpy": {"ttft_ms": 20.0, "tok_per_s": 70.0}, "bare": {"tok_per_s": 70.0}},
]


def test_a_number_is_its_median_and_a_ratio_that_of_the_rounds() -> None:
    targets = at_most("ttft_ms", 20), at_most("ttft_ms", 19), at_least("tok_per_s", 1, "bare")
    found = list(verdicts("work", targets, ROUNDS))
    assert [(one.found, one.is_met) for one in found] == [(20, True), (20, False), (1, True)]


def test_who_was_not_there_is_no_target() -> None:
    assert not list(verdicts("work", [at_least("tok_per_s", 1, "xllamacpp")], ROUNDS))


def test_what_the_bare_loop_does_not_reach_is_no_target() -> None:
    numbers = {"bare": 125.0, "llama_cpp.server": 100.0}
    rounds = [{who: {"tok_per_s": n} for who, n in numbers.items()} for _ in range(3)]
    for shimpy, is_met in ((120, False), (122, True), (160, True)):
        for one in rounds:
            one["shimpy"] = {"tok_per_s": shimpy}
        (found,) = verdicts("work", [at_least("tok_per_s", 1.5, "llama_cpp.server")], rounds)
        assert found.is_met == is_met
        assert str(found).endswith("(the bare loop: 1.25)") == (shimpy < 150)


def test_what_was_missed_is_told_last() -> None:
    targets = at_least("tok_per_s", 1.5, "bare"), at_most("ttft_ms", 20)
    lines = summary(list(verdicts("work", targets, ROUNDS))).splitlines()
    assert lines == [
        "met 20 work: ttft_ms <= 20",
        "MISSED 1 work: tok_per_s by bare >= 1.5",
        "1 of 2 targets are met",
    ]
