"""Which placements of a model are worth measuring on a machine. Pure.

With a GPU it is a matter of how much stays in RAM: the rungs of the planner's own ladder that
fit, and for a mixture of experts the quarters between. On the CPU alone all weights are in RAM
whatever one does, and what can vary is how they are used: threads, flash attention, the
micro-batch; each is varied alone, from what the planner would take.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

import msgspec
from msgspec.structs import replace

from shimpy.errors import DoesNotFitError, UserError
from shimpy.gguf.arch import ModelShape
from shimpy.placement.defaults import KV_TYPE, N_UBATCH
from shimpy.placement.hardware import Hardware
from shimpy.placement.measured import Spot, spot_of
from shimpy.placement.placement import CpuMoe, Placement, Plan, PlanOptions, Rung
from shimpy.placement.reasons import describe_layout, missing_bytes
from shimpy.placement.search import PLAIN_KV
from shimpy.scheduler.policy import most_threads

# Plans the model in question.
ModelPlanner = Callable[[Hardware, PlanOptions], Plan]

_CPU_UBATCHES: Final = (128, 2048)
_QUARTERS: Final = 4


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """What the user wants to be measured; nothing given: what is worth it."""

    # Experts of the first N layers in RAM.
    n_cpu_moe: tuple[int, ...] = ()
    n_gpu_layers: tuple[int, ...] = ()
    # Every number of layers, both ways to hold weights in RAM, and the CPU alone.
    every: bool = False
    # None: as many as the daemon uses.
    n_threads: int | None = None
    # What the daemon is told to use; None: by cores and placement.
    usual_threads: int | None = None


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """A placement to be measured."""

    label: str
    rung: Rung
    n_threads: int
    # What the daemon would run it with: only then is its speed of use to the planner.
    is_usual: bool = True


class Selection(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be measured, and what was left out with the reason."""

    candidates: tuple[Candidate, ...]
    left_out: tuple[str, ...] = ()


def limit_vram(hardware: Hardware, budget_bytes: int | None) -> Hardware:
    """Return the machine with no more than so much free memory on each card."""
    if budget_bytes is None:
        return hardware
    gpus = tuple(
        replace(gpu, free_bytes=min(gpu.free_bytes, budget_bytes)) for gpu in hardware.gpus
    )
    return replace(hardware, gpus=gpus)


def select_candidates(
    planner: ModelPlanner,
    hardware: Hardware,
    options: PlanOptions,
    wanted: Wanted,
    *,
    shape: ModelShape,
) -> Selection:
    """Return what to measure, the least in RAM first; `planner` plans the model of that shape.

    Raises:
        DoesNotFitError: nothing fits.
        UserError: what was asked for can't be varied on this model or machine.
        InvalidOptionError: an option can't be used with this model.
    """
    if (wanted.n_cpu_moe or wanted.n_gpu_layers) and not hardware.gpus:
        raise UserError("there is no GPU here: --n-cpu-moe and --n-gpu-layers change nothing")
    if wanted.n_cpu_moe and not shape.is_moe:
        raise UserError("the model has no experts: --n-cpu-moe changes nothing")
    plan = planner(hardware, options)
    rungs: list[Rung] = []
    left_out: list[str] = []
    for wish in _wishes(shape, options, wanted):
        rung = _rung(planner, hardware, wish)
        if rung.fits:
            rungs.append(rung)
        elif wanted.n_cpu_moe or wanted.n_gpu_layers:
            left_out.append(rung.reason)
    if not wanted.n_cpu_moe and not wanted.n_gpu_layers:
        rungs += _of_the_ladder(plan.ladder, wanted, hardware)
    if not rungs:
        raise DoesNotFitError("; ".join(left_out) or plan.reason)
    candidates = [_candidate(shape, hardware, rung, wanted) for rung in _distinct(rungs)]
    if not hardware.gpus:
        (base,) = candidates
        variants = _cpu_variants(base, options, every=wanted.every)
        planned = [(label, _rung(planner, hardware, wish)) for label, wish in variants]
        candidates = [_named_on_cpu(base)]
        candidates += [
            replace(base, label=label, rung=rung) for label, rung in planned if rung.fits
        ]
        candidates += _other_threads(base, hardware.host.n_cores, wanted)
    return Selection(candidates=tuple(candidates), left_out=tuple(left_out))


def _wishes(shape: ModelShape, options: PlanOptions, wanted: Wanted) -> Iterator[PlanOptions]:
    """Yield the options of each placement that is wanted besides the planner's own."""
    n_all = shape.n_layer + 1
    for n_layers in wanted.n_gpu_layers:
        yield replace(options, n_gpu_layers=n_layers)
    if wanted.n_gpu_layers and not wanted.n_cpu_moe:
        return
    if not wanted.n_cpu_moe:
        # With a smaller KV cache, for want of VRAM, only what the ladder itself has.
        options = replace(options, kv_type=options.kv_type or KV_TYPE)
    for n_cpu_moe in wanted.n_cpu_moe or _usual_n_cpu_moe(shape, every=wanted.every):
        cpu_moe: CpuMoe = n_cpu_moe or "off"
        whole = replace(options, n_gpu_layers=n_all, cpu_moe=cpu_moe)
        yield whole
        if wanted.every and n_cpu_moe:
            yield from _held_otherwise(whole)


