"""What each measurement has to show: a number, or a ratio to another contender's."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from tests.benchmarks.peers.report import (
    US,
    Rounds,
    differences_to,
    numbers_of,
    ratio_to,
    ratios_to,
)

BARE = "bare"
# Medians of a few rounds of equal programs differ by so much.
NOISE = 0.03
# What the daemon may add to a time to a first token: of a prompt of 9 ms it is a sixth.
ADDED_MS = 1.5
# Fewer rounds have no quartiles to speak of.
_LEAST_TOLD = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A bound of shimpy's median; with `by`, of its ratio to that contender's.

    `or_added`: a time in ms of the same work. Where shimpy's is no more than ADDED_MS over that
    contender's, the ratio tells how short the work is.
    """

    metric: str
    bound: float
    at_least: bool
    by: str | None = None
    or_added: str | None = None

    def __str__(self) -> str:
        """Return the target as the verdict has it."""
        sign = ">=" if self.at_least else "<="
        return f"{self.metric}{f' by {self.by}' if self.by else ''} {sign} {self.bound:g}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a target came to.

    llama.cpp itself may not reach a bound on the machine, as the bare loop shows. It is missed all
    the same, and told apart from those where shimpy falls behind.
    """

    work: str
    target: Target
    found: float
    # The bare loop's own, where it is none of the two.
    bare: float | None = None
    # Half of the rounds lie between these; None: too few to tell.
    quartiles: tuple[float, float] | None = None
    # What shimpy's time is over the contender's, where the target asks for it.
    added_ms: float | None = None

    @property
    def is_met(self) -> bool:
        """Whether the bound holds."""
        return self._reaches(self.target.bound)

    @property
    def is_at_limit(self) -> bool:
        """Whether the bound is missed, but shimpy is as good as the bare loop, less noise."""
        if self.is_met or self.bare is None:
            return False
        return self._reaches(self.bare * (1 - NOISE if self.target.at_least else 1 + NOISE))

    @property
    def is_within(self) -> bool:
        """Whether the bound is missed by no more than the daemon may add to any work."""
        return not self.is_met and self.added_ms is not None and self.added_ms <= ADDED_MS

    @property
    def is_green(self) -> bool:
        """Whether there is nothing to mend."""
        return self.is_met or self.is_within

    def _reaches(self, bound: float) -> bool:
        return self.found >= bound if self.target.at_least else self.found <= bound

    def __str__(self) -> str:
        """Return a line that says so."""
        found = f"{self.found:.3g}"
        if self.quartiles is not None:
            found += " ({:.3g} to {:.3g})".format(*self.quartiles)
        word = "met" if self.is_met else "within" if self.is_within else "MISSED"
        line = f"{word} {found} {self.work}: {self.target}"
        if not self.is_met and self.added_ms is not None:
            return f"{line} ({self.added_ms:.2f} ms more; {ADDED_MS:g} may be added)"
        if self.is_met or self.bare is None:
            return line
        return f"{line} ({'as good as ' if self.is_at_limit else ''}the bare loop: {self.bare:.3g})"


def at_least(metric: str, bound: float, by: str | None = None) -> Target:
    """Return a target that a number, or ratio, reaches."""
    return Target(metric=metric, bound=bound, at_least=True, by=by)


def at_most(metric: str, bound: float, by: str | None = None) -> Target:
    """Return a target that a number, or ratio, stays below."""
    return Target(metric=metric, bound=bound, at_least=False, by=by)


def of_streams(n_streams: int) -> tuple[Target, ...]:
    """Return what is wanted of answers that are asked for at once."""
    targets = [
        at_least("tok_per_s", 1 - NOISE, "xllamacpp"),
        at_most("ttft_ms", 1 + NOISE, "xllamacpp"),
    ]
    if n_streams in {1, 8}:
        targets += [at_least("decode_per_s", 1 - NOISE, BARE)]
        prefill = at_least("prefill_per_s", 1 - NOISE, BARE)
        targets += [replace(prefill, or_added="prefill_ms")]
    if n_streams == 8:
        targets += [at_least("tok_per_s", 1.5, "llama_cpp.server")]
        targets += [at_most("ttft_ms", 0.5, "llama_cpp.server")]
    return tuple(targets)


def verdicts(work: str, targets: Iterable[Target], rounds: Rounds) -> Iterator[Verdict]:
    """Yield what the targets came to, but for contenders that were not there."""
    for target in targets:
        if target.by is None:
            found = numbers_of(rounds, US, target.metric)
        else:
            found = ratios_to(rounds, target.by, target.metric)
        if found:
            yield Verdict(
                work,
                target,
                statistics.median(found),
                bare=_bare(target, rounds),
                quartiles=_quartiles(found),
                added_ms=_added_ms(target, rounds),
            )


def _quartiles(found: Sequence[float]) -> tuple[float, float] | None:
    if len(found) < _LEAST_TOLD:
        return None
    first, _, third = statistics.quantiles(found, n=4, method="inclusive")
    return first, third


def _added_ms(target: Target, rounds: Rounds) -> float | None:
    if target.or_added is None or target.by is None:
        return None
    found = differences_to(rounds, target.by, target.or_added)
    return statistics.median(found) if found else None


def _bare(target: Target, rounds: Rounds) -> float | None:
    if target.by in {None, BARE}:
        return None
    return ratio_to(rounds, target.by, target.metric, of=BARE)


def summary(found: Sequence[Verdict]) -> str:
    """Return all of them, those that were missed last, and how many were met."""
    ordered = sorted(
        found, key=lambda one: (not one.is_met, not one.is_within, not one.is_at_limit)
    )
    count = f"{sum(verdict.is_met for verdict in found)} of {len(found)} targets are met"
    if n_within := sum(verdict.is_within for verdict in found):
        count += f"; in {n_within} more shimpy adds no more than {ADDED_MS:g} ms"
    if n_at_limit := sum(verdict.is_at_limit for verdict in found):
        count += f"; in {n_at_limit} more shimpy is as good as the bare loop"
    return "\n".join([*map(str, ordered), count])
