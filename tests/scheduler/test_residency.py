"""Who becomes smaller, who leaves, who stays and who moves up: the ladder, pins, re-planning."""

from __future__ import annotations

import math
from collections import Counter
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shimpy.errors import DoesNotFitError
from shimpy.placement.hardware import Hardware
from shimpy.placement.placement import PlanOptions
from shimpy.registry.model import Model
from shimpy.scheduler.books import Limits
from shimpy.scheduler.replanning import BARRED_S, PAUSE_S, RESIDENCE_S, SETTLED_S
from shimpy.scheduler.states import Phase
from tests.scheduler.simulation import Simulation
from tests.scheduler.support import make_hardware, make_model, make_shape, plan

DENSE = make_model("dense", make_shape(dense_mib=600))
OTHER = make_model("other", make_shape(dense_mib=600))
SMALL = make_model("small", make_shape(dense_mib=100))
MOE = make_model("moe", make_shape(dense_mib=200, expert_mib=800))
LIGHT_MOE = make_model("light-moe", make_shape(dense_mib=100, expert_mib=300))
GPU = make_hardware(ram_mib=2000, vram_mib=1000, others_mib=5000)
CPU = make_hardware(ram_mib=1000, others_mib=5000)
MARGIN_MIB = 20
LONG_S = 4 * (SETTLED_S + RESIDENCE_S + PAUSE_S)


def watching(hardware: Hardware, *pinned: str, keep_alive_s: float = math.inf) -> Simulation:
    """A scheduler that looks at free memory, with a margin in its plans."""
    limits = Limits(
        keep_alive_s=keep_alive_s,
        max_queue=512,
        replan_interval_s=5.0,
        pinned=frozenset(pinned),
    )
    return Simulation(hardware, limits, partial(plan, margin_mib=MARGIN_MIB))


# --- before anybody leaves --------------------------------------------------------------------


def test_a_the_new_models_experts_go_to_ram() -> None:
    sim = Simulation(GPU)
    sim.load(DENSE)
    sim.load(MOE)
    assert (sim.mode(DENSE), sim.mode(MOE)) == ("gpu", "experts-in-ram")
    assert not sim.kinds("shrunk")


def test_b_an_idle_models_experts_go_to_ram() -> None:
    sim = Simulation(GPU)
    sim.load(MOE)
    assert sim.mode(MOE) == "gpu"
    sim.load(DENSE)
    assert (sim.mode(DENSE), sim.mode(MOE)) == ("gpu", "experts-in-ram")
    assert not sim.kinds("evict")
    (shrunk,) = sim.kinds("shrunk")
    assert shrunk.reason == (
        "its memory was needed for dense:latest: its experts move to RAM, its VRAM goes from "
        "1000.0 MiB to 200.0 MiB"
    )


def test_who_waits_is_served_before_the_smaller_one_comes_back() -> None:
    sim = Simulation(GPU)
    moe = sim.load(MOE)
    request = sim.request(DENSE)
    sim.probed()
    sim.exits(moe)
    sim.probed()
    assert [process.model.digest for process in sim.processes.values()] == ["dense"]
    sim.ready(sim.of_phase(Phase.LOADING)[0])
    assert request in sim.granted
    sim.settle()
    assert sim.mode(MOE) == "experts-in-ram"


@pytest.mark.parametrize(("dense_mib", "smaller"), [(300, LIGHT_MOE), (600, MOE)])
def test_the_first_that_suffices_becomes_smaller(dense_mib: int, smaller: Model) -> None:
    """The light one was used less recently: it goes first where that is enough."""
    sim = Simulation(make_hardware(ram_mib=2000, vram_mib=1450, others_mib=5000))
    sim.load(LIGHT_MOE)
    sim.advance(1)
    sim.load(MOE)
    sim.load(make_model("third", make_shape(dense_mib=dense_mib)))
    modes = {model.digest: sim.mode(model) for model in (MOE, LIGHT_MOE)}
    assert modes == {"moe": "gpu", "light-moe": "gpu"} | {smaller.digest: "experts-in-ram"}


