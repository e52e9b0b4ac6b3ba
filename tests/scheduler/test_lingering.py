"""What cards still show of workers that have gone."""

from __future__ import annotations

import pytest

from shimpy.placement.cards import CardSources
from shimpy.scheduler.lingering import LIMIT_S, Lingering
from shimpy.units import GIB, MIB
from tests.scheduler.test_overheads import Nvml


class Card:
    """A driver and a clock; memory comes back as time passes."""

    def __init__(self) -> None:
        self.nvml = Nvml({7: 9 * GIB, 8: 3 * GIB}, other_bytes=2 * GIB)
        self.now = 0.0
        # When the memory of processes that have gone comes back.
        self.back_at: dict[int, float] = {}
        self.lingering = Lingering(
            CardSources(nvml=lambda: self.nvml), clock=lambda: self.now, sleep=self._sleep
        )

    def _sleep(self, seconds: float) -> None:
        self.now += seconds
        for pid in [pid for pid, at in self.back_at.items() if at <= self.now]:
            del self.back_at[pid]
            self.nvml.other_bytes = max(0, self.nvml.other_bytes - 585 * MIB)

    def end(self, pid: int, *, back_after_s: float) -> None:
        """End a process; its buffers are free at once, its context later."""
        self.lingering.on_stop(pid)
        del self.nvml.processes[pid]
        self.nvml.other_bytes += 585 * MIB
        self.back_at[pid] = self.now + back_after_s
        self.lingering.on_exit(pid)


def test_it_waits_until_the_memory_is_back() -> None:
    card = Card()
    card.end(7, back_after_s=0.1)
    assert card.lingering.is_expected
    card.lingering.wait()
    assert 0.1 <= card.now < 0.2
    assert not card.lingering.is_expected


def test_of_two_that_go_together_both_are_waited_for() -> None:
    card = Card()
    card.lingering.on_stop(8)
    card.end(7, back_after_s=0.1)
    card.end(8, back_after_s=0.2)
    card.lingering.wait()
    assert 0.2 <= card.now < 0.3


def test_it_waits_no_longer_than_its_limit_where_others_take_it() -> None:
    card = Card()
    card.end(7, back_after_s=0.1)
    card.nvml.processes[99] = GIB
    card.lingering.wait()
    assert card.now == pytest.approx(LIMIT_S, abs=0.03)


def test_a_worker_that_still_stops_is_not_waited_for() -> None:
    card = Card()
    card.lingering.on_stop(7)
    assert not card.lingering.is_expected


def test_without_a_driver_or_its_list_of_processes_nothing_is_expected() -> None:
    card = Card()
    card.nvml.processes.clear()
    card.lingering.on_stop(7)
    card.lingering.on_exit(7)
    assert not card.lingering.is_expected
    card.nvml.is_broken = True
    card.lingering.on_stop(8)
    card.lingering.on_exit(8)
    assert not card.lingering.is_expected


def test_a_card_that_is_lost_meanwhile_is_not_waited_for() -> None:
    card = Card()
    card.end(7, back_after_s=9)
    card.nvml.is_broken = True
    card.lingering.wait()
    assert card.now == 0
