"""When idle caches are copied to RAM, when they leave the KV cache, and who has to wait."""

from __future__ import annotations

from array import array
from typing import Any

import pytest

from shimpy.engine.admission import Restore
from shimpy.engine.batcher import Batch
from shimpy.engine.parker import Park
from shimpy.engine.parking import PATIENCE, SHARE, Parking
from shimpy.engine.prefixes import MIN_PARKED, SavedPrefix, SavedPrefixes
from shimpy.engine.sequence import ATTENDED_CELLS, Sequence
from tests.engine.test_batcher import Bench


class Parker(Bench):
    """Carries out copies and restores too, as a store in RAM would that always has room."""

    def __init__(self, **shape: Any) -> None:
        self.saved = SavedPrefixes(**{"whole": False, **shape.pop("saved", {})})
        shape = {"attends_idle": True, "can_park": True, **shape}
        super().__init__(saved=self.saved, **shape)
        self.copy_s = 0.0
        self.has_room = True
        # What was done before batches: the tokens that were copied, and those that came back.
        self.parked: list[int] = []
        self.restored: list[int] = []

    def plan(self) -> Batch:
        while not isinstance(work := self.batcher.next_batch(self.now), Batch):
            self.carry_out(work)
        return work

    def rest(self) -> None:
        batcher = self.batcher
        while batcher.quiet_s is not None and (park := batcher.next_copy()) is not None:
            self.carry_out(park)

    def carry_out(self, work: Park | Restore | None) -> None:
        if isinstance(work, Restore):
            self.restored.append(len(work.prefix.tokens))
            self.batcher.on_restored(work)
            return
        assert isinstance(work, Park)
        self.parked.append(len(work.tokens))
        for prefix in work.covers:
            self.saved.discard(prefix.name)
        if self.has_room:
            name = f"parked {len(self.parked)}"
            prefix = SavedPrefix(name, array("i", work.tokens), 0, is_parked=True)
            self.saved.add(prefix)
        self.batcher.on_parked(work, self.copy_s, is_kept=self.has_room)

    def answer(self, n_tokens: int | list[int], n_predict: int = 1) -> Sequence:
        """Run a prompt to its end; return it."""
        if isinstance(n_tokens, list):
            sequence = self.submit_tokens(n_tokens, n_predict=n_predict)
        else:
            sequence = self.submit(n_tokens, n_predict=n_predict)
        self.run()
        return sequence


def test_what_idles_leaves_the_cache_as_another_prompt_comes() -> None:
    bench = Parker()
    for _ in range(3):
        bench.answer(900)
    assert bench.parked == [900, 900]
    assert bench.batcher.n_kv_used == 900


def test_in_a_quiet_moment_it_is_copied_and_stays() -> None:
    """Who goes on from it then restores nothing; who does not waits for no copy."""
    bench = Parker()
    first = bench.answer(900)
    bench.rest()
    assert (bench.parked, bench.batcher.n_kv_used) == ([900], 900)
    assert bench.batcher.quiet_s is None
    again = bench.answer([*first.tokens, 1, 2])
    assert (again.n_cached, bench.restored) == (900, [])
    bench.rest()
    bench.copy_s = 1e9
    bench.answer(50)
    assert (bench.parked, bench.batcher.n_kv_used) == ([900], 50)


def own_cells(n_slots: int) -> Parker:
    """Return a bench where what idle slots hold costs nobody anything."""
    return Parker(n_slots=n_slots, n_ctx=n_slots * 1024, kv_unified=False, attends_idle=False)


def burst(bench: Parker, n: int) -> list[Sequence]:
    """Run so many prompts side by side; return them."""
    bench.now += 1
    sequences = [bench.submit(60 + i, n_predict=3) for i in range(n)]
    bench.run()
    return sequences


def test_as_many_slots_are_ready_for_others_as_prompts_came() -> None:
    """Else the last of the next burst would wait for all copies."""
    bench = own_cells(8)
    burst(bench, 8)
    bench.rest()
    assert len(bench.parked) == 8
    bench.copy_s = 1e9
    burst(bench, 8)
    assert len(bench.parked) == 8


def test_of_prompts_that_come_one_by_one_a_slot_is_ready() -> None:
    bench = own_cells(3)
    for n_parked in (0, 0, 1, 2, 3):
        bench.now += 1
        bench.answer(80)
        bench.rest()
        assert len(bench.parked) == n_parked


def test_a_burst_is_expected_for_some_time() -> None:
    """One fewer after each prompt that comes by itself; what is copied already is ready."""
    bench = own_cells(8)
    burst(bench, 8)
    n_parked = []
    for _ in range(8):
        bench.rest()
        n_parked.append(len(bench.parked))
        bench.now += 1
        bench.answer(80)
    assert n_parked == [8, *([9] * 7)]