def test_c_then_one_leaves() -> None:
    """There is too little RAM for anybody's experts."""
    sim = Simulation(make_hardware(ram_mib=500, vram_mib=1000, others_mib=5000))
    sim.load(MOE)
    sim.load(DENSE)
    assert (sim.mode(DENSE), sim.mode(MOE)) == ("gpu", None)


@pytest.mark.parametrize("wish", [PlanOptions(cpu_moe="off"), PlanOptions(n_gpu_layers=2)])
def test_experts_that_somebody_wants_on_the_gpu_stay_there(wish: PlanOptions) -> None:
    sim = Simulation(GPU)
    sim.load(MOE, wish)
    sim.load(DENSE)
    assert sim.mode(MOE) is None


def test_a_busy_model_is_not_made_smaller() -> None:
    sim = Simulation(GPU)
    sim.load(MOE)
    busy = sim.request(MOE)
    sim.load(DENSE)
    assert (sim.mode(DENSE), sim.mode(MOE)) == ("cpu", "gpu")
    assert busy in sim.granted


def test_a_smaller_model_keeps_its_keep_alive_and_its_turn() -> None:
    sim = Simulation(GPU)
    sim.load(MOE)
    sim.release(sim.request(MOE, keep_alive_s=50))
    sim.advance(30)
    sim.load(DENSE)
    assert sim.mode(MOE) == "experts-in-ram"
    sim.advance(20)
    assert sim.of_phase(Phase.STOPPING) == [sim.resident(MOE)]


def test_a_request_for_the_one_that_becomes_smaller_waits_for_it() -> None:
    sim = Simulation(GPU)
    sim.load(MOE)
    sim.request(DENSE)
    sim.probed()
    request = sim.request(MOE)
    sim.settle()
    assert request in sim.granted
    assert (sim.mode(DENSE), sim.mode(MOE)) == ("gpu", "experts-in-ram")


def test_a_smaller_placement_is_given_up_for_who_waits() -> None:
    """While the model is unloaded anyway, nobody else leaves in its stead."""
    sim = Simulation(make_hardware(ram_mib=850, vram_mib=1000, others_mib=5000))
    moe = sim.load(MOE)
    first = sim.request(DENSE)
    sim.probed()
    # Too large for the GPU beside the first, and for the RAM beside the experts.
    second = sim.request(OTHER, PlanOptions())
    sim.exits(moe)
    sim.settle()
    assert {first, second} <= sim.granted.keys()
    assert sim.mode(MOE) is None
    assert sim.kinds("evict")[0].reason == "its memory was needed for other:latest"


def test_the_load_of_a_smaller_one_is_given_up_too() -> None:
    sim = Simulation(make_hardware(ram_mib=850, vram_mib=1000, others_mib=5000))
    moe = sim.load(MOE)
    first = sim.request(DENSE)
    sim.probed()
    sim.exits(moe)
    sim.probed()
    sim.ready(sim.of_phase(Phase.LOADING)[0])
    sim.probed()
    assert sim.of_phase(Phase.LOADING) == [sim.resident(MOE)]
    second = sim.request(OTHER)
    sim.settle()
    assert {first, second} <= sim.granted.keys()
    assert sim.mode(MOE) is None


# --- pins -------------------------------------------------------------------------------------


def test_a_pinned_model_is_not_evicted_and_the_refusal_names_it() -> None:
    sim = Simulation(CPU)
    sim.load(DENSE)
    sim.pin(DENSE)
    request = sim.request(OTHER)
    sim.probed()
    error = sim.errors[request]
    assert isinstance(error, DoesNotFitError)
    assert error.message == (
        "other:latest does not fit on this machine: pinned models hold its memory: "
        "dense:latest (600.0 MiB of RAM); unpin one. cpu lacks 200 MiB"
    )
    assert sim.mode(DENSE) == "cpu"


def test_what_would_not_fit_anyway_is_not_blamed_on_pins() -> None:
    sim = Simulation(CPU)
    sim.load(SMALL)
    sim.pin(SMALL)
    request = sim.request(make_model("huge", make_shape(dense_mib=5000)))
    sim.probed()
    assert "pinned" not in sim.errors[request].message


