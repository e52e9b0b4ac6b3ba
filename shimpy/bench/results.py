"""What is measured of a placement, and how much of it. Pure."""

from __future__ import annotations

from typing import Final

import msgspec

from shimpy.bench.candidates import Candidate
from shimpy.bench.summary import Summary
from shimpy.placement.measured import Speed, spot_of
from shimpy.protocol.messages import BufferUse


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker holds at a moment, in bytes; None: nobody tells."""

    # Of the worker's process, summed over the cards, as the driver counts it.
    process_bytes: int | None
    # What the cards have in use beyond what they had before the worker was started.
    card_bytes: int | None
    # Resident in RAM, pages of a mapped file counted.
    rss_bytes: int | None


class Effort(msgspec.Struct, frozen=True, kw_only=True):
    """How much is measured of each placement."""

    # Tokens of each prompt, and generated for each.
    n_prompt: int = 512
    n_generated: int = 64
    # How many requests come at once; 1 is always measured.
    streams: tuple[int, ...] = (1, 4, 16)
    n_repetitions: int = 5

    @property
    def n_steps(self) -> int:
        """Steps of progress that one placement takes: loading and each repetition."""
        return 1 + self.n_repetitions * len(self.counts)

    @property
    def counts(self) -> tuple[int, ...]:
        """How many requests come at once, in rising order, 1 among them."""
        return tuple(sorted({1, *self.streams}))

    @property
    def n_slots(self) -> int:
        """Slots that the streams need."""
        return self.counts[-1]

    @property
    def n_ctx(self) -> int:
        """Context, in tokens, that all streams need together."""
        cells = self.n_slots * (self.n_prompt + self.n_generated)
        return max(4096, -(-cells // 256) * 256)


# Of fewer samples nobody can tell how much they vary.
_LEAST_SAMPLES: Final = 3
_UNKNOWN_NOISE: Final = 0.25

GPU_EFFORT: Final = Effort()
# On the CPU alone long prompts for 16 take minutes.
CPU_EFFORT: Final = Effort(n_prompt=128, n_generated=32, streams=(1, 4), n_repetitions=3)


class StreamFigures(msgspec.Struct, frozen=True, kw_only=True):
    """What a number of requests at once came to."""

    n_streams: int
    # Generated tokens of all streams per second of the whole run, prefill included.
    per_s: Summary
    # Mean over the streams of each run: seconds from the request to its first text.
    first_text_s: Summary


class Measurement(msgspec.Struct, frozen=True, kw_only=True):
    """What one placement came to."""

    candidate: Candidate
    # From the start of the worker until it is ready, and llama.cpp's part of it; once.
    start_s: float
    load_s: float
    # Of one stream; tokens per second.
    prefill_per_s: Summary
    decode_per_s: Summary
    streams: tuple[StreamFigures, ...]
    buffers: tuple[BufferUse, ...]
    # Right after the load, and after all work.
    loaded: Reading
    worked: Reading
    n_prompt: int
    n_generated: int

    @property
    def vram_bytes(self) -> int:
        """What llama.cpp's buffers take on the cards."""
        return sum(
            use.model_bytes + use.context_bytes + use.compute_bytes
            for use in self.buffers
            if use.device in self.candidate.rung.placement.devices
        )

    @property
    def speed(self) -> Speed:
        """The medians for one stream, as the planner takes them."""
        return Speed(
            spot=spot_of(self.candidate.rung.placement),
            prefill_per_s=self.prefill_per_s.median,
            decode_per_s=self.decode_per_s.median,
            noise=max(_noise(self.prefill_per_s), _noise(self.decode_per_s)),
        )


def _noise(summary: Summary) -> float:
    """Return the deviation as a part of the median."""
    if len(summary.samples) < _LEAST_SAMPLES:
        return _UNKNOWN_NOISE
    return summary.deviation / summary.median
