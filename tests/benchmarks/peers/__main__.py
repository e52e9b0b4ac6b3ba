"""Measure shimpy beside its peers: `python -m tests.benchmarks.peers`.

Everything is on this machine and bounded in time. The table and what became of the targets go to
stdout, what happens meanwhile to stderr. Exit status 1: a target was missed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import signal
import sys
import tempfile
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.peers import report
from tests.benchmarks.peers.contenders import BareLoop, Contender, is_installed, start
from tests.benchmarks.peers.models import setup_of
from tests.benchmarks.peers.report import US
from tests.benchmarks.peers.scenarios import (
    ALL,
    MakePrompts,
    Scenario,
    all_scenarios,
    warm_up,
)
from tests.benchmarks.peers.systems import SYSTEMS, Place, System
from tests.benchmarks.peers.targets import Verdict, summary, verdicts

Result = dict[str, Any]
# Measures a contender: its name, the round's number.
_Run = Callable[[str, int], dict[str, float]]

_MOST_ROUNDS = 25


def main() -> int:
    """Parse the command line, measure, print the table; return the exit status."""
    arguments = _parse()
    # What was started ends with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    place = Place(arguments.folder, arguments.peers_python, arguments.threads)
    absent = [name for name in ALL if not is_installed(name, place.peers_python)]
    for name in absent:
        _say(f"{name} is left out: {place.peers_python} can't import it")
    present = [name for name in ALL if name not in {*absent, *arguments.without}]
    everything: list[Scenario | System] = [*all_scenarios(), *SYSTEMS]
    chosen = [one for one in everything if _is_chosen(one, arguments)]
    if not chosen:
        sys.exit(
            f"no scenario has {' or '.join(map(repr, arguments.only))} in its name: --list has all"
        )
    if arguments.list:
        print("\n".join(one.name for one in chosen))
        return 0
    bounds = _Bounds(arguments.rounds, fill_s=arguments.fill, budget_s=arguments.budget)
    measure = _Measure(place, present, bounds, arguments.starts)
    try:
        for _, group in itertools.groupby(chosen, key=lambda one: getattr(one, "model", None)):
            measure.group(list(group))
    finally:
        # Of what there was time for, where it was ended early.
        machine = {**report.machine_of(place.peers_python), "threads": str(place.n_threads)}
        found = _print_report(machine, measure.results, chosen)
        if arguments.json:
            report.save(arguments.json, machine, measure.results)
        if arguments.plots:
            report.plot(arguments.plots, measure.results)
    return 0 if all(verdict.is_green for verdict in found) else 1


def _print_report(
    machine: dict[str, str], results: dict[str, Result], chosen: Sequence[Scenario | System]
) -> list[Verdict]:
    """Print the table and the verdicts of what was measured; return these."""
    print("; ".join(f"{key}: {value}" for key, value in machine.items()) + "\n")
    print(report.table(results) + "\n")
    found = [
        verdict
        for one in chosen
        if one.name in results
        for verdict in verdicts(one.name, one.targets, results[one.name]["rounds"])
    ]
    print(summary(found), flush=True)
    return found


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.peers", description=__doc__)
    parser.add_argument("--only", nargs="*", default=[], metavar="TEXT", help="names that hold it")
    # The bare loop makes the prompts.
    peers = [name for name in ALL if name != "bare"]
    parser.add_argument("--without", nargs="*", default=[], choices=peers, help="contenders")
    parser.add_argument("--quick", action="store_true", help="fewer kinds of work")
    parser.add_argument("--list", action="store_true", help="print the names of the scenarios")
    parser.add_argument("--rounds", type=int, default=5, help="at least")
    parser.add_argument(
        "--starts", type=_positive, default=3, metavar="N", help="of all contenders, between rounds"
    )
    parser.add_argument(
        "--fill", type=float, default=60, metavar="S", help="more rounds of what takes less"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--budget",
        type=float,
        default=60,
        metavar="S",
        help="no new round of a scenario for a contender that took so long",
    )
    parser.add_argument(
        "--peers-python", default=sys.executable, metavar="PATH", help="has the extra `peers`"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path(tempfile.gettempdir()) / "shimpy-peers",
        help="where the models are written, once",
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="needs matplotlib")
    return parser.parse_args()


def _positive(text: str) -> int:
    """Return a number of 1 or more: with none nothing would be measured, and nothing missed."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"it must be a whole number from 1 on, not {text!r}")
    return int(text)


def _is_chosen(one: Scenario | System, arguments: argparse.Namespace) -> bool:
    if arguments.quick and not one.is_quick:
        return False
    return not arguments.only or any(text in one.name for text in arguments.only)


