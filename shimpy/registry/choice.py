"""Which of a model's quantizations suits a machine best, where the user leaves it open. Pure.

Past 8 bits nothing is gained but size. In VRAM more bits cost little time, so there the most
that fit whole are taken, down to 4; below that a model loses more than the VRAM is worth. In
RAM the time of each token grows with the bytes that are read for it, so there 4 bits come
first. Fewer are taken when nothing else fits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import msgspec

from shimpy.registry.offers import Offer

_BITS: Final = re.compile(r"(?:^|[^0-9])(?P<bits>\d+)")
_PREFERRED: Final = "_k_m"
_ENOUGH_BITS: Final = 8
_USUAL_BITS: Final = 4
# Headers are some megabytes each; whoever fails with so many will with the rest.
_MOST_WEIGHED: Final = 8


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What the planner says of a model on this machine."""

    fits: bool
    # All of it would be in VRAM.
    is_in_vram: bool
    # "10.1 GiB: will run with the experts of 27 layers in RAM: 1.9 GiB VRAM, 9.5 GiB RAM".
    headline: str
    # Why, or what is lacking where.
    reason: str
    # The plan as JSON.
    plan: dict[str, Any]


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """A quantization with what was found out about it."""

    offer: Offer
    # In words, for people.
    why: str
    # None: it was the only one, and has not been weighed.
    verdict: Verdict | None


def choose_offer(
    offers: Sequence[Offer], weigh: Callable[[Offer], Verdict], *, vram_bytes: int, ram_bytes: int
) -> Choice:
    """Return the quantization that suits the machine best; one that fits nowhere if none does.

    Args:
        offers: one for each quantization, at least one.
        weigh: says how a model would run here; it may take a while, so it is asked seldom.
        vram_bytes: free on all cards together.
        ram_bytes: free in the host's memory.
    """
    if len(offers) == 1:
        return Choice(offer=offers[0], why="it is the only one there", verdict=None)
    verdicts: dict[str, Verdict] = {}

    def weigh_once(offer: Offer) -> Verdict:
        if offer.path not in verdicts:
            verdicts[offer.path] = weigh(offer)
        return verdicts[offer.path]

    for offer in _for_vram(offers):
        if offer.size_bytes > vram_bytes or len(verdicts) >= _MOST_WEIGHED:
            continue
        if weigh_once(offer).is_in_vram:
            why = f"the most bits, up to {_ENOUGH_BITS}, with which all of it fits into VRAM"
            return Choice(offer=offer, why=why, verdict=verdicts[offer.path])
    for offer in _for_ram(offers):
        if offer.size_bytes > vram_bytes + ram_bytes or len(verdicts) >= _MOST_WEIGHED:
            continue
        if weigh_once(offer).fits:
            return Choice(offer=offer, why=_why(offer), verdict=verdicts[offer.path])
    smallest = min(offers, key=lambda offer: offer.size_bytes)
    return Choice(offer=smallest, why="the smallest; none fits here", verdict=weigh_once(smallest))


def n_bits(quantization: str) -> int:
    """Return a quantization's bits per weight, about; 4, the usual, where its name says none."""
    match = _BITS.search(quantization)
    return int(match["bits"]) if match else _USUAL_BITS


def _for_vram(offers: Sequence[Offer]) -> Iterator[Offer]:
    """Yield what is worth having in VRAM whole, the best first."""
    good = [o for o in offers if _USUAL_BITS <= n_bits(o.quantization) <= _ENOUGH_BITS]
    yield from sorted(good, key=lambda o: (-n_bits(o.quantization), *_rank(o)))


def _for_ram(offers: Sequence[Offer]) -> Iterator[Offer]:
    """Yield all, those of 4 bits first, then ever fewer, then ever more."""

    def key(offer: Offer) -> tuple[int, int, bool, int]:
        bits = n_bits(offer.quantization)
        if bits > _USUAL_BITS:
            return (bits, 0, *_rank(offer))
        return (0, -bits, *_rank(offer))

    usual = [o for o in offers if n_bits(o.quantization) == _USUAL_BITS]
    more = [o for o in offers if n_bits(o.quantization) > _USUAL_BITS]
    if usual:
        yield from sorted(offers, key=key)
        return
    # Without any of 4 bits, the next ones up before those that lose much.
    yield from sorted(more, key=key)
    yield from sorted((o for o in offers if o not in more), key=key)


def _rank(offer: Offer) -> tuple[bool, int]:
    return not offer.quantization.endswith(_PREFERRED), -offer.size_bytes


def _why(offer: Offer) -> str:
    bits = n_bits(offer.quantization)
    if bits == _USUAL_BITS:
        return "in RAM, more bits would cost more time than they are worth"
    if bits < _USUAL_BITS:
        return "the most bits that fit here"
    return "the fewest bits that are offered and worth it"
