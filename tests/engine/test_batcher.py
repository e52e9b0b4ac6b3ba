"""Which tokens run next: who is admitted, who shares a batch, who gives way."""

from __future__ import annotations

from array import array
from typing import Any

import pytest

from shimpy.engine.admission import MARGIN, Restore
from shimpy.engine.batcher import Batch, Batcher
from shimpy.engine.pace import MIN_CHUNK, Pace
from shimpy.engine.prefixes import SavedPrefix, SavedPrefixes
from shimpy.engine.sequence import Sequence


class Bench:
    """A batcher whose decodes always succeed and sample token 9."""

    def __init__(self, **shape: Any) -> None:
        self.batcher = Batcher(
            **{
                "n_slots": 4,
                "n_ctx": 4096,
                "n_ctx_seq": shape.get("n_ctx", 4096),
                "n_batch": 512,
                "can_split": True,
                "can_shift": True,
                **shape,
            }
        )
        self.now = 0.0
        # What a token of prefill takes: 128 of them are as much as streams should wait.
        self.token_s = 0.001
        self.n = 0

    def submit(self, n_tokens: int, **options: Any) -> Sequence:
        self.n += 1
        tokens = [self.n * 10_000 + i for i in range(n_tokens)]
        return self.submit_tokens(tokens, **options)

    def submit_tokens(self, tokens: list[int], **options: Any) -> Sequence:
        sequence = Sequence(request=self.n, tokens=tokens, **{"n_predict": 10_000, **options})
        self.batcher.submit(sequence)
        return sequence

    def plan(self) -> Batch:
        batch = self.batcher.next_batch(self.now)
        assert isinstance(batch, Batch)
        return batch

    def step(self) -> dict[Sequence, int]:
        """Run one batch; return how many tokens of each sequence were in it."""
        batch = self.plan()
        self.batcher.on_decoded(batch)
        for sequence, chunk in zip(batch.sequences, batch.chunks, strict=True):
            if chunk.wants_logits and not self.batcher.on_token(sequence, 9):
                self.batcher.finish(sequence)
        self.batcher.on_timed(batch, self.took_s(batch))
        return {
            sequence: len(chunk.tokens)
            for sequence, chunk in zip(batch.sequences, batch.chunks, strict=True)
        }

    def took_s(self, batch: Batch) -> float:
        return self.token_s * batch.n_prefill

    def run(self) -> None:
        """Run all to their ends."""
        while self.batcher.n_running or self.batcher.n_waiting:
            self.step()


def test_alone_a_prompt_fills_the_batch() -> None:
    bench = Bench()
    long = bench.submit(1200)
    assert [bench.step()[long] for _ in range(4)] == [512, 512, 176, 1]


def test_beside_a_stream_a_prompt_comes_in_small_chunks() -> None:
    bench = Bench()
    stream = bench.submit(5)
    bench.step()
    long = bench.submit(300)
    steps = [bench.step() for _ in range(4)]
    assert [step[stream] for step in steps] == [1, 1, 1, 1]
    assert [step[long] for step in steps] == [MIN_CHUNK, MIN_CHUNK, 44, 1]


def test_streams_that_go_on_and_on_give_way_where_llama_cpp_is_full() -> None:
    """It may say so in the midst of steps that were all alike."""
    bench = Bench()
    older, younger = bench.submit(5), bench.submit(5)
    for _ in range(4):
        assert bench.step().keys() <= {older, younger}
    assert bench.batcher.on_kv_full() is None
    assert bench.step() == {older: 1}
    assert younger.n_preempted == 1


class NewMachine(Bench):
    """Slots have cells of their own; the first use of each takes a fifth of a second."""

    def __init__(self) -> None:
        super().__init__(kv_unified=False, n_slots=8, n_ctx=8 * 4096, n_ctx_seq=4096)
        self.used: set[int] = set()

    def took_s(self, batch: Batch) -> float:
        slots = {chunk.slot for chunk in batch.chunks}
        n_new = len(slots - self.used)
        self.used |= slots
        return 0.03 + 0.0014 * batch.n_prefill + 0.2 * n_new

    def answer(self, *n_tokens: int) -> None:
        """Have so many prompts at once, each answered with a token."""
        for n in n_tokens:
            self.submit(n, n_predict=1)
        self.run()