def test_a_pinned_model_is_not_made_smaller() -> None:
    sim = Simulation(GPU)
    sim.load(MOE)
    sim.pin(MOE)
    sim.load(DENSE)
    assert (sim.mode(DENSE), sim.mode(MOE)) == ("cpu", "gpu")


def test_a_pinned_model_outlives_its_keep_alive() -> None:
    sim = Simulation(CPU, Limits(keep_alive_s=10, max_queue=9, pinned=frozenset({"small:latest"})))
    sim.load(SMALL)
    sim.release(sim.request(SMALL, keep_alive_s=0))
    assert sim.core.next_deadline_s is None
    sim.advance(1000)
    assert sim.mode(SMALL) == "cpu"
    sim.pin(SMALL, pinned=False)
    sim.settle()
    assert sim.mode(SMALL) is None, "its last keep_alive was 0"


def test_pins_come_and_go_with_the_limits_but_not_those_of_people() -> None:
    sim = Simulation(CPU)
    sim.load(SMALL)
    sim.pin(DENSE)
    limits = Limits(keep_alive_s=300, max_queue=9, pinned=frozenset({"small:latest"}))
    sim.core.on_limits(limits)
    assert sim.core.residents[sim.of_phase(Phase.READY)[0]].is_pinned
    assert sim.core.is_pinned("dense:latest")
    sim.core.on_limits(Limits(keep_alive_s=300, max_queue=9))
    assert not sim.core.is_pinned("small:latest")
    assert sim.core.is_pinned("dense:latest")


def test_pinning_twice_is_told_once() -> None:
    sim = Simulation(CPU)
    for _ in range(2):
        sim.pin(SMALL)
    assert [event.kind for event in sim.events] == ["pinned"]


def test_unpinned_it_makes_room() -> None:
    sim = Simulation(CPU)
    sim.load(DENSE)
    sim.pin(DENSE)
    sim.pin(DENSE, pinned=False)
    sim.load(OTHER)
    assert sim.mode(DENSE) is None


def test_a_pinned_model_can_be_unloaded_by_name() -> None:
    """It is kept again once it is loaded again."""
    sim = Simulation(CPU)
    sim.load(SMALL)
    sim.pin(SMALL)
    sim.unload(SMALL)
    sim.settle()
    assert sim.mode(SMALL) is None
    sim.load(SMALL)
    assert sim.core.residents[sim.of_phase(Phase.READY)[0]].is_pinned


# --- memory comes free ------------------------------------------------------------------------


ROOMY = make_hardware(ram_mib=2000, vram_mib=1400, others_mib=5000)


def test_a_model_moves_up_when_another_program_leaves() -> None:
    sim = watching(ROOMY)
    sim.others_take(vram_share=0.7)
    sim.load(MOE)
    assert sim.mode(MOE) == "experts-in-ram"
    sim.watch(2 * RESIDENCE_S)
    assert not sim.kinds("moved_up")
    sim.others_take()
    sim.watch(SETTLED_S - 6)
    assert not sim.kinds("moved_up"), "it may come back at any moment"
    sim.watch(12)
    (moved,) = sim.kinds("moved_up")
    assert moved.reason == (
        "1.4 GiB of GPU0 would be free without it for 30s: from experts of 1 layers in RAM, "
        "context 8192, 2 slots to all on the GPU, context 8192, 2 slots"
    )
    assert sim.mode(MOE) == "gpu"
    sim.watch(LONG_S)
    assert len(sim.kinds("moved_up")) == 1


def test_a_model_moves_up_when_a_neighbour_leaves() -> None:
    sim = watching(ROOMY)
    sim.load(DENSE)
    sim.load(MOE)
    assert sim.mode(MOE) == "experts-in-ram"
    sim.unload(DENSE)
    sim.watch(LONG_S)
    assert sim.mode(MOE) == "gpu"


def test_memory_that_comes_and_goes_moves_nobody() -> None:
    sim = watching(ROOMY)
    sim.others_take(vram_share=0.7)
    sim.load(MOE)
    for _ in range(40):
        sim.others_take()
        sim.watch(SETTLED_S - 6)
        sim.others_take(vram_share=0.7)
        sim.watch(6)
    assert not sim.kinds("moved_up")


