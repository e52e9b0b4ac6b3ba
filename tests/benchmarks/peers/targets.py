"""What each measurement has to show: a number, or a ratio to another contender's."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from tests.benchmarks.peers.report import US, Rounds, numbers_of, ratio_to, ratios_to

BARE = "bare"
# Medians of a few rounds of equal programs differ by so much.
NOISE = 0.03
# Fewer rounds have no quartiles to speak of.
_LEAST_TOLD = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A bound of shimpy's median; with `by`, of its ratio to that contender's."""

    metric: str
    bound: float
    at_least: bool
    by: str | None = None

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

    def _reaches(self, bound: float) -> bool:
        return self.found >= bound if self.target.at_least else self.found <= bound

    def __str__(self) -> str:
        """Return a line that says so."""
        found = f"{self.found:.3g}"
        if self.quartiles is not None:
            found += " ({:.3g} to {:.3g})".format(*self.quartiles)
        line = f"{'met' if self.is_met else 'MISSED'} {found} {self.work}: {self.target}"
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
        targets += [at_least("decode_per_s", 1 - NOISE, "bare")]
        targets += [at_least("prefill_per_s", 1 - NOISE, "bare")]
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
            bare, middle = _bare(target, rounds), statistics.median(found)
            yield Verdict(work, target, middle, bare=bare, quartiles=_quartiles(found))


def _quartiles(found: Sequence[float]) -> tuple[float, float] | None:
    if len(found) < _LEAST_TOLD:
        return None
    first, _, third = statistics.quantiles(found, n=4, method="inclusive")
    return first, third


def _bare(target: Target, rounds: Rounds) -> float | None:
    if target.by in {None, BARE}:
        return None
    return ratio_to(rounds, target.by, target.metric, of=BARE)


def summary(found: Sequence[Verdict]) -> str:
    """Return all of them, those that were missed last, and how many were met."""
    ordered = sorted(found, key=lambda verdict: (not verdict.is_met, not verdict.is_at_limit))
    count = f"{sum(verdict.is_met for verdict in found)} of {len(found)} targets are met"
    if n_at_limit := sum(verdict.is_at_limit for verdict in found):
        count += f"; in {n_at_limit} more shimpy is as good as the bare loop"
    return "\n".join([*map(str, ordered), count])