def test_nothing_is_learnt_from_the_first_use_of_a_slot() -> None:
    """Long batches would look as quick as the short ones that were the first."""
    bench = NewMachine()
    for n_tokens in ([39] * 2, [39] * 3, [39] * 3, [33], [250], [33], [250], [33]):
        bench.answer(*n_tokens)
    assert len(bench.used) == 8
    bench.submit(33)
    bench.step()
    late, sizes = bench.submit(1500), []
    while not late.n_generated:
        sizes.append(bench.step().get(late, 0))
    assert 0 < max(sizes) <= MIN_CHUNK


def test_beside_a_stream_chunks_grow_where_they_are_quick() -> None:
    bench = Bench()
    bench.token_s = 0.0001
    bench.submit(5)
    bench.step()
    long = bench.submit(1500)
    assert [bench.step()[long] for _ in range(3)] == [128, 256, 511]


@pytest.mark.parametrize(("attends_idle", "depth"), [(True, 1000 + 128), (False, 128)])
def test_how_deep_a_batch_was_is_told_with_its_time(
    attends_idle: bool, depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With plain attention everybody's cells count, else those of the prompt alone."""
    told: list[int] = []
    monkeypatch.setattr(Pace, "on_batch", lambda *_, depth: told.append(depth))
    bench = Bench(attends_idle=attends_idle)
    bench.submit(1000)
    bench.step()
    bench.step()
    bench.submit(300)
    bench.step()
    bench.step()
    assert told[-1] == pytest.approx(depth, abs=3)


def test_only_the_last_token_of_a_prompt_gives_logits() -> None:
    bench = Bench()
    bench.submit(600)
    assert [chunk.wants_logits for chunk in bench.plan().chunks] == [False]
    bench.step()
    assert [chunk.wants_logits for chunk in bench.plan().chunks] == [True]


def test_prompts_share_a_batch_the_oldest_and_the_shortest_first() -> None:
    """Half of it is the oldest's, so that short prompts can't starve it; then the shortest."""
    bench = Bench(n_batch=100)
    oldest, long, short = bench.submit(500), bench.submit(400), bench.submit(30)
    assert bench.step() == {oldest: 50, long: 20, short: 30}


def test_prompts_of_one_length_are_served_in_order() -> None:
    """Divided evenly all of them would get their first token last."""
    bench = Bench(n_batch=100)
    first, second = bench.submit(150), bench.submit(150)
    assert bench.step() == {first: 100}
    assert bench.step() == {first: 50, second: 50}


def test_every_running_sequence_is_in_every_batch() -> None:
    bench = Bench()
    streams = [bench.submit(10 + n) for n in range(4)]
    bench.step()
    assert bench.step() == dict.fromkeys(streams, 1)


def test_more_requests_than_slots_wait_their_turn() -> None:
    bench = Bench(n_slots=2)
    first, second, third, fourth = (bench.submit(5, n_predict=2) for _ in range(4))
    assert set(bench.step()) == {first, second}
    assert (bench.batcher.n_running, bench.batcher.n_waiting) == (2, 2)
    bench.step()
    assert set(bench.step()) == {third, fourth}


def test_the_time_of_admission_is_noted_once() -> None:
    bench = Bench(n_slots=1)
    first, second = bench.submit(5, n_predict=2), bench.submit(5)
    bench.now = 1.0
    bench.step()
    bench.now = 2.0
    bench.step()
    bench.now = 3.0
    bench.step()
    assert (first.admitted_s, second.admitted_s) == (1.0, 3.0)


def test_a_prompt_is_admitted_only_with_room_for_it_and_a_margin() -> None:
    bench = Bench(n_ctx=1000)
    bench.submit(400)
    second = bench.submit(600 - MARGIN + 1)
    bench.step()
    assert second.slot is None
    third = bench.submit(10)
    bench.step()
    assert third.slot is None, "the head of the queue is not overtaken"


def test_room_that_was_promised_to_a_prompt_is_not_given_away() -> None:
    """At its admission nothing of a prompt is in the cache, but all of it will be."""
    bench = Bench(n_ctx=1000, n_batch=100)
    bench.submit(600)
    second = bench.submit(400)
    bench.step()
    assert second.slot is None


def test_a_shared_prefix_takes_no_room_twice() -> None:
    bench = Bench(n_ctx=1000, n_batch=1000)
    tokens = list(range(700))
    sequences = [bench.submit_tokens([*tokens, 5000 + n], n_predict=9) for n in range(4)]
    bench.step()
    assert all(sequence.slot is not None for sequence in sequences)
    bench.step()
    assert bench.batcher.n_kv_used == 700 + 4 + 1


def test_a_request_that_needs_the_whole_context_gets_it_when_alone() -> None:
    bench = Bench(n_ctx=1000)
    first, second = bench.submit(10, n_predict=3), bench.submit(999)
    for _ in range(3):
        assert set(bench.step()) == {first}
    assert set(bench.step()) == {second}


def test_idle_caches_give_way_before_anyone_waits() -> None:
    bench = Bench(n_ctx=1000)
    bench.submit(600, n_predict=1)
    bench.run()
    assert bench.batcher.n_kv_used == 600
    second = bench.submit(900)
    bench.step()
    bench.step()
    assert second.n_kv == 900
    assert 900 <= bench.batcher.n_kv_used <= 1000


def test_the_youngest_gives_way_when_the_cache_is_full() -> None:
    bench = Bench(n_ctx=400, n_slots=3)
    sequences = [bench.submit(50) for _ in range(3)]
    while not any(sequence.n_preempted for sequence in sequences):
        bench.step()
    assert [sequence.n_preempted for sequence in sequences] == [0, 0, 1]
    assert sequences[2].slot is None
    assert len(sequences[2].tokens) == sequences[2].n_prompt + sequences[2].n_generated


def test_who_gave_way_comes_back_first_and_goes_on_where_it_was() -> None:
    bench = Bench(n_ctx=400, n_slots=3)
    sequences = [bench.submit(50) for _ in range(3)]
    later = bench.submit(5)
    while not any(sequence.n_preempted for sequence in sequences):
        bench.step()
    youngest = sequences[2]
    assert bench.batcher._admission.soon == [youngest, later]
    n_generated = youngest.n_generated
    bench.batcher.finish(sequences[0])
    step = bench.step()
    assert (youngest.slot is not None, later.slot is not None) == (True, True)
    assert step[youngest] > 1
    assert youngest.n_generated in (n_generated, n_generated + 1)
    assert youngest.order < later.order


def test_after_the_cache_was_lost_all_go_on_even_if_they_shared_it() -> None:
    """Computed anew, what was shared takes its room for each: not all of them fit any more."""
    bench = Bench(n_ctx=400)
    tokens = list(range(300))
    sequences = [bench.submit_tokens([*tokens, 5000 + n], n_predict=20) for n in range(3)]
    bench.step()
    bench.step()
    assert bench.batcher.n_running == 3
    bench.batcher.on_kv_refused()
    bench.run()
    assert [sequence.n_generated for sequence in sequences] == [20] * 3


def test_a_shared_prefix_is_prefilled_once_by_any_number_of_streams() -> None:
    bench = Bench(n_slots=16, n_ctx=8192)
    prefix = list(range(2000))
    sequences = [bench.submit_tokens([*prefix, 5000 + n, 6000 + n]) for n in range(16)]
    n_computed = 0
    while any(sequence.n_generated == 0 for sequence in sequences):
        n_computed += sum(bench.step().values())
    n_generated = sum(sequence.n_generated - 1 for sequence in sequences)
    assert n_computed == 2000 + 16 * 2 + n_generated
    assert [sequence.n_cached for sequence in sequences] == [0] + [2000] * 15


def test_followers_follow_each_other() -> None:
    """Who shares more with a follower than with the leader waits for the follower."""
    bench = Bench(n_batch=512)
    first = bench.submit_tokens([*range(600), 7001])
    second = bench.submit_tokens([*range(600), *range(3000, 3400), 7002])
    third = bench.submit_tokens([*range(600), *range(3000, 3400), 7003])
    n_computed = 0
    while third.n_generated == 0:
        n_computed += sum(bench.step().values())
    assert (first.n_cached, second.n_cached, third.n_cached) == (0, 600, 1000)
    assert n_computed <= 601 + 401 + 1 + first.n_generated + second.n_generated


def test_a_follower_goes_on_with_what_its_leader_left() -> None:
    bench = Bench(n_batch=512)
    leader = bench.submit_tokens([*range(2000), 7001])
    follower = bench.submit_tokens([*range(2000), 7002])
    bench.step()
    bench.batcher.finish(leader)
    assert bench.step() == {follower: 512}
    assert follower.n_cached == 512


def test_a_follower_shares_before_its_leader_shifts() -> None:
    """The leader's first token may fill the context; its positions move only afterwards."""
    bench = Bench(n_ctx=400, n_batch=512)
    bench.submit_tokens(list(range(399)), n_keep=4)
    follower = bench.submit_tokens([*range(300), 7002], n_predict=0)
    bench.step()
    bench.step()
    assert follower.n_cached == 300


def test_a_full_context_ends_a_sequence() -> None:
    bench = Bench(n_ctx=400)
    sequence = bench.submit(390)
    bench.run()
    assert (len(sequence.tokens), sequence.n_generated) == (400, 10)


def test_a_full_context_shifts_when_that_was_asked_for() -> None:
    bench = Bench(n_ctx=400)
    sequence = bench.submit(390, n_keep=10, n_predict=500)
    first = sequence.tokens[:10]
    longest = 0
    while bench.batcher.n_running or bench.batcher.n_waiting:
        bench.step()
        longest = max(longest, sequence.n_kv)
    assert sequence.n_generated == 500
    assert sequence.tokens[:10] == first
    assert longest == 399


@pytest.mark.parametrize(("n_keep", "kept"), [(-1, 30), (10, 10), (399, 200)])
def test_what_a_shift_keeps_is_bounded(n_keep: int, kept: int) -> None:
    """-1 means the prompt; never more than half of the context, or it would shift at each token."""
    bench = Bench(n_ctx=400)
    sequence = bench.submit(30, n_keep=n_keep)
    assert sequence.n_keep == kept


def test_a_model_that_cant_shift_ends_there() -> None:
    bench = Bench(n_ctx=400, can_shift=False)
    sequence = bench.submit(390, n_keep=4)
    bench.run()
    assert len(sequence.tokens) == 400


def test_there_are_no_more_slots_than_tokens_in_a_batch() -> None:
    bench = Bench(n_slots=8, n_batch=3)
    for _ in range(8):
        bench.submit(2)
    for _ in range(20):
        assert sum(bench.step().values()) <= 3
    assert bench.batcher.n_running == 3


def test_nothing_to_do_is_no_batch() -> None:
    assert Bench().batcher.next_batch(0.0) is None


def test_a_sequence_ends_at_the_models_own_length() -> None:
    """The cache holds several sequences; none grows past what the model was trained for."""
    bench = Bench(n_ctx=4096, n_ctx_seq=64)
    sequence = bench.submit(60)
    bench.batcher.next_batch(0.0)
    assert [bench.batcher.on_token(sequence, 9) for _ in range(4)] == [True, True, True, False]


# --- what is restored ---

LONG = list(range(50_000, 51_000))


def prefix(tokens: list[int], name: str = "a") -> SavedPrefix:
    return SavedPrefix(name, array("i", tokens), 0)


def keeping(*prefixes: SavedPrefix, whole: bool = False, **shape: Any) -> Bench:
    return Bench(saved=SavedPrefixes(prefixes, whole=whole), **shape)


def restore(bench: Bench) -> Restore:
    work = bench.batcher.next_batch(bench.now)
    assert isinstance(work, Restore)
    bench.batcher.on_restored(work)
    return work


def test_a_saved_prefix_comes_back_before_its_prompt_is_computed() -> None:
    bench = keeping(prefix(LONG))
    sequence = bench.submit_tokens([*LONG, 1, 2])
    assert restore(bench).prefix.name == "a"
    assert bench.step() == {sequence: 2}
    assert sequence.n_cached == len(LONG)
    assert bench.batcher.n_kv_used == len(LONG) + 2


def test_what_could_not_be_restored_is_computed() -> None:
    bench = keeping(prefix(LONG))
    sequence = bench.submit_tokens([*LONG, 1, 2])
    assert isinstance(bench.batcher.next_batch(0.0), Restore)
    assert bench.step() == {sequence: 512}
    assert sequence.n_cached == 0


def test_only_the_part_in_common_counts() -> None:
    bench = keeping(prefix(LONG))
    sequence = bench.submit_tokens([*LONG[:600], 1, 2])
    restore(bench)
    assert bench.step() == {sequence: 2}
    assert (sequence.n_cached, bench.batcher.n_kv_used) == (600, 602)


def test_of_a_whole_prefix_a_follower_gets_no_part_either() -> None:
    """Its leader had nothing of it when it was found, and has all of it as it shares."""
    bench = keeping(prefix(LONG), whole=True)
    more = list(range(60_000, 60_200))
    first = bench.submit_tokens([*LONG, *more, 1])
    leader = bench.submit_tokens([*LONG, *more, 2])
    follower = bench.submit_tokens([*LONG[:900], 3, 4])
    restore(bench)
    while not follower.n_generated:
        bench.step()
    assert (first.n_cached, leader.n_cached, follower.n_cached) == (1000, 1200, 0)


def test_a_prompt_that_wants_no_cache_restores_nothing() -> None:
    bench = keeping(prefix(LONG))
    bench.submit_tokens([*LONG, 1], reuse=False)
    assert bench.plan().n_prefill == 512


def test_what_another_slot_holds_or_will_hold_is_not_restored() -> None:
    bench = keeping(prefix(LONG))
    first, second = bench.submit_tokens([*LONG, 1]), bench.submit_tokens([*LONG, 2])
    restore(bench)
    assert set(bench.step()) == {first, second}
    third = bench.submit_tokens([*LONG, 3])
    assert third in bench.step()


def test_a_prefix_is_not_restored_where_it_does_not_fit_beside_what_runs() -> None:
    bench = keeping(prefix(LONG), n_ctx=1960)
    bench.submit(1000)
    bench.step()
    bench.step()
    sequence = bench.submit_tokens(LONG[:800])
    assert sequence in bench.step()
    assert sequence.n_cached == 0
    alone = keeping(prefix(LONG), n_ctx=1024)
    alone.submit_tokens(LONG[:900])
    restore(alone)


def test_idle_caches_make_way_for_a_prefix() -> None:
    bench = keeping(prefix(LONG), n_ctx=2048)
    bench.submit(1500, n_predict=1)
    for _ in range(3):
        bench.step()
    assert bench.batcher.n_kv_used == 1500
    bench.submit_tokens([*LONG, 1])
    assert restore(bench).ops != []
    assert bench.batcher.n_kv_used <= 2048


def test_streams_go_on_between_two_restores() -> None:
    other = [-token for token in LONG]
    bench = keeping(prefix(LONG), prefix(other, "b"))
    stream = bench.submit(1)
    bench.step()
    bench.submit_tokens([*LONG, 1])
    bench.submit_tokens([*other, 1])
    assert restore(bench).prefix.name == "a"
    assert stream in bench.step()
    assert restore(bench).prefix.name == "b"


def test_a_restored_window_is_used_whole_or_not_at_all() -> None:
    bench = keeping(prefix(LONG), whole=True)
    first = bench.submit_tokens([*LONG, 1, 2], n_predict=1)
    restore(bench)
    assert bench.step() == {first: 2}
    second = bench.submit_tokens([*LONG, 1, 5])
    third = bench.submit_tokens([*LONG[:900], 1, 5])
    bench.step()
    assert (second.n_cached, third.n_cached) == (len(LONG) + 1, 0)


@pytest.mark.parametrize(("attends_idle", "n_left"), [(True, 2 * 900), (False, 3 * 900)])
def test_idle_caches_give_way_where_they_slow_down_what_runs(
    attends_idle: bool, n_left: int
) -> None:
    """Flash attention skips them, plain attention computes them all for each token."""
    bench = Bench(attends_idle=attends_idle)
    for _ in range(3):
        bench.submit(900, n_predict=1)
        bench.step()
        bench.step()
    assert bench.batcher.n_kv_used == n_left
