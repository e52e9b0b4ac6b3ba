"""The scheduler's judgements as plain functions: what serves whom, how long to wait."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from operator import itemgetter

import msgspec
from msgspec.structs import replace

from shimpy.gguf.arch import ModelShape
from shimpy.placement.hardware import Hardware
from shimpy.placement.placement import Placement, Plan, PlanOptions, Rung
from shimpy.registry.model import Model
from shimpy.scheduler.states import Request, Resident, WorkerId
from shimpy.units import MIB

# What loads really took is known to it (simulations.Simulations).
Planner = Callable[[ModelShape, Hardware, PlanOptions], Plan]

# A model whose workers die this often in a row is held back.
DEATHS_BEFORE_HOLD = 3
FIRST_HOLD_S = 10.0
LONGEST_HOLD_S = 300.0

# How long a load waits for busy residents before these stop taking newer requests.
PATIENCE_S = 30.0

LONGEST_RETRY_AFTER_S = 60.0

# All parked caches together may take one of so many parts of the RAM that is left but for them.
PARKED_SHARE = 4

# A model that is wholly on the GPU leaves the processors next to nothing to do.
GPU_MODE_THREADS = 4
# Weights of a token that are work enough for one thread.
THREAD_BYTES = 16 * MIB


# --- which resident serves which request ------------------------------------------------------


def serves(resident: Resident, request: Request) -> bool:
    """Whether a resident can serve a request as it is loaded.

    A context at least as long as asked for will do, and any layers on the GPU where nobody asks
    for a number of them; any other load option must be the same. So clients of which one sets
    num_gpu and another does not cost one reload between them.
    """
    if resident.model.digest != request.model.digest:
        return False
    # Whatever the planner made of it, asking again for the same would change nothing.
    if request.options == resident.purpose.loaded_for:
        return True
    if not _differ_in_n_ctx_only(resident.purpose.asked, _as_loaded(request.options, resident)):
        return False
    # What was asked for counts as given, where the planner gave less (the model's own limit).
    loaded = max(resident.rung.placement.n_ctx, resident.purpose.asked.n_ctx or 0)
    return (request.options.n_ctx or resident.purpose.default_n_ctx) <= loaded


def _as_loaded(options: PlanOptions, resident: Resident) -> PlanOptions:
    """Return options with the resident's layers on the GPU, where they are what is asked for."""
    placement, n_asked = resident.rung.placement, options.n_gpu_layers
    if n_asked is None or min(n_asked, placement.n_layers + 1) == placement.n_gpu_layers:
        return replace(options, n_gpu_layers=resident.purpose.asked.n_gpu_layers)
    return options


class Wish(msgspec.Struct, frozen=True, kw_only=True):
    """What a model is to be loaded with: at least this context, or the default if larger."""

    options: PlanOptions
    or_default: bool = False

    def plan(self, planner: Planner, model: Model, hardware: Hardware) -> Plan:
        """Return the plan for the larger of the two contexts."""
        shape = model.shape
        assert shape is not None, "broken models are rejected on arrival"
        asked = self.options.n_ctx
        if self.or_default and asked is not None:
            by_default = planner(shape, hardware, replace(self.options, n_ctx=None))
            if by_default.chosen is not None and by_default.chosen.placement.n_ctx >= asked:
                return by_default
        return planner(shape, hardware, self.options)


def load_wish(waiting: Sequence[Request]) -> Wish:
    """Return what to load the first waiting request's model with.

    It is loaded for the longest context that anyone who waits asked for. Since a resident is
    replaced only by one with a longer context (`serves`), clients with different settings
    cost one reload between them.
    """
    first = waiting[0].options
    alike = [r.options.n_ctx for r in waiting if _differ_in_n_ctx_only(r.options, first)]
    asked = [n_ctx for n_ctx in alike if n_ctx is not None]
    options = replace(first, n_ctx=max(asked)) if asked else first
    return Wish(options=options, or_default=None in alike)