def _held_otherwise(options: PlanOptions) -> Iterator[PlanOptions]:
    """Yield options with weights in RAM held as llama.cpp would by default."""
    if options.load_mode is None and options.n_ubatch is None:
        yield replace(options, load_mode="mmap", n_ubatch=N_UBATCH)


def _usual_n_cpu_moe(shape: ModelShape, *, every: bool) -> list[int]:
    """Return numbers of layers: none, quarters of the experts, all; or every one."""
    layers = shape.moe_layers
    if not layers:
        return [0]
    steps = range(len(layers) + 1) if every else _quarters(len(layers))
    return [0 if step == 0 else layers[step - 1] + 1 for step in steps]


def _quarters(count: int) -> list[int]:
    return sorted({round(count * part / _QUARTERS) for part in range(_QUARTERS + 1)})


def _rung(planner: ModelPlanner, hardware: Hardware, options: PlanOptions) -> Rung:
    plan = planner(hardware, options)
    return plan.chosen or min(plan.ladder, key=missing_bytes)


def _of_the_ladder(ladder: Sequence[Rung], wanted: Wanted, hardware: Hardware) -> Iterator[Rung]:
    """Yield the planner's own rungs that fit; the slow ones only where there is no fast one."""
    fitting = [rung for rung in ladder if rung.fits]
    fast = {rung.placement.mode for rung in fitting} & {"gpu", "experts-in-ram"}
    for rung in fitting:
        is_slow = rung.placement.mode in ("partial-gpu", "cpu")
        if wanted.every or not hardware.gpus or not (fast and is_slow):
            yield rung


def _distinct(rungs: Iterable[Rung]) -> list[Rung]:
    """Return one rung for each placement that may differ in speed, the least in RAM first."""
    seen: dict[Spot, Rung] = {}
    for rung in rungs:
        seen.setdefault(spot_of(rung.placement), rung)
    return sorted(seen.values(), key=lambda rung: _order(rung.placement))


def _order(placement: Placement) -> tuple[int, int, int]:
    return -placement.n_gpu_layers, placement.moe_layers_in_ram, -placement.n_ubatch


def _candidate(shape: ModelShape, hardware: Hardware, rung: Rung, wanted: Wanted) -> Candidate:
    placement = rung.placement
    label = describe_layout(shape, placement)
    if placement.mode in ("experts-in-ram", "partial-gpu"):
        label += f", {placement.held}, micro-batch {placement.n_ubatch}"
    if placement.kv_type != KV_TYPE:
        label += f", KV cache {placement.kv_type}"
    n_cores = hardware.host.n_cores
    usual = wanted.usual_threads or most_threads(shape, placement, n_cores)
    n_threads = wanted.n_threads or usual
    return Candidate(label=label, rung=rung, n_threads=n_threads, is_usual=n_threads == usual)


# --- the CPU alone ----------------------------------------------------------------------------


def _named_on_cpu(base: Candidate) -> Candidate:
    placement = base.rung.placement
    parts = (
        _threads_text(base.n_threads),
        _attention_text(is_flash=placement.flash_attn),
        f"micro-batch {placement.n_ubatch}",
    )
    return replace(base, label=", ".join(parts))


def _cpu_variants(
    base: Candidate, options: PlanOptions, *, every: bool
) -> Iterator[tuple[str, PlanOptions]]:
    """Yield what differs in one thing from what the planner would take, with its name."""
    placement = base.rung.placement
    same = replace(options, flash_attn=placement.flash_attn, n_ubatch=placement.n_ubatch)
    if options.flash_attn is None and placement.kv_type in PLAIN_KV:
        is_flash = not placement.flash_attn
        yield _attention_text(is_flash=is_flash), replace(same, flash_attn=is_flash)
    if options.n_ubatch is None:
        for n_ubatch in _CPU_UBATCHES if every else _CPU_UBATCHES[:1]:
            if n_ubatch <= placement.n_ctx:
                yield f"micro-batch {n_ubatch}", replace(same, n_ubatch=n_ubatch)


def _other_threads(base: Candidate, n_cores: int, wanted: Wanted) -> Iterator[Candidate]:
    """Yield half the threads (if all is wanted, each halving), and all where that is more."""
    if wanted.n_threads is not None:
        return
    halves = [base.n_threads >> i for i in range(1, base.n_threads.bit_length())]
    for n_threads in (*halves[: None if wanted.every else 1], n_cores):
        if n_threads != base.n_threads:
            label = _threads_text(n_threads)
            yield replace(base, label=label, n_threads=n_threads, is_usual=False)


def _attention_text(*, is_flash: bool) -> str:
    return "flash attention" if is_flash else "plain attention"


def _threads_text(n_threads: int) -> str:
    return f"{n_threads} thread{'' if n_threads == 1 else 's'}"