def test_a_model_in_use_does_not_move() -> None:
    sim = watching(ROOMY)
    sim.others_take(vram_share=0.7)
    sim.load(MOE)
    sim.others_take()
    busy = sim.request(MOE)
    sim.watch(LONG_S)
    assert not sim.kinds("moved_up")
    sim.release(busy)
    sim.watch(LONG_S)
    assert sim.mode(MOE) == "gpu"


def test_nobody_moves_while_somebody_waits() -> None:
    """`other` waits for the busy one's RAM; what is free of the VRAM is not for the taking."""
    sim = watching(make_hardware(ram_mib=1900, vram_mib=1100, others_mib=5000))
    sim.others_take(vram_share=0.7)
    sim.load(MOE)
    busy = sim.request(make_model("busy", make_shape(dense_mib=900)))
    sim.settle()
    assert busy in sim.granted
    waits = sim.request(make_model("waits", make_shape(dense_mib=1200)))
    sim.settle()
    assert waits in sim.waiting
    sim.others_take()
    sim.release(sim.request(MOE))
    sim.watch(20)
    assert not sim.kinds("moved_up")


def test_a_request_during_the_move_waits_for_the_load() -> None:
    sim = watching(ROOMY)
    sim.others_take(vram_share=0.7)
    sim.load(MOE)
    sim.watch(RESIDENCE_S)
    sim.others_take()
    while not sim.kinds("moved_up"):
        sim.advance(5)
        if sim.snapshot is not None:
            sim.probed()
    request = sim.request(MOE)
    sim.settle()
    assert request in sim.granted
    assert sim.mode(MOE) == "gpu"
    assert len(sim.kinds("load")) == 2


def test_one_moves_at_a_time() -> None:
    hardware = make_hardware(ram_mib=3000, vram_mib=2000, others_mib=5000)
    sim = watching(hardware)
    sim.others_take(vram_share=0.7)
    for model in (MOE, LIGHT_MOE):
        sim.load(model)
        assert sim.mode(model) == "experts-in-ram"
    sim.others_take()
    sim.watch(LONG_S)
    first, second = sim.kinds("moved_up")
    assert second.at_s - first.at_s >= PAUSE_S


def test_a_move_that_fails_is_not_tried_again_soon() -> None:
    """It comes back one rung down, and stays there."""
    sim = watching(ROOMY)
    sim.others_take(vram_share=0.7)
    sim.load(MOE)
    sim.others_take()
    while not sim.kinds("moved_up"):
        sim.advance(5)
        if sim.snapshot is not None:
            sim.probed()
    sim.exits(sim.of_phase(Phase.STOPPING)[0])
    sim.probed()
    sim.load_failed(sim.of_phase(Phase.LOADING)[0], out_of_memory=True)
    sim.settle()
    assert sim.mode(MOE) == "experts-in-ram"
    sim.watch(BARRED_S - 20)
    assert len(sim.kinds("moved_up")) == 1
    sim.watch(LONG_S)
    assert len(sim.kinds("moved_up")) == 2


def test_without_models_nothing_is_looked_at() -> None:
    sim = watching(GPU)
    assert sim.core.next_deadline_s is None
    sim.load(SMALL)
    assert sim.core.next_deadline_s == sim.now + 5
    sim.unload(SMALL)
    sim.settle()
    assert sim.core.next_deadline_s is None


def test_where_a_look_takes_long_it_is_taken_less_often() -> None:
    sim = watching(GPU)
    sim.load(SMALL)
    sim.advance(5)
    sim.now += 2
    sim.probed()
    assert sim.core.next_deadline_s == sim.now + 100


# --- memory is taken --------------------------------------------------------------------------


def test_when_memory_is_taken_experts_move_to_ram() -> None:
    sim = watching(ROOMY)
    sim.load(MOE)
    sim.others_take(vram_share=1.0)
    sim.watch(6)
    assert sim.mode(MOE) == "experts-in-ram"
    (shrunk,) = sim.kinds("shrunk")
    assert shrunk.cause == "pressure"
    assert shrunk.reason == (
        "another program takes memory: GPU0 is 20.0 MiB short of its margin; its experts move "
        "to RAM, its VRAM goes from 1000.0 MiB to 200.0 MiB"
    )