def test_who_came_while_another_waits_for_a_copy_is_in_the_next_batch() -> None:
    """As many run as in the last step, and nobody waits any more; but one of them is another."""
    bench = own_cells(4)
    bench.answer(80)
    stays, leaves = bench.submit(60), bench.submit(61)
    for _ in range(4):
        bench.step()
    bench.batcher.finish(leaves)
    comes, is_cancelled = bench.submit(62), bench.submit(63)
    park = bench.batcher.next_batch(bench.now)
    assert isinstance(park, Park)
    assert comes.slot is not None
    bench.batcher.finish(is_cancelled)
    bench.carry_out(park)
    for _ in range(3):
        assert leaves not in bench.step()
    assert comes.n_generated
    assert stays.n_generated > comes.n_generated


def test_slots_that_hold_nothing_are_ready() -> None:
    bench = own_cells(8)
    burst(bench, 4)
    bench.rest()
    assert bench.parked == []
    burst(bench, 3)
    bench.rest()
    # One was empty still, and the three that were used first: four came before.
    assert bench.parked == [62, 63, 64]


def test_whoever_comes_back_after_a_burst_goes_on_in_its_slot() -> None:
    bench = own_cells(4)
    chats = burst(bench, 4)
    bench.rest()
    for chat in chats:
        again = bench.answer([*chat.tokens, 7])
        assert again.n_cached == chat.n_prompt + 2
    assert bench.restored == []


def test_what_was_parked_comes_back_for_who_goes_on_from_it() -> None:
    bench = Parker()
    chats = [bench.answer(600) for _ in range(6)]
    for chat in chats:
        again = bench.answer([*chat.tokens, 7, 8])
        assert again.n_cached == 600
    # The last one was in its slot still, and the first was copied before it.
    assert len(bench.restored) == 6


def test_a_longer_copy_takes_the_place_of_its_beginning() -> None:
    bench = Parker()
    first = bench.answer(600)
    bench.rest()
    bench.answer([*first.tokens, *range(40)])
    bench.rest()
    assert [len(prefix.tokens) for prefix in bench.saved] == [641]


def test_a_few_tokens_are_dropped_without_a_copy() -> None:
    bench = Parker()
    bench.answer(MIN_PARKED - 1)
    bench.answer(MIN_PARKED)
    bench.answer(4 * ATTENDED_CELLS)
    assert bench.parked == [MIN_PARKED]


def test_no_first_token_waits_for_a_copy_that_makes_it_no_sooner() -> None:
    """Of 256 cells that are attended to, 100 are the prompt's and 150 idle."""
    bench = Parker()
    bench.answer(150)
    bench.submit(100, n_predict=4)
    bench.step()
    assert bench.parked == []
    bench.step()
    assert bench.parked == [150]


def test_what_is_on_disk_is_dropped_without_a_copy() -> None:
    bench = Parker()
    first = bench.answer(900)
    bench.saved.add(SavedPrefix("a", array("i", first.tokens), 0))
    bench.answer(50)
    assert (bench.parked, bench.batcher.n_kv_used) == ([], 50)
    assert bench.answer([*first.tokens[:900], 1]).n_cached == 900


def test_what_the_next_in_the_queue_goes_on_from_stays() -> None:
    bench = Parker()
    first, second = bench.answer(900), bench.answer(800)
    bench.parked.clear()
    bench.submit_tokens([*second.tokens, 1])
    bench.submit_tokens([*first.tokens, 1])
    bench.step()
    bench.step()
    assert (bench.parked, bench.restored) == ([], [900])


def test_copies_beside_streams_take_no_more_than_their_share() -> None:
    """What they have to wait for stays in the cache until then."""
    bench = Parker(n_slots=8)
    stream = bench.submit(1)
    bench.copy_s = 0.05
    for _ in range(4):
        bench.submit(200, n_predict=1)
    n_steps = 0
    while len(bench.parked) < 4:
        bench.batcher.on_decoded(batch := bench.plan())
        bench.batcher.on_timed(batch, 0.1)
        for sequence in batch.sequences:
            if sequence is not stream and not sequence.n_pending:
                bench.batcher.finish(sequence)
            elif not sequence.n_pending:
                bench.batcher.on_token(sequence, 9)
        n_steps += 1
        assert n_steps < 1000
    assert n_steps * 0.1 * SHARE >= 3 * 0.05
    bench.plan()
    assert bench.batcher.n_kv_used <= stream.n_kv


