"""Reports measurements: which is best, as rows for people, and as JSON. Pure."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec.structs import asdict

from shimpy.bench.results import Effort, Measurement, Reading
from shimpy.bench.summary import Summary
from shimpy.registry.model import Model
from shimpy.units import format_bytes

NEEDS = ("", "PLACEMENT", "LOAD s", "PREFILL tok/s", "DECODE tok/s")
NONE = "-"


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """A sweep with what it was made of."""

    model: Model
    # Cards, processor and library, as the speeds are kept by.
    machine: str
    effort: Effort
    budget_bytes: int | None
    measurements: tuple[Measurement, ...]
    # Placements that did not fit or failed, with the reason.
    left_out: tuple[str, ...] = ()

    @property
    def best(self) -> Measurement | None:
        """What answers 512 tokens with 256 soonest, alone; None: nothing was measured."""
        return min(self.measurements, key=lambda m: m.speed.request_s, default=None)


def placement_rows(report: Report) -> list[tuple[str, ...]]:
    """Return a row for each placement: speeds of one stream, as medians with deviations."""
    return [
        (
            "*" if m is report.best else "",
            m.candidate.label,
            f"{m.start_s:.1f}",
            format_rate(m.prefill_per_s),
            format_rate(m.decode_per_s),
            *(_milliseconds(s.first_text_s) for s in m.streams),
            *(format_rate(s.per_s) for s in m.streams if s.n_streams > 1),
        )
        for m in report.measurements
    ]


def placement_headers(report: Report) -> tuple[str, ...]:
    """Return the headers of `placement_rows`; times to first text are in ms."""
    counts = report.effort.counts
    firsts = tuple(f"TTFT@{n} ms" for n in counts)
    return NEEDS + firsts + tuple(f"ALL@{n} tok/s" for n in counts if n > 1)


def memory_headers(report: Report) -> tuple[str, ...]:
    """Return the headers of `memory_rows`."""
    vram = ("PLANNED", "BUFFERS", "PROCESS", "CARD", "CARD AFTER WORK")
    return ("", "PLACEMENT", *(vram if _has_vram(report) else ()), "RAM")


def _has_vram(report: Report) -> bool:
    return any(m.candidate.rung.placement.devices for m in report.measurements)


def memory_rows(report: Report) -> list[tuple[str, ...]]:
    """Return a row for each placement: VRAM as planned and by three readings, and RAM."""
    rows = _memory_rows(report)
    return rows if _has_vram(report) else [(*row[:2], row[-1]) for row in rows]


def _memory_rows(report: Report) -> list[tuple[str, ...]]:
    return [
        (
            "*" if m is report.best else "",
            m.candidate.label,
            _size(sum(device.total_bytes for device in m.candidate.rung.devices) or None),
            _size(m.vram_bytes or None),
            _size(m.worked.process_bytes),
            _size(m.loaded.card_bytes),
            _size(m.worked.card_bytes),
            _size(m.worked.rss_bytes),
        )
        for m in report.measurements
    ]


def report_to_json(report: Report) -> dict[str, Any]:
    """Return a report as JSON values: bytes, seconds, tokens per second, all samples."""
    model, shape = report.model, report.model.shape
    assert shape is not None, "it has been measured"
    return {
        "model": {
            "name": str(model.name),
            "files": [str(path) for path in model.files],
            "file_bytes": model.size_bytes,
            "digest": model.digest,
            "arch": shape.arch,
            "quantization": shape.quantization,
            "n_params": shape.n_params,
        },
        "machine": report.machine,
        "budget_bytes": report.budget_bytes,
        "n_prompt": report.effort.n_prompt,
        "n_generated": report.effort.n_generated,
        "n_repetitions": report.effort.n_repetitions,
        "measurements": [
            {"is_best": m is report.best, **measurement_to_json(m)} for m in report.measurements
        ],
        "left_out": list(report.left_out),
    }


def measurement_to_json(measurement: Measurement) -> dict[str, Any]:
    """Return one placement's part of the JSON."""
    m, rung = measurement, measurement.candidate.rung
    return {
        "label": m.candidate.label,
        "n_threads": m.candidate.n_threads,
        "placement": asdict(rung.placement),
        "planned_vram_bytes": sum(device.total_bytes for device in rung.devices),
        "planned_ram_bytes": rung.host.total_bytes,
        "start_s": m.start_s,
        "load_s": m.load_s,
        "n_prompt": m.n_prompt,
        "n_generated": m.n_generated,
        "prefill_per_s": summary_to_json(m.prefill_per_s),
        "decode_per_s": summary_to_json(m.decode_per_s),
        "streams": [
            {
                "n_streams": s.n_streams,
                "per_s": summary_to_json(s.per_s),
                "first_text_s": summary_to_json(s.first_text_s),
            }
            for s in m.streams
        ],
        "buffers": [
            {
                "device": use.device,
                "model_bytes": use.model_bytes,
                "context_bytes": use.context_bytes,
                "compute_bytes": use.compute_bytes,
            }
            for use in m.buffers
        ],
        "buffers_vram_bytes": m.vram_bytes,
        "after_load": _reading_to_json(m.loaded),
        "after_work": _reading_to_json(m.worked),
    }


def summary_to_json(summary: Summary) -> dict[str, Any]:
    """Return a summary with its samples."""
    return {
        "median": summary.median,
        "mean": summary.mean,
        "deviation": summary.deviation,
        "samples": list(summary.samples),
    }


def _reading_to_json(reading: Reading) -> dict[str, int | None]:
    return asdict(reading)


def format_rate(summary: Summary) -> str:
    """Return "61.2 ± 0.4": three digits that count, and the deviation to the same place."""
    digits = 0 if summary.median >= 100 else 1 if summary.median >= 10 else 2  # noqa: PLR2004
    return f"{summary.median:.{digits}f} ± {summary.deviation:.{digits}f}"


def _milliseconds(summary: Summary) -> str:
    return format_rate(Summary(tuple(sample * 1000 for sample in summary.samples)))


def _size(n_bytes: int | None) -> str:
    return NONE if n_bytes is None else format_bytes(n_bytes)
