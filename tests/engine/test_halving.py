"""Steps of several streams in one batch or two: whichever is quicker on the machine."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest

from shimpy.engine.batcher import Batch
from shimpy.engine.halving import LEAST, MOST
from shimpy.engine.sequence import Sequence
from tests.engine.test_batcher import Bench

N_STEPS = 400


def tiles(n: int) -> float:
    """dense 200M, one thread, AVX2: tokens by themselves below 8, else by 16."""
    return 0.003 + 0.009 * n if n < 8 else 0.055 + 0.045 * -(-n // 16)


def plain(n: int) -> float:
    return 0.02 + 0.003 * n


class Machine(Bench):
    """A bench that takes seconds(n) for a batch of n streams."""

    def __init__(self, seconds: Callable[[int], float], n_streams: int, **shape: bool) -> None:
        super().__init__(n_slots=16, n_ctx=16384, **shape)
        self.seconds = seconds
        self.sizes: list[int] = []
        self.streams = [self.submit(4) for _ in range(n_streams)]
        while any(stream.n_generated == 0 for stream in self.streams):
            self.step()
        self.sizes.clear()

    def took_s(self, batch: Batch) -> float:
        self.sizes.append(len(batch.sequences))
        return self.seconds(len(batch.sequences)) + super().took_s(batch)

    def run_steps(self, n: int) -> Counter[Sequence]:
        """Run until each stream has so many tokens more."""
        found: Counter[Sequence] = Counter()
        while any(found[stream] < n for stream in self.streams):
            found.update(self.step())
        return found


@pytest.mark.parametrize("kv_unified", [True, False])
@pytest.mark.parametrize("n_streams", [8, 9, 14])
def test_where_halves_are_quicker_steps_are_halved(n_streams: int, *, kv_unified: bool) -> None:
    bench = Machine(tiles, n_streams, kv_unified=kv_unified)
    bench.run_steps(N_STEPS)
    n_halved = sum(size < n_streams for size in bench.sizes) / 2
    is_quicker = tiles((n_streams + 1) // 2) + tiles(n_streams // 2) < tiles(n_streams)
    assert is_quicker == (n_streams < 14)
    assert (n_halved > 0.9 * N_STEPS) == is_quicker


@pytest.mark.parametrize("n_streams", [LEAST - 1, LEAST, MOST, MOST + 1])
def test_where_they_are_not_trials_become_rare(n_streams: int) -> None:
    bench = Machine(plain, n_streams)
    bench.run_steps(N_STEPS)
    n_halved = sum(size < n_streams for size in bench.sizes) / 2
    # After 16, 64 and 128 steps more, three each time; and then after 256.
    assert n_halved == (9 if LEAST <= n_streams <= MOST else 0)


@pytest.mark.parametrize("kv_unified", [True, False])
def test_each_stream_gets_as_many_tokens_whatever_comes_and_goes(*, kv_unified: bool) -> None:
    """Halves of a step follow each other, also where a prompt arrives between them."""
    bench = Machine(tiles, 10, kv_unified=kv_unified)
    late: list[Sequence] = []
    for round_ in range(60):
        if round_ % 7 == 0:
            late.append(bench.submit(70, n_predict=9))
        if round_ == 40:
            bench.batcher.finish(bench.streams.pop(3))
        counts = bench.run_steps(1)
        # Who is first in a round may be in it twice.
        assert {counts[stream] for stream in bench.streams} <= {1, 2}
    n_generated = {stream.n_generated for stream in bench.streams}
    assert max(n_generated) - min(n_generated) <= 1
    bench.run_steps(20)
    assert all(one.n_generated == 9 for one in late)


def test_where_it_makes_little_difference_steps_stay_whole() -> None:
    """Noise is not to choose."""
    drawn = random.Random(1)

    def even(n: int) -> float:
        return 0.010 * n * (1 + 0.12 * drawn.random())

    bench = Machine(even, 8)
    bench.run_steps(N_STEPS)
    n_halved = sum(size < 8 for size in bench.sizes) / 2
    assert n_halved == 9


def test_steps_that_are_slow_at_first_choose_nothing() -> None:
    """A cache takes its memory then, and nothing is warm."""
    n_slow = iter(range(4))

    def warming(n: int) -> float:
        return (0.004 + 0.010 * n) * (1 if next(n_slow, None) is None else 1.3)

    bench = Machine(warming, 8)
    bench.run_steps(120)
    n_halved = sum(size < 8 for size in bench.sizes) / 2
    assert n_halved == 6


def test_a_machine_that_changes_is_found_out() -> None:
    bench = Machine(plain, 8)
    bench.run_steps(100)
    bench.seconds = tiles
    bench.run_steps(400)
    bench.sizes.clear()
    bench.run_steps(50)
    assert sum(size == 4 for size in bench.sizes) > 80
