"""All on the GPU against experts in RAM, beside what others have published.

    python -m tests.benchmarks.reproduce --out DIR [--only NAME ...]

writes the models' exact shapes with random weights (they are named synthetic everywhere), one
after the other, measures each and deletes it: DIR/reproduction.json with every sample, .md with
means and deviations, images/reproduction.png. What is in the JSON is not measured again, so that a
long suite can be run in steps; `--merge FILE` takes over what other steps have measured.

Runs of each model, all with --repeat repetitions (5):

gpu              all on the GPU; context 4096, one slot, micro-batch 512
experts-in-ram   page-locked, micro-batch 2048; context 4096, one slot
llama.cpp        experts in RAM as its --cpu-moe has them: mapped, micro-batch 512; likewise
gpu-16, experts-in-ram-16   with 16 slots: 1, 4 and 16 requests at once
cpu              in place of these, on a machine without GPU
"""

from __future__ import annotations

import argparse
import asyncio
import datetime as dt
import hashlib
import json
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from shimpy.bench.candidates import Candidate
from shimpy.bench.measure import Bench
from shimpy.bench.readings import Readings
from shimpy.bench.report import measurement_to_json
from shimpy.bench.results import Effort
from shimpy.errors import ShimpyError
from shimpy.logs import setup_logging
from shimpy.placement.hardware import Hardware
from shimpy.placement.placement import PlanOptions
from shimpy.placement.probe import probe_hardware
from shimpy.placement.speeds import machine_name
from shimpy.registry.model import Model
from shimpy.registry.registry import model_of_files
from shimpy.scheduler.policy import most_threads
from shimpy.scheduler.simulations import Simulations
from shimpy.units import GIB
from tests.benchmarks.tables import write_report
from tests.shapes import MODELS, FileType, n_bytes, quantized
from tests.synthetic.filled import shrink, write_filled

SUITE: dict[str, tuple[str, FileType]] = {
    "deepseek-moe-16b-Q2_K": ("deepseek-moe-16b", "Q2_K"),
    "deepseek-moe-16b-Q4_K_M": ("deepseek-moe-16b", "Q4_K_M"),
    "deepseek-moe-16b-Q8_0": ("deepseek-moe-16b", "Q8_0"),
    "deepseek-moe-16b-F16": ("deepseek-moe-16b", "F16"),
    "phi-3.5-moe-Q2_K": ("phi-3.5-moe", "Q2_K"),
    "phi-3.5-moe-Q4_K_M": ("phi-3.5-moe", "Q4_K_M"),
    "phi-3.5-moe-Q8_0": ("phi-3.5-moe", "Q8_0"),
    "phi-3.5-moe-F16": ("phi-3.5-moe", "F16"),
    "gpt-oss-20b-MXFP4": ("gpt-oss-20b", "MXFP4"),
}
_CONTEXT = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One placement of a model, and how it is measured."""

    name: str
    options: PlanOptions
    streams: tuple[int, ...] = (1,)

    def effort(self, arguments: argparse.Namespace) -> Effort:
        """Return how much is measured."""
        return Effort(
            n_prompt=arguments.prompt,
            n_generated=arguments.predict,
            streams=self.streams,
            n_repetitions=arguments.repeat,
        )


def runs_on(hardware: Hardware, n_layer: int, many: Effort) -> tuple[Run, ...]:
    """Return the runs of a model on a machine; `many` is the effort of those of 16 streams."""
    if not hardware.gpus:
        return (Run(name="cpu", options=PlanOptions(n_ctx=_CONTEXT, n_slots=1)),)
    whole = PlanOptions(
        n_ctx=_CONTEXT, n_slots=1, n_gpu_layers=n_layer + 1, cpu_moe="off", n_ubatch=512
    )
    in_ram = replace(whole, cpu_moe="on", n_ubatch=2048, load_mode="locked")
    default = replace(whole, cpu_moe="on", n_ubatch=512, load_mode="mmap")
    slots: dict[str, Any] = {"n_ctx": many.n_ctx, "n_slots": many.n_slots}
    return (
        Run(name="gpu", options=whole),
        Run(name="experts-in-ram", options=in_ram),
        Run(name="llama.cpp", options=default),
        Run(name="gpu-16", options=replace(whole, **slots), streams=many.streams),
        Run(name="experts-in-ram-16", options=replace(in_ram, **slots), streams=many.streams),
    )


@dataclass(slots=True)
class Results:
    """What was measured until now; each step is written at once."""

    folder: Path
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """The JSON."""
        return self.folder / "reproduction.json"

    def merge(self, path: Path) -> None:
        """Take over the runs of another step; a run that is here already stays."""
        for name, case in json.loads(path.read_text(encoding="utf-8")).items():
            runs = {**case["runs"], **self.data.get(name, {}).get("runs", {})}
            self.data[name] = {**case, **self.data.get(name, {}), "runs": runs}

    def save(self) -> None:
        """Write the JSON and the report, in the suite's order."""
        self.data = dict(sorted(self.data.items(), key=lambda item: _position(item[0])))
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
        missing = [name for name in SUITE if name not in self.data]
        write_report(self.data, missing, self.folder)


def _position(name: str) -> tuple[int, str]:
    """Return where a model stands in the suite; with `--layers` its name is longer."""
    found = (i for i, known in enumerate(SUITE) if name.startswith(known))
    return next(found, len(SUITE)), name


