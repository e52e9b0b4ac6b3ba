"""What becomes of idle residents when the free memory has changed by itself. Pure.

Other programs come and go. When one takes memory, idle residents become smaller or leave before
anything fails; when one leaves, a model that had to be placed badly moves up. The first is done
at once, the second only when it is sure to last: a move costs a load, and nobody has asked for it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

import msgspec
from msgspec.structs import replace

from shimpy.placement.hardware import Hardware
from shimpy.placement.placement import Rung
from shimpy.scheduler import policy
from shimpy.scheduler.books import Books
from shimpy.scheduler.effects import Effect
from shimpy.scheduler.ledger import HOST, Ledger, use_of
from shimpy.scheduler.room import (
    Shrink,
    as_it_is,
    by_cost_to_bring_back,
    can_shrink,
    plan_again,
    plan_shrink,
)
from shimpy.scheduler.states import Phase, Resident, WorkerId
from shimpy.units import MIB, format_bytes, format_duration

# A better placement must have had room for so long, at every look.
SETTLED_S = 30.0
# A model stays where it is for so long after it was loaded,
RESIDENCE_S = 60.0
# and is not moved right after it was used.
QUIET_S = 10.0
# From one move up to the next, of any models.
PAUSE_S = 60.0
# A model whose load failed on its way is not moved again for so long.
BARRED_S = 600.0
# Of each GPU so much stays free beside a move up: what a worker takes grows with its work, and who
# moves into the last corner is the first to be made smaller.
HEADROOM_BYTES = 256 * MIB
# A move up must bring so much more of the model onto the GPU (gpu_share), or all of it.
LEAST_GAIN = 0.125


class Watch:
    """Remembers since when each resident could be placed better, and the last move."""

    def __init__(self) -> None:
        self._since: dict[WorkerId, float] = {}
        self._last_move_s = -math.inf
        self._barred_until: dict[str, float] = {}

    def bar(self, key: str, now: float) -> None:
        """Don't move a model again for a while."""
        self._barred_until[key] = now + BARRED_S

    def look(
        self, books: Books, ledger: Ledger, planner: policy.Planner, now: float
    ) -> list[Effect]:
        """Act on a fresh snapshot.

        The cases:

        1. Something is loading: its memory is half taken, wait for the next look.
        2. Less than half of a margin is left: relieve the device.
        3. Somebody waits for memory, or some model is on its way: nothing moves up.
        4. An idle model's better placement has had room for long enough: move it up.
        """
        residents = books.residents.values()
        if any(resident.phase is Phase.LOADING for resident in residents):
            return []
        effects = _relieve(books, ledger, planner, now)
        if effects:
            return effects
        is_unrest = any(resident.phase is Phase.STOPPING for resident in residents)
        if is_unrest or books.moving or any(map(books.needs_placing, books.queues.values())):
            return []
        return self._move_up(books, ledger, planner, now)

    def _move_up(
        self, books: Books, ledger: Ledger, planner: policy.Planner, now: float
    ) -> list[Effect]:
        better = {r.worker: rung for r, rung in _better(books, ledger, planner)}
        self._since = {worker: self._since.get(worker, now) for worker in better}
        self._barred_until = {k: t for k, t in self._barred_until.items() if now < t}
        ripe = [r for w in better if self._is_ripe(r := books.residents[w], now)]
        if not ripe or now < self._last_move_s + PAUSE_S:
            return []
        resident = max(ripe, key=lambda r: (r.idle_since_s, r.worker))
        rung = better[resident.worker]
        self._last_move_s = now
        waited = format_duration(now - self._since.pop(resident.worker))
        reason = (
            f"{_describe_free(rung)} for {waited}: from {policy.describe(resident.rung)} "
            f"to {policy.describe(rung)}"
        )
        return books.begin_move(
            resident,
            as_it_is(resident),
            claim=rung,
            least=resident.rung,
            reason=reason,
            now=now,
            kind="moved_up",
            cause="moved_up",
        )

    def _is_ripe(self, resident: Resident, now: float) -> bool:
        ready_s = resident.ready_s if resident.ready_s is not None else now
        return (
            resident.key not in self._barred_until
            and now >= self._since[resident.worker] + SETTLED_S
            and now >= ready_s + RESIDENCE_S
            and now >= resident.idle_since_s + QUIET_S
        )


# --- more memory ------------------------------------------------------------------------------


def _better(
    books: Books, ledger: Ledger, planner: policy.Planner
) -> Iterator[tuple[Resident, Rung]]:
    """Yield the idle residents that would be placed better now, beside all others."""
    for resident in books.residents.values():
        if resident.rung.placement.mode == "gpu" or not resident.is_idle:
            continue
        rung = plan_better(resident, planner, ledger.remaining(without=(resident,)))
        if rung is not None:
            yield resident, rung


