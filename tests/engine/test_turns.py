"""What depth costs is learnt from batches, and several long prompts take turns for it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shimpy.engine.attention import Attention
from shimpy.engine.batcher import Batch
from shimpy.engine.turns import LONG
from tests.engine.test_parking import Parker

BASE_S = 0.002
SLOPE_S = 0.0000017


def taken_s(n_tokens: int, depth: int) -> float:
    return n_tokens * (BASE_S + SLOPE_S * (depth + n_tokens / 2))


@given(st.lists(st.tuples(st.integers(48, 512), st.integers(0, 8000)), min_size=3, max_size=40))
def test_a_line_is_found_again(batches: list[tuple[int, int]]) -> None:
    attention = Attention()
    for n_tokens, depth in [(512, 0), *batches, (512, 8000)]:
        attention.on_batch(n_tokens, taken_s(n_tokens, depth), depth=depth)
    assert attention.loss_s(1000, 2000) == pytest.approx(1000 * 2000 * SLOPE_S, rel=1e-6)
    assert attention.alone_s(1000) == pytest.approx(taken_s(1000, 0), rel=1e-6)
    assert attention.alone_s(1000, 70) == pytest.approx(taken_s(1000, 70), rel=1e-6)


def test_nothing_is_known_of_depth_from_one_depth() -> None:
    attention = Attention()
    for _ in range(9):
        attention.on_batch(128, 0.3, depth=900)
    assert attention.loss_s(1000, 2000) == 0
    assert attention.alone_s(128) == pytest.approx(0.3)


class Machine(Parker):
    """Batches take as long as those of a dense 200M model on one thread."""

    def took_s(self, batch: Batch) -> float:
        took_s = taken_s(sum(len(chunk.tokens) for chunk in batch.chunks), batch.depth)
        self.now += took_s
        return took_s


def test_long_prompts_take_turns_once_it_is_known_what_depth_costs() -> None:
    bench = Machine(n_slots=8, n_ctx=16384)
    bench.answer(2000)
    first = [bench.submit(2000, n_predict=20) for _ in range(3)]
    bench.run()
    ends = [sequence.n_generated for sequence in first]
    assert ends == [20] * 3
    # No batch was deeper than one of them, and the copies of those that went before.
    alone_s = taken_s(2000, 0) + 20 * 2050 * SLOPE_S + 20 * BASE_S
    started_s = bench.now
    for _ in range(3):
        bench.submit(2000, n_predict=20)
    bench.run()
    assert bench.now - started_s == pytest.approx(3 * alone_s, rel=0.1)


def test_without_turns_they_would_take_half_as_long_again(monkeypatch: pytest.MonkeyPatch) -> None:
    times_s = []
    for turns in (True, False):
        if not turns:
            monkeypatch.setattr("shimpy.engine.turns.PATIENCE", 0)
        bench = Machine(n_slots=8, n_ctx=16384)
        bench.answer(2000)
        started_s = bench.now
        for _ in range(4):
            bench.submit(2000, n_predict=20)
        bench.run()
        times_s.append(bench.now - started_s)
    assert times_s[1] > 1.5 * times_s[0]


def test_a_short_prompt_does_not_wait_for_long_ones() -> None:
    bench = Machine(n_slots=8, n_ctx=16384)
    bench.answer(2000)
    stream = bench.submit(2000, n_predict=500)
    while not stream.n_generated:
        bench.step()
    held = bench.submit(2000, n_predict=1)
    short = bench.submit(LONG - 1, n_predict=1)
    while not short.n_generated:
        bench.step()
    assert not held.is_begun


def test_a_long_chat_that_goes_on_does_not_wait_for_its_own_cells() -> None:
    bench = Machine(n_slots=8, n_ctx=16384)
    chat = bench.answer(4000)
    stream = bench.submit(LONG, n_predict=500)
    while not stream.n_generated:
        bench.step()
    more = bench.submit_tokens([*chat.tokens, *range(LONG + 8)], n_predict=1)
    while not more.is_begun:
        bench.step()
    assert more.n_cached == 4000
    assert stream.n_generated < 5


def test_patience_ends() -> None:
    """A stream that goes on and on holds a long prompt for twice of what it would lose."""
    bench = Machine(n_slots=8, n_ctx=16384)
    bench.answer(2000)
    stream = bench.submit(2000, n_predict=9000)
    bench.step()
    begun_s = bench.now
    held = bench.submit(2000, n_predict=1)
    while not held.is_begun:
        bench.step()
    waited_s = bench.now - begun_s
    assert stream.n_generated
    # The loss is that of the cells in use by then.
    assert 2000 * 2000 * SLOPE_S < waited_s < 3 * 2000 * (2000 + stream.n_generated) * SLOPE_S


def test_with_flash_attention_nobody_waits() -> None:
    bench = Machine(n_slots=8, n_ctx=16384, attends_idle=False, can_park=False)
    bench.answer(2000)
    stream = bench.submit(2000, n_predict=500)
    while not stream.n_generated:
        bench.step()
    late = bench.submit(2000, n_predict=1)
    assert late in bench.step()