def test_without_room_for_a_copy_the_newest_stays() -> None:
    bench = Parker()
    bench.has_room = False
    for _ in range(3):
        bench.answer(900)
    assert bench.batcher.n_kv_used == 2 * 900
    bench.rest()
    assert bench.batcher.quiet_s is None or bench.batcher.next_copy() is None


def test_a_window_is_copied_as_its_slot_is_emptied_and_from_its_prompt_on() -> None:
    """Its state serves whole or not at all, and the next prompt may tell the answer otherwise."""
    bench = Parker(saved={"whole": True})
    first = bench.answer(600, n_predict=50)
    bench.rest()
    assert bench.parked == []
    bench.answer(50)
    assert bench.parked == [599]
    assert bench.answer([*first.tokens[:600], 4, 6]).n_cached == 599


def test_a_slot_that_is_wanted_is_copied_even_when_copies_took_long() -> None:
    """But of an answer whose cells lie between others' only the prompt."""
    bench = Parker(n_slots=2)
    first, second = bench.submit(200, n_predict=60), bench.submit(200, n_predict=60)
    bench.run()
    bench.copy_s = 1e9
    long = bench.submit(400, n_predict=5)
    bench.submit(300, n_predict=5)
    bench.step()
    # The first one while copies were free, and the second when its slot was wanted.
    assert bench.parked == [259, 200]
    bench.copy_s = 0.0
    while long.slot is not None:
        bench.step()
    assert bench.answer([*first.tokens, 1]).n_cached == 200
    assert bench.answer([*second.tokens, 1]).n_cached == 259


@pytest.mark.parametrize(("attends_idle", "can_park"), [(True, False), (False, True)])
def test_nothing_is_parked_where_it_gains_nothing_or_can_t_be(
    attends_idle: bool, can_park: bool
) -> None:
    bench = Bench(attends_idle=attends_idle, can_park=can_park)
    for _ in range(3):
        bench.now += 1
        bench.submit(900, n_predict=1)
        bench.step()
        bench.step()
        assert bench.batcher.quiet_s is None


def test_a_debt_is_paid_by_batches_and_forgiven_by_quiet() -> None:
    parking = Parking()
    assert parking.is_due(0, 100)
    parking.on_copy(0.1)
    assert not parking.is_due(0, 100)
    parking.on_batch(0.1 / SHARE - 1, 0)
    assert not parking.is_due(0, 100)
    parking.on_batch(1.1, 0)
    assert parking.is_due(0, 100)
    parking.on_copy(9.0)
    parking.on_quiet()
    assert parking.is_due(0, 100)


def test_a_copy_waits_for_ten_times_as_long_as_it_takes() -> None:
    parking = Parking()
    unknown_s = parking.quiet_s(1000)
    parking.on_copy(9.0)
    assert parking.quiet_s(1000) == unknown_s
    parking.on_kept(500, 0.02)
    assert parking.quiet_s(1000) == pytest.approx(PATIENCE * 0.04)
    # A client that goes on at once has a moment, and long chats are copied some time.
    assert 0 < parking.quiet_s(1) == parking.quiet_s(2)
    assert parking.quiet_s(10**6) == parking.quiet_s(10**7)


def test_copies_that_came_to_nothing_tell_nothing() -> None:
    bench = Parker()
    bench.has_room, bench.copy_s = False, 1e-9
    bench.answer(900)
    unknown_s = bench.batcher.quiet_s
    bench.rest()
    bench.answer(900)
    assert bench.batcher.quiet_s == unknown_s is not None


def test_long_prompts_to_come_pay_in_advance() -> None:
    """A token takes 2 ms, and a fortieth more beside 100 idle cells."""
    parking = Parking()
    parking.on_batch(1.0, 500)
    parking.on_copy(0.1)
    assert not parking.is_due(1900, 100)
    assert parking.is_due(2100, 100)
    assert parking.is_due(1100, 200)


def test_where_many_prompts_come_most_is_copied_before_them() -> None:
    """They take 2 s, and an eighth more beside 480 idle cells."""
    bench = Parker(n_slots=16)
    for _ in range(8):
        bench.submit(60, n_predict=1)
    bench.step()
    bench.copy_s = 0.1
    for _ in range(8):
        bench.submit(256)
    bench.step()
    assert bench.parked == [60] * 3


def test_streams_get_a_batch_between_two_copies() -> None:
    bench = Parker(n_slots=16)
    bench.submit(60)
    for _ in range(4):
        bench.submit(60, n_predict=1)
    bench.step()
    for n_parked in (1, 2, 3):
        bench.step()
        assert len(bench.parked) == n_parked