def plan_better(resident: Resident, planner: policy.Planner, room: Hardware) -> Rung | None:
    """Return the placement that a resident would get in this room, if clearly a better one."""
    if not room.gpus:
        return None
    gpus = tuple(
        replace(gpu, free_bytes=max(0, gpu.free_bytes - HEADROOM_BYTES)) for gpu in room.gpus
    )
    room = replace(room, gpus=gpus)
    rung = plan_again(resident.model, as_it_is(resident), planner, room).chosen
    if rung is None or rung.placement.n_ctx < resident.rung.placement.n_ctx:
        return None
    is_whole = rung.placement.mode == "gpu"
    gain = gpu_share(rung) - gpu_share(resident.rung)
    return rung if gain >= LEAST_GAIN or (is_whole and gain > 0) else None


def gpu_share(rung: Rung) -> float:
    """Return how much of a model's work a placement gives to GPUs, roughly: 0 to 1."""
    placement = rung.placement
    match placement.mode:
        case "gpu":
            return 1.0
        case "experts-in-ram":
            # All experts in RAM leave about a half.
            n_in_ram = placement.moe_layers_in_ram
            return 1.0 - 0.5 * min(1.0, n_in_ram / max(1, placement.n_layers))
        case "partial-gpu":
            return 0.5 * placement.n_gpu_layers / (placement.n_layers + 1)
        case "cpu":
            return 0.0


def _describe_free(rung: Rung) -> str:
    parts = [
        f"{format_bytes(device.free_bytes + HEADROOM_BYTES)} of {device.name}"
        for device in rung.devices
    ]
    return f"{' and '.join(parts)} would be free without it"


# --- less memory ------------------------------------------------------------------------------


class _Short(msgspec.Struct, frozen=True, kw_only=True):
    """A device that other programs have taken memory of."""

    name: str
    missing_bytes: int

    def __str__(self) -> str:
        name = "RAM" if self.name == HOST else self.name
        return f"{name} is {format_bytes(self.missing_bytes)} short of its margin"


def _relieve(books: Books, ledger: Ledger, planner: policy.Planner, now: float) -> list[Effect]:
    """Make idle residents smaller, or evict them, until the margins are kept again."""
    effects: list[Effect] = []
    leavers = [r for r in books.residents.values() if books.can_leave(r)]
    for resident in by_cost_to_bring_back(leavers):
        use = use_of(resident)
        held = {**use.devices, HOST: use.host + use.mapped}
        short = next((short for short in _short(books, ledger) if held.get(short.name)), None)
        if short is None or books.has_waiting(resident):
            continue
        reason = f"another program takes memory: {short}"
        room = ledger.remaining(without=(resident,))
        shrink = None
        if short.name != HOST and can_shrink(resident):
            shrink = plan_shrink(resident, planner, room)
        if shrink is None:
            effects += books.stop(resident, reason, now, kind="evict", cause="pressure")
            continue
        reason = f"{reason}; {describe_shrink(shrink)}"
        # Back in its old place, as the plan may have it, it would be no relief.
        shrink = replace(shrink, options=replace(shrink.options, cpu_moe="on"))
        effects += shrink_resident(books, shrink, reason, now, cause="pressure")
        ledger.hold(resident.key, shrink.rung)
    return effects


def _short(books: Books, ledger: Ledger) -> list[_Short]:
    """Return the devices that lack a good part of their margin, the worst first."""
    margins: Counter[str] = Counter()
    for resident in books.residents.values():
        for device in resident.rung.devices:
            margins[device.name] = max(margins[device.name], device.margin_bytes)
        margins[HOST] = max(margins[HOST], resident.rung.host.margin_bytes)
    missing = ledger.shortfall(margins)
    short = [_Short(name=name, missing_bytes=n_bytes) for name, n_bytes in missing.items()]
    return sorted(short, key=lambda one: -one.missing_bytes)


def shrink_resident(
    books: Books, shrink: Shrink, reason: str, now: float, *, cause: str
) -> list[Effect]:
    """Stop an idle resident, to load it again with its experts in RAM."""
    return books.begin_move(
        shrink.resident,
        shrink.options,
        claim=shrink.rung,
        least=shrink.rung,
        reason=reason,
        now=now,
        kind="shrunk",
        cause=cause,
    )


def describe_shrink(shrink: Shrink) -> str:
    """Return what becomes smaller by how much."""
    before = sum(use_of(shrink.resident).devices.values())
    after = sum(device.total_bytes for device in shrink.rung.devices)
    return (
        f"its experts move to RAM, its VRAM goes from {format_bytes(before)} "
        f"to {format_bytes(after)}"
    )
