"""How a model gets its memory: what fits beside what, who becomes smaller, who leaves. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import combinations

import msgspec
from msgspec.structs import replace

from shimpy.errors import UserError
from shimpy.placement.hardware import Hardware
from shimpy.placement.placement import Placement, Plan, PlanOptions, Rung
from shimpy.registry.model import Model
from shimpy.scheduler.ledger import HOST, Ledger, rung_fits, use_of
from shimpy.scheduler.policy import Planner, Wish
from shimpy.scheduler.states import Phase, Resident
from shimpy.units import format_bytes

# Loads of about the same length count as equally cheap to bring back: 0-2 s, 2-8 s, 8-32 s, ...
_CHEAP_LOAD_S = 2.0

# Of so many idle residents every set is tried for moving experts to RAM.
_MOST_SHRUNK = 4


class Start(msgspec.Struct, frozen=True, kw_only=True):
    """It fits: now, or once stopping workers have gone and others gave up what they parked."""

    rung: Rung
    plan: Plan
    must_wait: bool


class Shrink(msgspec.Struct, frozen=True, kw_only=True):
    """An idle resident that is to be loaded again with its experts in RAM."""

    resident: Resident
    # All experts in RAM; it gets a better placement when there is room for one in the end.
    rung: Rung
    options: PlanOptions


class Evict(msgspec.Struct, frozen=True, kw_only=True):
    """It fits when these idle residents have left, or have become smaller."""

    rung: Rung
    victims: tuple[Resident, ...] = ()
    shrinks: tuple[Shrink, ...] = ()


class Wait(msgspec.Struct, frozen=True, kw_only=True):
    """It fits only when these residents, some of them busy, have left."""

    rung: Rung
    holders: tuple[Resident, ...]


class Refuse(msgspec.Struct, frozen=True, kw_only=True):
    """It fits not even with every resident gone that may be made to go."""

    reason: str


Room = Start | Evict | Wait | Refuse


class RoomSearch(msgspec.Struct, frozen=True, kw_only=True):
    """What a search for room for one model needs to know."""

    # Plans the model on some hardware.
    plan: Callable[[Hardware], Plan]
    ledger: Ledger
    # Its present resident, when it is to be loaded anew.
    own: Resident | None
    # Residents that may be evicted: idle, and not pinned.
    leavers: Sequence[Resident]
    # Plans other models, to make them smaller.
    planner: Planner

    def find(self) -> Room:
        """Decide how the model gets its memory.

        A good placement is all on the GPU, experts in RAM, or no worse than it could be on
        this machine with none but the pinned residents.

        1. A good placement beside all others: start. That may be with its experts in RAM.
        2. A good placement when idle residents move their experts to RAM: shrink these.
        3. A good placement when idle residents leave: evict them.
        4. Any placement beside all others: start.
        5. Any placement when idle residents leave: evict them.
        6. A placement when busy residents leave: wait for them.
        7. None: refuse, naming the pinned residents where it is because of them.
        """
        beside = self._beside(())
        if beside.chosen is not None and _is_fast(beside.chosen.placement):
            return self._start(beside, beside.chosen)
        best = self.plan(self.ledger.unpinned(without=self._mine))
        if best.chosen is None:
            return self._refuse(best)
        if beside.chosen is not None and is_as_good(beside.chosen, best.chosen):
            return self._start(beside, beside.chosen)
        shrunk = self._shrink(best.chosen)
        if shrunk is not None:
            return shrunk

        idle = by_cost_to_bring_back(self.leavers)
        weighed = [(count, self._beside(idle[:count]).chosen) for count in range(1, len(idle) + 1)]
        for good_only in (True, False):
            for count, found in weighed:
                if found is None or (good_only and not is_as_good(found, best.chosen)):
                    continue
                return self._evict(idle[:count], best.chosen if good_only else None)
            if beside.chosen is not None:
                return self._start(beside, beside.chosen)
        return self._wait(best.chosen)

    @property
    def _mine(self) -> tuple[Resident, ...]:
        return () if self.own is None else (self.own,)

    def _beside(self, gone: Iterable[Resident]) -> Plan:
        """Plan it beside all others but these."""
        return self.plan(self.ledger.remaining(without=(*self._mine, *gone)))

    def _start(self, plan: Plan, rung: Rung) -> Room:
        if self.own is not None:
            return Evict(rung=rung, victims=(self.own,))
        must_wait = self.ledger.has_returning and not rung_fits(rung, self.ledger.present())
        return Start(rung=rung, plan=plan, must_wait=must_wait)

    def _shrink(self, best: Rung) -> Evict | None:
        """Make as few smaller as possible, the cheapest to bring back first."""
        able = [r for r in by_cost_to_bring_back(self.leavers) if can_shrink(r)]
        for some in _sets_of(able):
            gone = (*self._mine, *some)
            shrinks: list[Shrink] = []
            for resident in some:
                others = self.ledger.remaining(without=gone, beside=[s.rung for s in shrinks])
                shrink = plan_shrink(resident, self.planner, others)
                if shrink is not None:
                    shrinks.append(shrink)
            if len(shrinks) < len(some):
                continue
            room = self.ledger.remaining(without=gone, beside=[s.rung for s in shrinks])
            found = self.plan(room).chosen
            if found is not None and is_as_good(found, best):
                return Evict(rung=found, victims=self._mine, shrinks=tuple(shrinks))
        return None

    def _evict(self, victims: list[Resident], best: Rung | None) -> Evict:
        """Evict no more than needed: spare each victim without which it is as good."""
        needed = list(victims)
        found = self._beside(needed).chosen
        for victim in reversed(victims[:-1]):  # the dearest first
            rest = [other for other in needed if other is not victim]
            spared = self._beside(rest).chosen
            if spared is not None and (best is None or is_as_good(spared, best)):
                needed, found = rest, spared
        assert found is not None, "a set of victims was chosen because it makes room"
        return Evict(rung=found, victims=(*self._mine, *needed))

    def _wait(self, best: Rung) -> Wait:
        """Wait for as few as possible: the idle first, then those that are cheapest to lose."""
        others = [
            r
            for r in self.ledger.residents
            if r.phase is not Phase.STOPPING and r is not self.own and not r.is_pinned
        ]
        holders = by_cost_to_bring_back(r for r in others if r in self.leavers)
        for resident in by_cost_to_bring_back(r for r in others if r not in self.leavers):
            holders.append(resident)
            found = self._beside(holders).chosen
            if found is not None:
                return Wait(rung=found, holders=(*self._mine, *holders))
        # Those who came first have claimed the rest: wait for everyone.
        return Wait(rung=best, holders=(*self._mine, *holders))

    def _refuse(self, best: Plan) -> Refuse:
        pinned = [r for r in self.ledger.residents if r.is_pinned and r is not self.own]
        if not pinned or self.plan(self.ledger.at_most()).chosen is None:
            return Refuse(reason=best.reason)
        names = ", ".join(f"{r.key} ({describe_use(r)})" for r in pinned)
        return Refuse(reason=f"pinned models hold its memory: {names}; unpin one. {best.reason}")


# --- who leaves, who becomes smaller ----------------------------------------------------------


def by_cost_to_bring_back(residents: Iterable[Resident]) -> list[Resident]:
    """Return residents in the order in which to evict them: the cheapest, least recently used."""

    def cost(resident: Resident) -> tuple[int, float, int]:
        load_s = resident.ready.load_s if resident.ready is not None else math.inf
        length = 0 if load_s <= _CHEAP_LOAD_S else 99
        if _CHEAP_LOAD_S < load_s < math.inf:
            length = math.ceil(math.log(load_s / _CHEAP_LOAD_S, 4))
        return length, resident.idle_since_s, resident.worker

    return sorted(residents, key=cost)


def can_shrink(resident: Resident) -> bool:
    """Whether a resident has experts on a GPU that nobody has asked to be there."""
    shape, asked = resident.model.shape, resident.purpose.asked
    return (
        resident.phase is Phase.READY
        and shape is not None
        and shape.is_moe
        and resident.rung.placement.mode in {"gpu", "experts-in-ram"}
        and asked.cpu_moe == "auto"
        and asked.n_gpu_layers is None
    )


def plan_shrink(resident: Resident, planner: Planner, room: Hardware) -> Shrink | None:
    """Plan a resident with its experts in RAM; None: no room, or it would free no VRAM."""
    options = as_it_is(resident)
    rung = plan_again(resident.model, replace(options, cpu_moe="on"), planner, room).chosen
    if rung is None or rung.placement.mode != "experts-in-ram":
        return None
    if sum(device.total_bytes for device in rung.devices) >= sum(use_of(resident).devices.values()):
        return None
    return Shrink(resident=resident, rung=rung, options=options)


def plan_again(model: Model, options: PlanOptions, planner: Planner, room: Hardware) -> Plan:
    """Plan a model that is loaded, with options of our own making."""
    try:
        return Wish(options=options).plan(planner, model, room)
    except UserError as error:
        # Nobody has asked, so nobody is told: it stays where it is.
        return Plan(chosen=None, reason=error.message, ladder=())


def as_it_is(resident: Resident) -> PlanOptions:
    """Return the options that plan a resident with the context and slots that it has."""
    placement = resident.rung.placement
    return replace(resident.purpose.asked, n_ctx=placement.n_ctx, n_slots=placement.n_slots)


def describe_use(resident: Resident) -> str:
    """Return how much a resident holds where."""
    use = use_of(resident)
    sizes = {**use.devices, HOST: use.host + use.mapped}
    names = {HOST: "RAM"}
    return ", ".join(
        f"{format_bytes(n_bytes)} of {names.get(device, device)}"
        for device, n_bytes in sizes.items()
        if n_bytes
    )


def is_as_good(rung: Rung, best: Rung) -> bool:
    """Whether a rung is a good one, `best` being the best that this machine can give."""
    if _is_fast(rung.placement):
        return True
    return (
        rung.placement.mode == best.placement.mode
        and rung.placement.n_gpu_layers >= best.placement.n_gpu_layers
    )


def _is_fast(placement: Placement) -> bool:
    return placement.mode in {"gpu", "experts-in-ram"}


def _sets_of(residents: Sequence[Resident]) -> Iterator[tuple[Resident, ...]]:
    """Yield the sets to try, the smaller first, then all of them."""
    few = residents[:_MOST_SHRUNK]
    for n_members in range(1, len(few) + 1):
        yield from combinations(few, n_members)
    if len(residents) > len(few):
        yield tuple(residents)