def measure_case(name: str, results: Results, arguments: argparse.Namespace) -> None:
    """Write one model, measure what is missing of it, and delete it."""
    hardware = probe_hardware()
    shape_name, file_type = SUITE[name]
    spec = MODELS[shape_name]()
    if arguments.layers:
        spec = shrink(spec, arguments.layers)
        name = f"{name}-{arguments.layers}-layers"
    many = Run(name="", options=PlanOptions(), streams=(1, 4, 16)).effort(arguments)
    known = results.data.get(name, {}).get("runs", {})
    runs = [
        run
        for run in runs_on(hardware, spec.n_layer, many)
        if run.name not in known and (not arguments.runs or run.name in arguments.runs)
    ]
    if not runs:
        say(f"{name}: all is there")
        return
    path = arguments.folder / f"synthetic-{name}.gguf"
    size = sum(n_bytes(type_name, shape) for _, shape, type_name in quantized(spec, file_type))
    if not arguments.keep_files:
        # Of a step that was killed: its model would take the room of this one.
        for leftover in arguments.folder.glob("synthetic-*.gguf"):
            leftover.unlink()
    free = shutil.disk_usage(arguments.folder).free
    if size + GIB > free:
        say(f"{name}: left out: {size / GIB:.1f} GiB, {path.parent} has {free / GIB:.1f} GiB free")
        return
    try:
        started = time.perf_counter()
        write_filled(path, spec, file_type)
        say(f"{name}: {path.stat().st_size / 1e9:.1f} GB written, {since(started)}")
        started = time.perf_counter()
        case = describe_case(path, hardware)
        say(f"{name}: sha256 {case['sha256'][:16]}..., {since(started)}")
        case = results.data.setdefault(name, {**case, "runs": {}})
        for run in runs:
            if time.monotonic() > arguments.until:
                say("out of time: run it again for the rest")
                break
            started = time.perf_counter()
            case["runs"][run.name] = measure_run(path, run, hardware, arguments)
            say(f"{name}: {run.name}: {brief(case['runs'][run.name])}, {since(started)}")
            results.save()
    finally:
        if not arguments.keep_files:
            path.unlink(missing_ok=True)


def describe_case(path: Path, hardware: Hardware) -> dict[str, Any]:
    """Return what a model file and the machine are."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "weights": "synthetic: random, of the published model's shapes and types",
        "file": path.name,
        "file_bytes": path.stat().st_size,
        "sha256": digest,
        "machine": machine_name(hardware),
        "ram_bytes": hardware.host.total_bytes,
        "vram_bytes": sum(gpu.total_bytes for gpu in hardware.gpus),
        "python": platform.python_version(),
        "at": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", "-m", "tests.benchmarks.reproduce", *sys.argv[1:]]),
    }


def measure_run(
    path: Path, run: Run, hardware: Hardware, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Return a run's part of the JSON; where it can't be measured, the reason."""
    model = model_of_files([path])
    plan = Simulations(None).plan_exactly(model, hardware, run.options)
    if plan.chosen is None:
        return {"error": plan.reason}
    assert model.shape is not None, "a model that was written whole"
    usual = most_threads(model.shape, plan.chosen.placement, hardware.host.n_cores)
    candidate = Candidate(label=run.name, rung=plan.chosen, n_threads=arguments.threads or usual)
    try:
        return measure(model, candidate, run.effort(arguments), hardware)
    except ShimpyError as error:
        return {"error": error.message}


def measure(
    model: Model, candidate: Candidate, effort: Effort, hardware: Hardware
) -> dict[str, Any]:
    """Measure one placement in a worker of its own."""
    bench = Bench(model=model, effort=effort, readings=Readings(hardware.gpus))
    return measurement_to_json(asyncio.run(bench.measure(candidate)))


def brief(run: dict[str, Any]) -> str:
    """Return a run in a few words."""
    if "error" in run:
        return str(run["error"])
    prefill, decode = run["prefill_per_s"]["mean"], run["decode_per_s"]["mean"]
    return f"prefill {prefill:.0f} tok/s, decode {decode:.1f} tok/s"


def say(text: str) -> None:
    """Tell how far it is, at once: a run on a lent card may be ended any time."""
    print(text, flush=True)


def since(started: float) -> str:
    """Return how long it took."""
    return f"{time.perf_counter() - started:.1f} s"


def names_of(wanted: Sequence[str]) -> Iterator[str]:
    """Yield the suite's models whose names begin with one of those that are wanted."""
    for name in SUITE:
        if not wanted or any(name.startswith(prefix) for prefix in wanted):
            yield name


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line, checked."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.reproduce",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of the results")
    add("--only", nargs="*", default=[], help=f"models, by the beginnings of: {', '.join(SUITE)}")
    add("--runs", nargs="*", default=[], help="runs by name; all when not given")
    add("--merge", type=Path, nargs="*", default=[], help="reproduction.json of other steps")
    add("--repeat", type=int, default=5)
    add("--prompt", type=int, default=512)
    add("--predict", type=int, default=64)
    add("--layers", type=int, help="only the first layers of each model: a test of the suite")
    add("--threads", type=int, help="as the daemon would when not given")
    add("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where models are written")
    add("--keep-files", action="store_true", help="leave the models there")
    add("--limit", type=float, default=float("inf"), help="begin no run after so many seconds")
    add("--report", action="store_true", help="measure nothing, write the report of what is there")
    found = parser.parse_args(arguments)
    if unknown := [p for p in found.only if not any(name.startswith(p) for name in SUITE)]:
        parser.error(f"there is no model {', '.join(unknown)}; there are {', '.join(SUITE)}")
    found.until = time.monotonic() + found.limit
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, and write the report of all."""
    found = parse(arguments)
    setup_logging("error", "auto")
    results = Results(found.out)
    for path in [results.path, *found.merge]:
        if path.exists() or path in found.merge:
            results.merge(path)
    for name in [] if found.report else names_of(found.only):
        if time.monotonic() > found.until:
            say("out of time: run it again for the rest")
            break
        measure_case(name, results, found)
    results.save()
    say(f"{results.path.with_suffix('.md')}")


if __name__ == "__main__":
    main()
