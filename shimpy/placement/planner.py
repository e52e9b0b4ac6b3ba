"""Decides where a model goes: the fastest placement that fits, and what else there was.

The ladder, best first:

    1. all layers on the GPU: on the one with most room, else spread over as few as it takes
    2. all layers, with the experts of the first N layers in RAM: the smallest N that fits
    3. all layers, with all experts in RAM
    4. fewer layers on the GPU: as many as fit
    5. the CPU alone
    6. refuse, naming which device lacks how many bytes and which setting lowers the need

Host memory counts on every rung: weights that stay in RAM must fit in what is available,
mapped or not. A mapped model that is larger than the RAM would be read from the disk again
for every token, so it is refused rather than started.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from operator import itemgetter

from msgspec.structs import replace

from shimpy.gguf.arch import ModelShape
from shimpy.placement.defaults import (
    KV_TYPE,
    N_CTX_EXPERTS,
    N_CTX_LEAST,
    N_UBATCH,
    RESIDENT,
    RESIDENT_ON_GPU,
    STREAMED,
    UBATCH_SHARE,
    Streaming,
    check_options,
    default_contexts,
    default_slots,
    is_encoder,
    kv_types,
    longer_contexts,
)
from shimpy.placement.figures import NO_FIGURES, Figures, Setup
from shimpy.placement.hardware import Hardware
from shimpy.placement.placement import Mode, Plan, PlanOptions, Rung
from shimpy.placement.reasons import describe_choice, describe_rung, missing_bytes
from shimpy.placement.search import Search, Settings, Team, first_with_room
from shimpy.protocol.messages import KvType

_NO_OPTIONS = PlanOptions()


def plan_model(
    shape: ModelShape,
    hardware: Hardware,
    options: PlanOptions = _NO_OPTIONS,
    figures: Figures = NO_FIGURES,
) -> Plan:
    """Return the fastest placement of a model that fits, with the ladder of all that was weighed.

    Pure, and quick enough to be asked anew for each request: about a millisecond. `chosen` is
    None where nothing fits. An explicit option is kept to exactly: with cpu_moe "off" no
    expert is moved away from its layer, with a number just those of that many layers are.
    What `figures` tells of this model is taken from there, the rest from formulas.

    Raises:
        InvalidOptionError: an option is out of range, or can't be used with this model.
    """
    check_options(shape, options)
    search = Search(shape, hardware, options, figures)
    rungs: list[Rung] = []
    chosen: Rung | None = None
    doubts: tuple[Setup, ...] = ()
    for rung in _ladder(search):
        rungs.append(replace(rung, reason=describe_rung(shape, hardware, options, rung)))
        if chosen is None:
            # Of the rungs below the chosen one nothing more needs to be known.
            chosen = rungs[-1] if rung.fits else None
            doubts = search.doubts(chosen)
    reason = describe_choice(shape, options, chosen, rungs)
    return Plan(chosen=chosen, reason=reason, ladder=tuple(rungs), doubts=doubts)


def _ladder(search: Search) -> Iterator[Rung]:
    """Yield one rung for each step that the options allow, best first, fitting or not."""
    asked = search.options.n_gpu_layers
    if not search.teams or asked == 0:
        yield _cpu_rung(search)
        return
    n_most = search.n_all - 1
    if asked is None or asked >= search.n_all:
        for rung in _whole_rungs(search):
            yield rung
            if rung.fits:
                # Then the next step down is one that gives back a good deal.
                n_most = search.n_all // 2
    if asked is None or asked < search.n_all:
        yield from _partial_rungs(search, n_most)
    if asked is None:
        yield _cpu_rung(search)


# --- steps 1 to 3: every layer on the GPU -----------------------------------------------------


def _whole_rungs(search: Search) -> Iterator[Rung]:
    fixed = _fixed_cpu_moe(search)
    if fixed is not None:
        yield _fixed_rung(search, fixed)
        return
    whole = _fixed_rung(search, 0)
    yield whole
    if not search.moe_layers or _is_shared(search):
        return
    # Where all fits, the next step down is one that gives back a good deal.
    n_least = 1 if not whole.fits else max(1, len(search.moe_layers) // 8)
    some = _some_experts_rung(search, search.moe_layers[n_least - 1] + 1)
    if some is not None and some.placement.n_cpu_moe <= search.moe_layers[-1]:
        yield some
        roomier = _roomier_rung(search, some) if some.fits and not whole.fits else None
        if roomier is not None:
            yield roomier
    yield _fixed_rung(search, search.shape.n_layer)


def _fixed_cpu_moe(search: Search) -> int | None:
    """Return the layers whose experts the user wants in RAM; None: the planner may choose."""
    cpu_moe = search.options.cpu_moe
    if cpu_moe == "auto":
        return None
    if cpu_moe == "off" or not search.moe_layers:
        return 0
    return search.shape.n_layer if cpu_moe == "on" else min(int(cpu_moe), search.shape.n_layer)


def _fixed_rung(search: Search, n_cpu_moe: int) -> Rung:
    """Return the rung with the experts of a given number of layers in RAM."""
    moves = any(index < n_cpu_moe for index in search.moe_layers)
    mode: Mode = "experts-in-ram" if moves else "gpu"
    streamings = _streamings(search, STREAMED if moves else RESIDENT_ON_GPU)
    most = N_CTX_EXPERTS if moves else None
    # More cards before a smaller KV cache.
    rungs = (
        search.rung(mode, team, search.n_all, n_cpu_moe, settings)
        for kv_type in kv_types(search.shape, search.options)
        for team in search.teams
        for settings in _settings(search, streamings, kv_type, n_ctx_most=most)
    )
    return _best_of(rungs if moves else filter(partial(_is_roomy, search), rungs))


def _some_experts_rung(search: Search, n_least: int) -> Rung | None:
    """Return the rung with the fewest experts in RAM; None: even with all, a GPU lacks room."""
    counts = range(n_least, search.moe_layers[-1] + 2)
    tried: list[Rung] = []
    for settings in _all_settings(search, n_ctx_most=N_CTX_EXPERTS):
        found = _counts_with_room(search, settings, counts, n_gpu_layers=search.n_all)
        if not found:
            continue
        # Fewest experts in RAM; as many with fewer GPUs are as good.
        n_cpu_moe, team = min(found, key=itemgetter(0))
        tried.append(_weigh_experts(search, team, settings, n_cpu_moe))
        if tried[-1].fits:
            break
    return _best_of(iter(tried)) if tried else None


def _counts_with_room(
    search: Search,
    settings: Settings,
    counts: range,
    *,
    n_gpu_layers: int | None = None,
    n_cpu_moe: int | None = None,
) -> list[tuple[int, Team]]:
    """Return, per team that has any, the first of `counts` for which it has room.

    The count stands for the one of the two numbers that is not given.
    """

    def first(team: Team) -> int | None:
        def has_room(count: int) -> bool:
            n_layers = count if n_gpu_layers is None else n_gpu_layers
            n_moved = count if n_cpu_moe is None else n_cpu_moe
            return search.gpus_have_room(team, n_layers, n_moved, settings)

        return first_with_room(counts, has_room)

    found = ((first(team), team) for team in search.teams)
    return [(count, team) for count, team in found if count is not None]


def _roomier_rung(search: Search, some: Rung) -> Rung | None:
    """Return the rung to fall back to when the forecast was too tight: an eighth more in RAM."""
    more = some.placement.n_cpu_moe + max(1, len(search.moe_layers) // 8)
    if more > search.moe_layers[-1]:
        return None
    team = _team_of(search, some)
    settings = Settings(
        n_ctx=some.placement.n_ctx,
        n_slots=some.placement.n_slots,
        streaming=Streaming(load_mode=some.placement.load_mode, n_ubatch=some.placement.n_ubatch),
        kv_type=some.placement.kv_type,
    )
    return _weigh_experts(search, team, settings, more)


def _weigh_experts(search: Search, team: Team, settings: Settings, n_cpu_moe: int) -> Rung:
    return search.rung("experts-in-ram", team, search.n_all, n_cpu_moe, settings)


# --- step 4: fewer layers ---------------------------------------------------------------------


def _partial_rungs(search: Search, n_most: int) -> Iterator[Rung]:
    """Yield the rung with as many layers on the GPU as fit, or as the user wants."""
    asked = search.options.n_gpu_layers
    fixed = _fixed_cpu_moe(search)
    n_cpu_moe = search.shape.n_layer if fixed is None and search.moe_layers else fixed or 0
    if _is_shared(search) and fixed is None:
        n_cpu_moe = 0
    # The output layer alone, 1, gains nothing.
    counts = range(n_most, 1, -1) if asked is None else range(asked, asked + 1)
    if not counts:
        return
    tried: list[Rung] = []
    streamings, kv_type = _streamings(search, STREAMED), search.options.kv_type or KV_TYPE
    for settings in _settings(search, streamings, kv_type, n_ctx_most=N_CTX_LEAST):
        found = _counts_with_room(search, settings, counts, n_cpu_moe=n_cpu_moe)
        least = (counts[-1], search.teams[-1])
        n_layers, team = max(found, key=itemgetter(0), default=least)
        tried.append(search.rung("partial-gpu", team, n_layers, n_cpu_moe, settings))
        if tried[-1].fits:
            break
    yield _best_of(iter(tried))


# --- step 5: the CPU --------------------------------------------------------------------------


def _cpu_rung(search: Search) -> Rung:
    """Return the rung without any GPU.

    Experts that the user wants in RAM are still named: it changes nothing, and llama.cpp's
    log then shows that they were asked for.
    """
    n_cpu_moe = _fixed_cpu_moe(search) or 0
    streamings, kv_type = _streamings(search, RESIDENT), search.options.kv_type or KV_TYPE
    return _best_of(
        search.rung("cpu", (), 0, n_cpu_moe, settings)
        for settings in _settings(search, streamings, kv_type, on_gpu=False)
    )


# --- settings ---------------------------------------------------------------------------------


def _streamings(search: Search, ways: tuple[Streaming, ...]) -> tuple[Streaming, ...]:
    """Return those of the ways to hold weights that the options leave, best first."""
    options = search.options
    if options.load_mode is not None:
        ways = tuple(replace(way, load_mode=options.load_mode) for way in ways)
    if options.n_ubatch is not None:
        ways = tuple(replace(way, n_ubatch=options.n_ubatch) for way in ways)
    return tuple(dict.fromkeys(ways))


def _all_settings(search: Search, *, n_ctx_most: int) -> Iterator[Settings]:
    """Yield the settings for weights that pass through the GPU, a smaller KV cache last."""
    streamings = _streamings(search, STREAMED)
    for kv_type in kv_types(search.shape, search.options):
        yield from _settings(search, streamings, kv_type, n_ctx_most=n_ctx_most)


def _settings(
    search: Search,
    streamings: tuple[Streaming, ...],
    kv_type: KvType,
    *,
    on_gpu: bool = True,
    n_ctx_most: int | None = None,
) -> Iterator[Settings]:
    """Yield the settings to try, best first: a longer context before a faster prefill.

    `n_ctx_most` bounds a context that nobody asked for, where it would displace weights; with
    None it may grow into VRAM that is plentiful. A cache that is made smaller for want of VRAM
    is of the shortest context: a longer one takes as much as what did not fit.
    """
    shape, options = search.shape, search.options
    n_slots = default_slots(shape, options, on_gpu=on_gpu)
    contexts = default_contexts(shape, options, n_slots)
    if on_gpu and options.n_ctx is None and not is_encoder(shape):
        if kv_type != (options.kv_type or KV_TYPE):
            contexts = contexts[-1:]
        elif n_ctx_most is None:
            free = sum(gpu.free_bytes for gpu in search.teams[0])
            longer = longer_contexts(shape, contexts[0], kv_type, n_slots, free)
            contexts = longer + contexts
        else:
            contexts = [n_ctx for n_ctx in contexts if n_ctx <= n_ctx_most] or contexts[-1:]
    for n_ctx in contexts:
        for streaming in streamings:
            yield Settings(n_ctx=n_ctx, n_slots=n_slots, streaming=streaming, kv_type=kv_type)


# --- helpers ----------------------------------------------------------------------------------


def _best_of(rungs: Iterator[Rung]) -> Rung:
    """Return the first rung that fits, else the one that lacks least."""
    nearest: Rung | None = None
    for rung in rungs:
        if rung.fits:
            return rung
        if nearest is None or missing_bytes(rung) < missing_bytes(nearest):
            nearest = rung
    assert nearest is not None, "there is at least one setting to try"
    return nearest


def _is_roomy(search: Search, rung: Rung) -> bool:
    """Whether a micro-batch that nobody asked for is short, or takes little of the free VRAM."""
    return (
        search.options.n_ubatch is not None
        or rung.placement.n_ubatch <= N_UBATCH
        or is_encoder(search.shape)
        or all(device.compute_bytes * UBATCH_SHARE <= device.free_bytes for device in rung.devices)
    )


def _is_shared(search: Search) -> bool:
    """Whether the GPU's memory is the host's: moving experts to RAM would gain nothing."""
    return all(gpu.is_shared for gpu in search.teams[0])


def _team_of(search: Search, rung: Rung) -> Team:
    names = set(rung.placement.devices)
    return next(team for team in search.teams if {gpu.name for gpu in team} == names)
