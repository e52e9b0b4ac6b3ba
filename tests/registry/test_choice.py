from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from shimpy.registry.choice import Choice, Verdict, choose_offer, n_bits
from shimpy.registry.offers import Offer
from shimpy.registry.remote import RemoteFile

# Sizes of an 8B model's quantizations, in MB.
SIZES = {
    "f16": 16000,
    "q8_0": 8500,
    "q6_k": 6600,
    "q5_k_m": 5700,
    "q4_k_m": 4900,
    "q4_0": 4700,
    "iq4_xs": 4500,
    "q3_k_m": 4000,
    "q2_k": 3200,
}


def offer(tag: str, size: int) -> Offer:
    file = RemoteFile(path=f"x-{tag}.gguf", size_bytes=size, digest="", open=None)  # type: ignore[arg-type]
    return Offer(quantization=tag, path=file.path, files=(file,))


class Machine:
    """Runs what its memory holds, and says how often it was asked."""

    def __init__(self, vram: int, ram: int) -> None:
        self.vram, self.ram = vram, ram
        self.asked: list[str] = []

    def weigh(self, model: Offer) -> Verdict:
        self.asked.append(model.quantization)
        need = model.size_bytes + 500
        return Verdict(
            fits=need <= self.vram + self.ram,
            is_in_vram=need <= self.vram,
            headline="",
            reason="",
            plan={},
        )

    def choose(self, *tags: str) -> Choice:
        offers = [offer(tag, SIZES[tag]) for tag in tags or SIZES]
        return choose_offer(offers, self.weigh, vram_bytes=self.vram, ram_bytes=self.ram)


@pytest.mark.parametrize(
    ("vram", "ram", "chosen"),
    [
        (24000, 64000, "q8_0"),
        (7200, 64000, "q6_k"),
        (6000, 64000, "q4_k_m"),
        (5300, 64000, "q4_0"),
        # It would fit with 2 bits: better 4 with a part in RAM.
        (4000, 64000, "q4_k_m"),
        (0, 64000, "q4_k_m"),
        (0, 5100, "iq4_xs"),
        (0, 4000, "q2_k"),
        (0, 1000, "q2_k"),
    ],
)
def test_the_machine_decides(vram: int, ram: int, chosen: str) -> None:
    choice = Machine(vram, ram).choose()
    assert choice.offer.quantization == chosen
    assert choice.why
    assert choice.verdict is not None


def test_what_fits_nowhere_is_said_of_the_smallest() -> None:
    choice = Machine(0, 1000).choose()
    assert choice.verdict is not None
    assert not choice.verdict.fits
    assert "none fits" in choice.why


def test_without_4_bits_the_next_more_come_before_fewer() -> None:
    assert Machine(0, 64000).choose("f16", "q8_0", "q2_k").offer.quantization == "q8_0"
    assert Machine(0, 5000).choose("f16", "q8_0", "q2_k").offer.quantization == "q2_k"
    assert Machine(0, 64000).choose("f16", "q2_k").offer.quantization == "f16"


def test_a_single_one_needs_no_weighing() -> None:
    machine = Machine(0, 10)
    assert machine.choose("q8_0").offer.quantization == "q8_0"
    assert machine.asked == []


def test_what_is_too_large_by_its_size_alone_is_not_asked_about() -> None:
    """Each question costs megabytes of headers."""
    machine = Machine(5000, 0)
    machine.choose()
    assert "f16" not in machine.asked
    assert "q8_0" not in machine.asked


@pytest.mark.parametrize(
    ("tag", "bits"),
    [("f16", 16), ("bf16", 16), ("q8_0", 8), ("ud-q4_k_xl", 4), ("iq2_xxs", 2), ("mxfp4", 4)],
)
def test_bits_are_in_the_name(tag: str, bits: int) -> None:
    assert n_bits(tag) == bits


@given(
    st.sets(st.sampled_from(sorted(SIZES)), min_size=1),
    st.integers(0, 30000),
    st.integers(0, 30000),
)
def test_something_that_fits_is_chosen_whenever_there_is_something(
    tags: set[str], vram: int, ram: int
) -> None:
    machine = Machine(vram, ram)
    choice = machine.choose(*sorted(tags))
    some_fit = any(SIZES[tag] + 500 <= vram + ram for tag in tags)
    if len(tags) > 1:
        assert choice.verdict is not None
        assert choice.verdict.fits == some_fit
    assert len(machine.asked) == len(set(machine.asked))