@dataclass(frozen=True, slots=True)
class _Bounds:
    """How many rounds a scenario gets: so many, more within `fill_s`.

    Each contender has `budget_s` for it: who is slow sits out the last ones. When shimpy's is used
    up they end.
    """

    n_rounds: float
    fill_s: float
    budget_s: float
    n_most: float = _MOST_ROUNDS

    def has_another(self, n_done: int, took_s: Mapping[str, float]) -> bool:
        # Where shimpy is left out, whoever was quickest.
        leader_s = took_s.get(US, min(took_s.values(), default=0.0))
        if n_done >= self.n_most or leader_s > self.budget_s:
            return False
        return n_done < self.n_rounds or sum(took_s.values()) <= self.fill_s

    def has_time(self, name: str, took_s: Mapping[str, float]) -> bool:
        return took_s.get(name, 0.0) <= self.budget_s

    def part(self, share: float) -> _Bounds:
        """Return the bounds of a share of it all."""
        return _Bounds(
            share * self.n_rounds, share * self.fill_s, share * self.budget_s, share * self.n_most
        )


class _Measure:
    """Runs the rounds and keeps what they gave."""

    def __init__(
        self, place: Place, present: Sequence[str], bounds: _Bounds, n_starts: int
    ) -> None:
        self._place = place
        self._present = present
        self._bounds = bounds
        self._n_starts = n_starts
        # Of each scenario, by contender.
        self._took_s: defaultdict[str, dict[str, float]] = defaultdict(dict)
        self.results: dict[str, Result] = {}

    def group(self, group: Sequence[Scenario | System]) -> None:
        """Measure scenarios of one model, with all contenders started; or whole programs.

        Where its memory lies makes a process up to 7 % slower or quicker than the next one of the
        same program, for all of its life. So the rounds are divided among several of each.
        """
        scenarios = [one for one in group if isinstance(one, Scenario)]
        for start_index in range(self._n_starts if scenarios else 0):
            bounds = self._bounds.part((start_index + 1) / self._n_starts)
            left = [one for one in scenarios if self._has_another(one, bounds)]
            if not left:
                continue
            with self._started(left[0].model, left) as contenders:
                for scenario in left:
                    self._run(scenario, contenders, bounds)
        for system in group:
            if isinstance(system, System):
                self._run_system(system)

    @contextlib.contextmanager
    def _started(self, model: str, scenarios: Sequence[Scenario]) -> Iterator[dict[str, Contender]]:
        setup = setup_of(model, self._place.folder, self._place.n_threads)
        needed = {name for one in scenarios for name in one.contenders}
        with contextlib.ExitStack() as stack:
            contenders: dict[str, Contender] = {}
            for name in self._present:
                # The bare loop also makes the prompts.
                if name in needed or (name == "bare" and not setup.embeds):
                    _say(f"{model}: {name} starts")
                    contender = stack.enter_context(start(name, setup, self._place.peers_python))
                    contenders[name] = contender
                    bare = contenders.get("bare")
                    make_prompts = None if bare is None else _prompts_of(bare)
                    asyncio.run(warm_up(contender, setup, make_prompts))
            yield contenders

    def _run(self, scenario: Scenario, contenders: dict[str, Contender], bounds: _Bounds) -> None:
        make_prompts = _prompts_of(contenders.get("bare"))

        def measure(name: str, index: int) -> dict[str, float]:
            # No two scenarios and no two rounds share a prompt, which a cache would have.
            seed = zlib.crc32(f"{scenario.name} {index}".encode())
            return asyncio.run(scenario.run(contenders[name], make_prompts, seed))

        names = [name for name in scenario.contenders if name in contenders]
        self._rounds_of(scenario, names, measure, bounds)

    def _run_system(self, system: System) -> None:
        names = [name for name in system.contenders if name in self._present]

        def measure(name: str, index: int) -> dict[str, float]:
            return system.run(name, self._place)

        self._rounds_of(system, names, measure, self._bounds)

    def _rounds_of(
        self, one: Scenario | System, names: Sequence[str], measure: _Run, bounds: _Bounds
    ) -> None:
        took_s = self._took_s[one.name]
        while self._has_another(one, bounds):
            result = self.results.get(one.name, {"headline": list(one.headline), "rounds": []})
            found, index = {}, len(result["rounds"])
            # Each is the first one now and then: a warm cache helps whoever comes later.
            turn = index % len(names) if names else 0
            for name in [*names[turn:], *names[:turn]]:
                if not bounds.has_time(name, took_s):
                    continue
                started_s = time.monotonic()
                found[name] = measure(name, index)
                took_s[name] = took_s.get(name, 0.0) + time.monotonic() - started_s
                _say(f"{one.name} [{index}] {name}: {_short(found[name])}")
            result["rounds"].append(found)
            self.results[one.name] = result

    def _has_another(self, one: Scenario | System, bounds: _Bounds) -> bool:
        result = self.results.get(one.name)
        n_done = 0 if result is None else len(result["rounds"])
        return bounds.has_another(n_done, self._took_s[one.name])


def _prompts_of(bare: Contender | None) -> MakePrompts:
    """Return what makes prompts of so many tokens; asked for none, it needs no bare loop."""

    def make_prompts(n_prompts: int, n_tokens: int, seed: int) -> list[str]:
        assert isinstance(bare, BareLoop)
        found: list[str] = bare.ask(
            do="make_prompts", n_prompts=n_prompts, n_tokens=n_tokens, seed=seed
        )
        return found

    return make_prompts


def _short(metrics: dict[str, float]) -> str:
    return ", ".join(f"{key} {value:.4g}" for key, value in metrics.items())


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
