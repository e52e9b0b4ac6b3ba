"""Measurements that were made up, and a bench of a tiny model."""

from __future__ import annotations

from msgspec.structs import replace

from shimpy.bench.candidates import Candidate
from shimpy.bench.report import Report
from shimpy.bench.results import Effort, Measurement, Reading, StreamFigures
from shimpy.bench.summary import Summary
from shimpy.placement.placement import PlanOptions
from shimpy.placement.planner import plan_model
from shimpy.protocol.messages import BufferUse
from shimpy.units import GIB, MIB
from tests.placement.machines import machine, model
from tests.scheduler.support import make_model

MOE = model()
QUICK = Effort(n_prompt=16, n_generated=4, streams=(1, 2), n_repetitions=2)


def measurement(
    n_cpu_moe: int, decode: float, *, vram: float = 80, card_mib: int | None = 5000
) -> Measurement:
    """What the experts of N layers in RAM came to; without VRAM, the CPU alone."""
    options = PlanOptions(n_ctx=4096, n_slots=4, cpu_moe=n_cpu_moe or "off")
    hardware = machine(vram) if vram else machine()
    rung = plan_model(MOE, hardware, options).chosen
    assert rung is not None
    loaded = Reading(process_bytes=None, card_bytes=None, rss_bytes=GIB)
    if card_mib is not None and vram:
        card = card_mib * MIB
        loaded = Reading(process_bytes=card, card_bytes=card, rss_bytes=GIB)
    return Measurement(
        candidate=Candidate(label=f"N = {n_cpu_moe}", rung=rung, n_threads=4),
        start_s=1.25,
        load_s=1.0,
        prefill_per_s=Summary((1000.0, 1100.0, 1200.0)),
        decode_per_s=Summary((decode - 1, decode, decode + 1)),
        streams=(
            StreamFigures(n_streams=1, per_s=Summary((30.0,)), first_text_s=Summary((0.05,))),
            StreamFigures(n_streams=4, per_s=Summary((90.0,)), first_text_s=Summary((0.2,))),
        ),
        buffers=(
            BufferUse("CPU", GIB, 0, 10 * MIB),
            BufferUse(rung.placement.devices[0] if vram else "CPU", 2 * GIB, GIB, 64 * MIB),
        ),
        loaded=loaded,
        worked=replace(loaded, rss_bytes=2 * GIB),
        n_prompt=512,
        n_generated=64,
    )


def report(*measurements: Measurement) -> Report:
    return Report(
        model=make_model("some:tag", MOE),
        machine="a machine",
        effort=Effort(streams=(1, 4)),
        budget_bytes=None,
        measurements=measurements,
        left_out=("N = 0: CUDA0 lacks 1.0 GiB",),
    )
