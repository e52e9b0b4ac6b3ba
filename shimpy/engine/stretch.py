"""Steps that follow each other without a look at anything else: the same streams, a token each.

What may come between two steps (prompts, copies, a shift of the context, a limit) is asked for
once a frame, not once a step: of a small model, or of many streams on a GPU, that is some
hundredths of a step's time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import msgspec

from shimpy.engine.backend import Backend, DecodeStatus
from shimpy.engine.generation import Generation


class Stretch(msgspec.Struct):
    """What some such steps gave, of which the batcher does not know yet."""

    # Of each stream, in order.
    drawn: list[list[int]]
    # When the last step was computed, and the one before.
    decoded_s: float
    before_s: float
    n_steps: int = 0
    # Of llama.cpp's part of them.
    took_s: float = 0.0
    # Streams that came to an end with the last step, or could not be drawn from.
    ended: list[tuple[Generation, Exception | None]] = []
    # Why there is not one step more, where llama.cpp would not: its DecodeStatus, or an error.
    fault: int | Exception | None = None


def run_on(
    backend: Backend,
    generations: Sequence[Generation],
    n_most: int,
    *,
    decoded_s: float,
    due_s: float,
    arrived: Collection[object],
    clock: Callable[[], float],
) -> Stretch:
    """Repeat a step that gave each of some streams a token, `n_most` times at most.

    None of them comes to a limit by then. It ends with the step that ends a stream, and before one
    that is likely to end later than `due_s` or for which anything waits that has `arrived`. The
    step was computed at `decoded_s`.
    """
    tokens = [generation.sequence.tokens[-1] for generation in generations]
    stretch = Stretch([[] for _ in generations], decoded_s, decoded_s)
    rows = list(enumerate(zip(generations, stretch.drawn, strict=True)))
    ended = stretch.ended
    now = decoded_s
    for n_steps in range(1, n_most + 1):
        started_s = clock()
        try:
            status = backend.decode_next(tokens)
        except Exception as error:  # noqa: BLE001 - one batch's boundary
            stretch.fault = error
            break
        if status != DecodeStatus.OK:
            stretch.fault = status
            break
        before_s, now = now, clock()
        stretch.took_s += now - started_s
        for row, (generation, drawn) in rows:
            try:
                token = generation.draw(row)
                if token is not None:
                    tokens[row] = token
                    drawn.append(token)
                if generation.is_over:
                    ended.append((generation, None))
            except Exception as error:  # noqa: BLE001 - one request's boundary
                ended.append((generation, error))
        stretch.n_steps, stretch.before_s, stretch.decoded_s = n_steps, before_s, now
        # As Outbox.may_wait: the next one is expected to take as long.
        if ended or arrived or 2 * now - before_s > due_s:
            break
    return stretch