def _differ_in_n_ctx_only(one: PlanOptions, other: PlanOptions) -> bool:
    return replace(one, n_ctx=None) == replace(other, n_ctx=None)


def lower_rungs(plan: Plan, chosen: Rung) -> tuple[Rung, ...]:
    """Return the fitting rungs below the chosen one, best first."""
    if chosen not in plan.ladder:
        return ()
    below = plan.ladder[plan.ladder.index(chosen) + 1 :]
    return tuple(rung for rung in below if rung.fits and rung.placement != chosen.placement)


def describe(rung: Rung) -> str:
    """Return a placement in a few words, for the log and `ps`."""
    placement = rung.placement
    where = {
        "gpu": "all on the GPU",
        "experts-in-ram": f"experts of {placement.moe_layers_in_ram} layers in RAM",
        "partial-gpu": f"{placement.n_gpu_layers} of {placement.n_layers + 1} layers on the GPU",
        "cpu": "on the CPU",
    }[placement.mode]
    return f"{where}, context {placement.n_ctx}, {placement.n_slots} slots"


# --- parked caches ---------------------------------------------------------------------------


def parked_share(n_left: int, n_parking: int) -> int:
    """Return the RAM of each of several models for parked caches, where so much is left.

    Most of it stays for what comes next. Bytes.
    """
    return max(0, n_left) // PARKED_SHARE // max(1, n_parking)


# --- times and threads ------------------------------------------------------------------------


def hold_s(n_deaths: int) -> float:
    """Return how long a model is held back after this many deaths in a row; 0: not at all."""
    if n_deaths < DEATHS_BEFORE_HOLD:
        return 0.0
    return min(LONGEST_HOLD_S, FIRST_HOLD_S * 2.0 ** min(n_deaths - DEATHS_BEFORE_HOLD, 30))


def retry_after_s(*, n_waiting: int, capacity: int, mean_lease_s: float) -> float:
    """Guess when a full queue will have a place: once its capacity's worth of leases has ended."""
    guess = mean_lease_s / max(1, capacity) * max(1, n_waiting) / 2
    return min(LONGEST_RETRY_AFTER_S, max(1.0, guess))


def most_threads(shape: ModelShape, placement: Placement, n_cores: int) -> int:
    """Return how many threads a model has a use for.

    Threads wait for each other some hundred times a token. On a small model that takes longer
    than the work, the more so where the cores are shared: the demo model (8 MiB a token) decoded
    at 876 tok/s with one thread and 134 with two, on two busy virtual cores; a 200M model (120 MiB)
    at 48 and 80, on quiet ones.
    """
    if placement.mode == "gpu":
        return min(GPU_MODE_THREADS, n_cores)
    if shape.is_embedding:
        # It computes whole texts, not tokens.
        return n_cores
    return max(1, min(n_cores, shape.active_bytes // THREAD_BYTES))


def share_threads(n_cores: int, busy: Collection[Resident]) -> dict[WorkerId, int]:
    """Return the threads of each busy worker: those that compute on the CPU share the cores.

    Two workers with all cores each are slower than with half of them each: the threads of
    both spin (measured with llama.cpp's OpenMP build: 29-47 tok/s against 124 on two cores).
    """
    shares = {r.worker: (_most_threads(r, n_cores), r.rung.placement.mode == "gpu") for r in busy}
    n_left, n_sharing = n_cores, sum(not on_gpu for _, on_gpu in shares.values())
    threads: dict[WorkerId, int] = {}
    # What one has no use for is left to the others.
    for worker, (most, on_gpu) in sorted(shares.items(), key=itemgetter(1)):
        threads[worker] = most
        if not on_gpu:
            threads[worker] = min(most, max(1, n_left // n_sharing))
            n_left -= threads[worker]
            n_sharing -= 1
    return threads


def _most_threads(resident: Resident, n_cores: int) -> int:
    shape = resident.model.shape
    assert shape is not None, "broken models are rejected on arrival"
    return most_threads(shape, resident.rung.placement, n_cores)