def test_when_memory_is_taken_the_cheapest_leaves() -> None:
    sim = watching(make_hardware(ram_mib=1000, others_mib=5000))
    sim.load(DENSE)
    sim.advance(1)
    sim.load(SMALL)
    sim.others_take(ram_share=1.0)
    sim.watch(6)
    assert [event.model for event in sim.kinds("evict")] == ["dense:latest"], "used first"
    assert sim.kinds("evict")[0].cause == "pressure"
    assert sim.mode(SMALL) == "cpu"


def test_a_model_made_smaller_for_another_program_does_not_come_back_at_once() -> None:
    """Its old placement just fits by the plan, which has proved too tight."""
    sim = watching(make_hardware(ram_mib=2000, vram_mib=1020, others_mib=5000))
    sim.load(MOE)
    assert sim.mode(MOE) == "gpu"
    sim.others_take(vram_share=0.9)
    sim.watch(6)
    sim.others_take()
    sim.watch(LONG_S)
    assert sim.mode(MOE) == "experts-in-ram", "and there is no headroom for more"
    assert len(sim.kinds("load")) == 2


def test_a_margin_that_is_half_there_is_left_alone() -> None:
    sim = watching(make_hardware(ram_mib=120, others_mib=5000))
    sim.load(SMALL)
    sim.others_take(ram_share=0.5)
    sim.watch(60)
    assert sim.mode(SMALL) == "cpu"


def test_who_is_busy_or_pinned_stays_whatever_others_take() -> None:
    sim = watching(CPU, "small:latest")
    sim.load(SMALL)
    busy = sim.request(DENSE)
    sim.settle()
    sim.others_take(ram_share=1.0)
    sim.watch(60)
    assert (sim.mode(SMALL), sim.mode(DENSE)) == ("cpu", "cpu")
    sim.release(busy)
    sim.watch(6)
    assert (sim.mode(SMALL), sim.mode(DENSE)) == ("cpu", None)


def test_a_machine_that_stays_the_same_sees_no_storm() -> None:
    """Three models in turn for an hour, two of which fit as they like: each is loaded once more.

    Once all have found a placement in which they fit together, nobody moves any more.
    """
    sim = watching(make_hardware(ram_mib=3000, vram_mib=1300, others_mib=5000))
    for _ in range(120):
        for model in (MOE, DENSE, LIGHT_MOE):
            sim.release_when_granted(sim.request(model))
            sim.watch(10)
    assert len(sim.kinds("load")) <= 3 + len(sim.kinds("shrunk")) + len(sim.kinds("moved_up"))
    assert len(sim.kinds("shrunk")) + len(sim.kinds("moved_up")) <= 3
    assert not sim.kinds("evict")


@settings(max_examples=15, deadline=None)
@given(
    vram_mib=st.integers(300, 2600),
    ram_mib=st.integers(500, 3000),
    pattern=st.lists(
        st.sampled_from([MOE, LIGHT_MOE, DENSE, OTHER, SMALL]), min_size=1, max_size=5
    ),
    pause_s=st.sampled_from([1, 15, 70]),
)
def test_the_same_again_and_again_comes_to_rest(
    vram_mib: int, ram_mib: int, pattern: list[Model], pause_s: float
) -> None:
    """On a machine that stays the same, what is used in turn is moved a few times at most.

    After that only those are loaded that had to leave, and each of them once per use.
    """
    sim = watching(make_hardware(vram_mib=vram_mib, ram_mib=ram_mib, others_mib=5000))

    def rounds(seconds: float) -> None:
        end_s = sim.now + seconds
        while sim.now < end_s:
            for model in pattern:
                request = sim.request(model)
                sim.settle()
                if request in sim.granted:
                    sim.release(request)
                sim.watch(pause_s)

    rounds(1200)
    before = Counter(event.kind for event in sim.events)
    rounds(600)
    after = Counter(event.kind for event in sim.events)
    after.subtract(before)
    if not after["evict"]:
        assert not after["shrunk"]
        assert not after["moved_up"]
        assert not after["load"]
    assert after["load"] <= after["evict"] + after["shrunk"] + after["moved_up"]
