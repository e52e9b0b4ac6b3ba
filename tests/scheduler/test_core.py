"""The core's numbered cases, one by one; tests/scheduler/test_core_machine.py mixes them."""

from __future__ import annotations

import math

import pytest
from msgspec.structs import replace

from shimpy.errors import (
    DoesNotFitError,
    GgufError,
    HeldBackError,
    InvalidOptionError,
    LoadError,
    QueueFullError,
    StoppingError,
)
from shimpy.gguf.arch import ModelShape
from shimpy.placement.hardware import Hardware
from shimpy.placement.placement import Plan, PlanOptions
from shimpy.placement.planner import plan_model
from shimpy.scheduler.books import Limits
from shimpy.scheduler.policy import PATIENCE_S, most_threads
from shimpy.scheduler.states import Phase
from tests.placement.machines import machine
from tests.placement.machines import model as placement_model
from tests.scheduler.simulation import ABORTED, OUT_OF_MEMORY, Simulation
from tests.scheduler.support import make_hardware, make_model, make_shape, plan

A = make_model("a", make_shape(dense_mib=600))
B = make_model("b", make_shape(dense_mib=600))
C = make_model("c", make_shape(dense_mib=300))
SMALL = make_model("small", make_shape(dense_mib=100))
HUGE = make_model("huge", make_shape(dense_mib=5000))
MOE = make_model("moe", make_shape(dense_mib=200, expert_mib=800))
# Another program holds memory too, so that nothing follows from the total alone.
ONE_AT_A_TIME = make_hardware(ram_mib=1000, others_mib=5000)
GPU = make_hardware(ram_mib=1000, vram_mib=1000, others_mib=5000)


# --- on_request -------------------------------------------------------------------------------


def test_1_broken_stopping_or_held_back_is_rejected() -> None:
    sim = Simulation(ONE_AT_A_TIME)
    broken = sim.request(replace(A, shape=None, error="bad magic"))
    assert isinstance(sim.errors[broken], GgufError)
    sim.drain()
    assert isinstance(sim.errors[sim.request(A)], StoppingError)


def test_2_loaded_and_free_is_granted_at_once() -> None:
    sim = Simulation(ONE_AT_A_TIME)
    sim.load(A)
    request = sim.request(A)
    assert request in sim.granted
    assert sim.load_s[request] == 0
    assert sim.snapshot is None, "a loaded model needs no look at the hardware"


def test_3_a_full_queue_is_rejected_with_a_guess() -> None:
    sim = Simulation(ONE_AT_A_TIME, Limits(keep_alive_s=300, max_queue=2))
    kept = [sim.request(A) for _ in range(2)]
    error = sim.errors[sim.request(A)]
    assert isinstance(error, QueueFullError)
    assert 1 <= error.retry_after_s <= 60
    sim.settle()
    assert list(sim.granted) == kept


def test_3_the_guess_follows_how_long_requests_take() -> None:
    guesses = []
    for lease_s in (1, 100):
        sim = Simulation(ONE_AT_A_TIME, Limits(keep_alive_s=300, max_queue=10))
        for _ in range(30):
            request = sim.request(A)
            sim.settle()
            sim.advance(lease_s)
            sim.release(request)
        for _ in range(13):
            sim.request(A)
        error = sim.errors[sim.request(A)]
        assert isinstance(error, QueueFullError)
        guesses.append(error.retry_after_s)
    # 10 wait, 3 are served at once: half of the queue is gone after 10 / 3 / 2 leases.
    assert guesses == pytest.approx([10 / 3 / 2, 60], rel=0.01)


def test_3_a_queue_of_none_still_serves_what_is_loaded() -> None:
    sim = Simulation(ONE_AT_A_TIME, Limits(keep_alive_s=300, max_queue=1))
    sim.load(A)
    places = [sim.request(A) for _ in range(3)]
    assert list(sim.granted) == places
    sim.request(A)
    assert isinstance(sim.errors[sim.request(A)], QueueFullError)


def test_4_waits_for_a_place_in_order() -> None:
    sim = Simulation(ONE_AT_A_TIME)
    sim.load(A)
    places = [sim.request(A) for _ in range(3)]
    fourth, fifth = sim.request(A), sim.request(A)
    sim.release(places[1])
    assert sim.waiting == [fifth]
    assert fourth in sim.granted


def test_4_joins_a_load() -> None:
    sim = Simulation(ONE_AT_A_TIME)
    first = sim.request(A)
    sim.probed()
    sim.advance(2)
    second = sim.request(A)
    sim.advance(3)
    sim.ready(sim.of_phase(Phase.LOADING)[0])
    assert sim.load_s == {first: 5, second: 3}


def test_4_a_loaded_model_passes_a_load() -> None:
    sim = Simulation(make_hardware())
    sim.load(A)
    sim.request(B)
    sim.probed()
    assert sim.request(A) in sim.granted


def test_a_load_that_nobody_waits_for_any_more_is_given_up() -> None:
    sim = Simulation(ONE_AT_A_TIME)
    leaves, stays = sim.request(A), sim.request(A)
    sim.probed()
    sim.cancel(leaves)
    assert not sim.of_phase(Phase.STOPPING)
    sim.cancel(stays)
    assert sim.of_phase(Phase.STOPPING)


# --- on_hardware ------------------------------------------------------------------------------


def test_two_loads_at_once_count_each_other() -> None:
    """Neither is in the snapshot yet: the first one's forecast is kept for it."""
    sim = Simulation(ONE_AT_A_TIME)
    first, second = sim.request(A), sim.request(B)
    sim.probed()
    assert len(sim.processes) == 1
    sim.settle()
    assert list(sim.granted) == [first]
    sim.release(first)
    sim.settle()
    assert list(sim.granted) == [second]


def test_a_snapshot_that_was_overtaken_is_taken_again() -> None:
    """It may show the memory of before a load, and the load counts no more as a forecast."""
    sim = Simulation(ONE_AT_A_TIME)
    sim.request(A)
    sim.probed()
    (worker,) = sim.processes
    sim.processes[worker].is_visible = False
    sim.request(B)
    sim.ready(worker)
    sim.probed()
    assert sim.snapshot is not None
    assert len(sim.processes) == 1


def test_experts_go_to_ram_before_anyone_is_evicted() -> None:
    sim = Simulation(GPU)
    sim.load(A)
    worker = sim.load(MOE)
    assert sim.processes[worker].rung.placement.mode == "experts-in-ram"
    assert sim.resident(A) is not None


def test_a_dense_model_evicts_rather_than_crawl() -> None:
    """On the CPU it would fit beside the idle one, at a small part of its speed."""
    sim = Simulation(GPU)
    sim.load(A)
    worker = sim.load(B)
    assert sim.processes[worker].rung.placement.mode == "gpu"
    assert sim.resident(A) is None
    assert sim.kinds("evict")[0].reason == (
        "its memory was needed for b:latest (600.0 MiB of GPU0)"
    )
    assert sim.stops == [("a:latest", True)]


def test_a_dense_model_crawls_rather_than_wait_for_a_busy_one() -> None:
    sim = Simulation(GPU)
    sim.load(A)
    sim.request(A)
    worker = sim.load(B)
    assert sim.processes[worker].rung.placement.mode == "cpu"


def test_the_least_recently_used_of_the_cheapest_leaves() -> None:
    sim = Simulation(make_hardware(ram_mib=1000, others_mib=5000))
    for name, load_s in (("quick-old", 1.0), ("slow", 30.0), ("quick-new", 1.5)):
        request = sim.request(make_model(name, C.shape))
        sim.probed()
        sim.ready(sim.of_phase(Phase.LOADING)[0], load_s)
        sim.advance(1)
        sim.release(request)
    sim.load(make_model("new", C.shape))
    assert [event.model for event in sim.kinds("evict")] == ["quick-old:latest"]


def test_no_more_leave_than_must() -> None:
    """The small one is the first to go, but without the large one its going is no help."""
    sim = Simulation(ONE_AT_A_TIME)
    sim.load(SMALL)
    sim.load(A)
    sim.load(B)
    assert [event.model for event in sim.kinds("evict")] == ["a:latest"]
    assert sim.resident(SMALL) is not None


def test_a_busy_one_is_waited_for() -> None:
    sim = Simulation(ONE_AT_A_TIME)
    sim.load(A)
    busy = sim.request(A)
    waits = sim.request(B)
    sim.settle()
    assert sim.waiting == [waits]
    assert sim.kinds("wait")[0].reason.startswith("its memory is held by a:latest")
    sim.release(busy)
    sim.settle()
    assert waits in sim.granted


def test_what_comes_back_from_a_stopping_worker_is_waited_for() -> None:
    sim = Simulation(GPU)
    worker = sim.load(A)
    sim.do(sim.core.on_unload("a:latest", sim.now))
    sim.request(B)
    sim.probed()
    assert list(sim.processes) == [worker], "on the CPU it would have fitted at once"
    sim.exits(worker)
    sim.settle()
    assert sim.processes[sim.of_phase(Phase.READY)[0]].rung.placement.mode == "gpu"


LARGE = make_model("large", make_shape(dense_mib=650))


def test_memory_that_is_coming_back_is_promised_once() -> None:
    """`c` would fit in what is free now, but then `large` would not when `a` has gone."""
    sim = Simulation(make_hardware(ram_mib=900, others_mib=5000))
    worker = sim.load(A)
    first, second = sim.request(LARGE), sim.request(C)
    sim.probed()
    assert sim.of_phase(Phase.STOPPING) == list(sim.processes) == [worker]
    sim.exits(worker)
    sim.settle()
    assert list(sim.granted) == [first]
    sim.release(first)
    sim.settle()
    assert list(sim.granted) == [second]


def test_memory_that_is_coming_back_stays_promised() -> None:
    """Also in the pass after the one that stopped `a`."""
    sim = Simulation(make_hardware(ram_mib=900, others_mib=5000))
    worker = sim.load(A)
    sim.request(LARGE)
    sim.probed()
    sim.request(C)
    sim.probed()
    assert sim.of_phase(Phase.STOPPING) == list(sim.processes) == [worker]


def test_what_never_fits_is_rejected_though_others_are_resident() -> None:
    sim = Simulation(ONE_AT_A_TIME)
    sim.load(A)
    request = sim.request(HUGE)
    sim.probed()
    error = sim.errors[request]
    assert isinstance(error, DoesNotFitError)
    assert error.message == "huge:latest does not fit on this machine: cpu lacks 4000 MiB"
    assert sim.resident(A) is not None


def test_the_planners_refusal_reaches_only_those_who_asked() -> None:
    def picky(shape: ModelShape, hardware: Hardware, options: PlanOptions) -> Plan:
        if options.n_slots == 999:
            raise InvalidOptionError("n_slots is 999", option="n_slots")
        return plan(shape, hardware, options)

    sim = Simulation(ONE_AT_A_TIME, planner=picky)
    refused = [sim.request(A, PlanOptions(n_slots=999)) for _ in range(2)]
    served = sim.request(A)
    sim.settle()
    for request in refused:
        error = sim.errors[request]
        assert isinstance(error, InvalidOptionError)
        assert error.option == "n_slots"
    assert served in sim.granted


# --- patience ---------------------------------------------------------------------------------


def test_nobody_waits_for_ever() -> None:
    """After PATIENCE_S a busy model takes no newer requests; then both are served in turn."""
    sim = Simulation(ONE_AT_A_TIME)
    sim.load(A)
    busy = sim.request(A)
    waits = sim.request(B)
    sim.settle()
    early = sim.request(A)
    assert early in sim.granted, "a loaded model does not wait for another's load"
    sim.release(early)
    sim.advance(PATIENCE_S)
    sim.settle()
    late = sim.request(A)
    assert late in sim.waiting
    sim.release(busy)
    sim.settle()
    assert waits in sim.granted
    sim.release(waits)
    sim.settle()
    assert late in sim.granted


def test_those_who_came_first_are_served_first() -> None:
    """A model that has to yield still serves what arrived before the one it yields to."""
    sim = Simulation(ONE_AT_A_TIME)
    sim.load(A)
    places = [sim.request(A) for _ in range(3)]
    older = sim.request(A)
    waits = sim.request(B)
    sim.settle()
    sim.advance(PATIENCE_S)
    sim.settle()
    newer = sim.request(A)
    sim.release(places[0])
    assert older in sim.granted
    assert sim.waiting == [waits, newer]


def test_yielding_ends_with_the_one_it_was_for() -> None:
    sim = Simulation(ONE_AT_A_TIME)
    sim.load(A)
    sim.request(A)
    waits = sim.request(B)
    sim.settle()
    sim.advance(PATIENCE_S)
    sim.settle()
    late = sim.request(A)
    assert late in sim.waiting
    sim.cancel(waits)
    assert late in sim.granted


def test_yielding_ends_when_the_memory_is_found_elsewhere() -> None:
    """`b` gets the memory of `c`, so `a` has no reason to keep its clients waiting."""
    sim = Simulation(make_hardware(ram_mib=1000, others_mib=5000))
    a = make_model("a", make_shape(dense_mib=400))
    sim.load(a)
    sim.request(a)
    other = sim.load(C)
    sim.request(make_model("b", make_shape(dense_mib=500)))
    busy = sim.request(C)
    sim.settle()
    sim.advance(PATIENCE_S)
    sim.settle()
    late = sim.request(a)
    assert late in sim.waiting
    sim.release(busy)
    sim.probed()
    sim.exits(other)
    sim.probed()
    assert sim.of_phase(Phase.LOADING), "there is room for b now"
    assert late in sim.granted


@pytest.mark.parametrize("how", ["cancelled", "served"])
def test_patience_begins_anew(how: str) -> None:
    sim = Simulation(ONE_AT_A_TIME)
    sim.load(A)
    busy = sim.request(A)
    waits = sim.request(B)
    sim.settle()
    sim.advance(PATIENCE_S)
    sim.settle()
    if how == "cancelled":
        sim.cancel(waits)
    else:
        sim.release(busy)
        sim.settle()
        sim.release(waits)
        sim.load(A)
        sim.request(A)
    sim.request(B)
    sim.settle()
    assert sim.request(A) in sim.granted


def test_the_impatient_are_not_overtaken() -> None:
    """Memory that a yielding model will give back is not given to later, smaller ones."""
    sim = Simulation(ONE_AT_A_TIME)
    sim.load(A)
    busy = sim.request(A)
    waits = sim.request(make_model("b", make_shape(dense_mib=1000)))
    sim.settle()
    sim.advance(PATIENCE_S)
    sim.settle()
    small = sim.request(SMALL)
    sim.settle()
    assert small in sim.waiting
    sim.release(busy)
    sim.settle()
    assert waits in sim.granted


# --- contexts and options ---------------------------------------------------------------------


def options(n_ctx: int | None = None, n_slots: int | None = None) -> PlanOptions:
    return PlanOptions(n_ctx=n_ctx, n_slots=n_slots)


@pytest.mark.parametrize(
    ("asked", "n_loads"),
    [
        ([8192, 2048, 8192, None], 1),
        ([2048, 8192, 2048, 8192, 2048], 2),
        ([None, 2048, None, 4096], 1),
        # 2048 is less than anyone gets who asks for nothing.
        ([2048, None, 2048, None], 2),
        ([16384, None, 16384, None], 1),
        # No more than the default, but as much as the planner gives when memory is short.
        ([4096, None, 4096, None], 1),
    ],
)
def test_contexts_do_not_cause_a_storm_of_reloads(asked: list[int | None], n_loads: int) -> None:
    sim = Simulation(make_hardware())
    for n_ctx in asked:
        sim.load(A, options(n_ctx))
    assert len(sim.kinds("load")) == n_loads


def test_a_reload_is_for_all_who_wait() -> None:
    sim = Simulation(make_hardware())
    requests = [sim.request(A, options(n_ctx)) for n_ctx in (2048, 8192, 4096)]
    sim.settle()
    assert list(sim.granted) == requests
    assert len(sim.kinds("load")) == 1


def test_a_reload_waits_until_the_model_is_idle() -> None:
    sim = Simulation(make_hardware())
    worker = sim.load(A, options(2048))
    busy = sim.request(A, options(2048))
    longer = sim.request(A, options(8192))
    behind = sim.request(A, options(2048))
    sim.settle()
    assert list(sim.processes) == [worker]
    sim.release(busy)
    sim.settle()
    assert list(sim.granted) == [longer, behind]
    assert sim.kinds("reload")[0].reason == "a context of 8192 was asked for, 2048 is loaded"


def test_a_reload_that_cannot_be_had_leaves_the_model_alone() -> None:
    sim = Simulation(make_hardware(ram_mib=1000))
    model = make_model("a", make_shape(dense_mib=100, kv_bytes=100_000))
    worker = sim.load(model, options(2048))
    request = sim.request(model, options(1_000_000))
    sim.settle()
    assert isinstance(sim.errors[request], DoesNotFitError)
    assert list(sim.processes) == [worker]


def test_a_refusal_lets_those_behind_through() -> None:
    sim = Simulation(make_hardware(ram_mib=1000))
    model = make_model("a", make_shape(dense_mib=100, kv_bytes=100_000))
    sim.load(model, options(2048))
    busy = sim.request(model, options(2048))
    greedy = sim.request(model, options(1_000_000))
    modest = sim.request(model, options(2048))
    sim.release(busy)
    sim.probed()
    assert isinstance(sim.errors[greedy], DoesNotFitError)
    assert modest in sim.granted


def test_an_impossible_wish_is_refused_to_who_has_it() -> None:
    def picky(shape: ModelShape, hardware: Hardware, wanted: PlanOptions) -> Plan:
        if wanted.n_ctx == 999:
            raise InvalidOptionError("n_ctx is 999", option="n_ctx")
        return plan(shape, hardware, wanted)

    sim = Simulation(make_hardware(), planner=picky)
    served, refused = sim.request(A), sim.request(A, options(999))
    sim.settle()
    assert served in sim.granted
    assert refused in sim.granted, "what is loaded is long enough"


def test_the_first_is_not_refused_for_the_wish_of_another() -> None:
    sim = Simulation(make_hardware(ram_mib=1000))
    model = make_model("a", make_shape(dense_mib=100, kv_bytes=100_000))
    modest = sim.request(model, options(2048))
    greedy = sim.request(model, options(1_000_000))
    sim.settle()
    assert modest in sim.granted
    sim.release(modest)
    sim.settle()
    assert isinstance(sim.errors[greedy], DoesNotFitError)


def test_other_options_reload() -> None:
    sim = Simulation(make_hardware())
    first = sim.load(A, options(n_slots=2))
    second = sim.load(A, options(n_slots=4))
    assert first != second
    assert sim.kinds("reload")[0].reason == "other load options were asked for"


def test_who_asks_for_no_layers_on_the_gpu_takes_those_that_are_there() -> None:
    """As Ollama does: one client with num_gpu and one without must not reload in turns."""
    sim = Simulation(make_hardware())
    first = sim.load(A, PlanOptions(n_gpu_layers=0))
    assert sim.load(A) == first
    assert sim.load(A, PlanOptions(n_gpu_layers=0)) == first
    second = sim.load(A, PlanOptions(n_gpu_layers=2))
    assert second != first
    assert len(sim.kinds("reload")) == 1


def test_layers_on_the_gpu_that_are_there_already_need_no_reload() -> None:
    sim = Simulation(make_hardware(vram_mib=8000))
    first = sim.load(A)
    assert sim.load(A, PlanOptions(n_gpu_layers=999)) == first
    assert sim.kinds("reload") == []


def test_a_file_that_has_changed_is_loaded_again() -> None:
    sim = Simulation(make_hardware())
    sim.load(A)
    sim.load(replace(A, digest="other"))
    assert sim.kinds("reload")[0].reason == "its file has changed"


# --- keep_alive -------------------------------------------------------------------------------


def test_keep_alive_runs_while_idle_only() -> None:
    sim = Simulation(make_hardware())
    sim.load(A)
    assert sim.core.next_deadline_s == 300
    request = sim.request(A)
    assert sim.core.next_deadline_s is None
    sim.advance(1000)
    sim.release(request)
    assert sim.core.next_deadline_s == 1300
    sim.advance(300)
    assert sim.of_phase(Phase.STOPPING)


def test_keep_alive_of_a_request_replaces_the_residents() -> None:
    sim = Simulation(make_hardware())
    sim.load(A)
    sim.release(sim.request(A, keep_alive_s=math.inf))
    assert sim.core.next_deadline_s is None
    sim.release(sim.request(A))
    assert sim.core.next_deadline_s is None, "a request without one leaves it"
    sim.release(sim.request(A, keep_alive_s=0))
    assert sim.of_phase(Phase.STOPPING)


# --- failures ---------------------------------------------------------------------------------


def test_a_lack_of_memory_is_tried_one_rung_down_once() -> None:
    sim = Simulation(GPU)
    request = sim.request(MOE)
    sim.probed()
    (worker,) = sim.processes
    sim.load_failed(worker, out_of_memory=True)
    sim.exits(worker)
    sim.probed()
    (worker,) = sim.processes
    assert sim.processes[worker].rung.placement.mode == "experts-in-ram"
    sim.load_failed(worker, out_of_memory=True)
    error = sim.errors[request]
    assert isinstance(error, LoadError)
    assert error.out_of_memory


def test_a_death_for_lack_of_memory_is_tried_again_too() -> None:
    sim = Simulation(GPU)
    request = sim.request(MOE)
    sim.probed()
    sim.exits(next(iter(sim.processes)), OUT_OF_MEMORY)
    sim.settle()
    assert request in sim.granted


def test_a_retry_waits_for_memory_that_comes_back() -> None:
    sim = Simulation(make_hardware(ram_mib=1000, vram_mib=400, others_mib=5000))
    other = sim.load(make_model("other", make_shape(dense_mib=900)))
    assert sim.processes[other].rung.placement.mode == "cpu"
    sim.do(sim.core.on_unload("other:latest", sim.now))
    request = sim.request(C)
    sim.probed()
    worker = sim.of_phase(Phase.LOADING)[0]
    sim.load_failed(worker, out_of_memory=True)
    sim.exits(worker)
    sim.probed()
    assert list(sim.processes) == [other]
    sim.settle()
    assert request in sim.granted


def test_a_placement_short_of_the_wish_is_not_loaded_again_for_it() -> None:
    """Whatever the planner does, one wish costs one load."""

    def stingy(shape: ModelShape, hardware: Hardware, options: PlanOptions) -> Plan:
        planned = plan(shape, hardware, options)
        ladder = tuple(
            replace(rung, placement=replace(rung.placement, n_ctx=1024))
            if rung.placement.mode == "cpu"
            else rung
            for rung in planned.ladder
        )
        return replace(planned, ladder=ladder)

    sim = Simulation(GPU, planner=stingy, is_stingy=True)
    sim.request(A)
    second = sim.request(A, options(2048))
    sim.probed()
    sim.load_failed(next(iter(sim.processes)), out_of_memory=True)
    sim.settle()
    assert second in sim.waiting or second in sim.granted
    assert len(sim.kinds("load")) == 2


def test_a_retry_that_finds_no_room_is_the_end() -> None:
    sim = Simulation(GPU)
    request = sim.request(MOE)
    sim.probed()
    (worker,) = sim.processes
    sim.load_failed(worker, out_of_memory=True)
    sim.hardware = make_hardware(ram_mib=100, vram_mib=2000)
    sim.exits(worker)
    sim.probed()
    error = sim.errors[request]
    assert isinstance(error, LoadError)
    assert error.message == (
        "moe:latest could not be loaded: it said no; no placement that needs less memory fits now"
    )


@pytest.mark.parametrize("late", ["ready", "load_failed", "exit"])
def test_news_of_a_worker_that_was_given_up_is_no_news(late: str) -> None:
    sim = Simulation(make_hardware())
    request = sim.request(A)
    sim.probed()
    (worker,) = sim.processes
    sim.cancel(request)
    before = list(sim.events)
    if late == "ready":
        sim.ready(worker)
    elif late == "load_failed":
        sim.load_failed(worker)
    else:
        sim.exits(worker)
        sim.do(sim.core.on_worker_exit(worker, ABORTED, sim.now))
    assert sim.events == before
    assert not sim.of_phase(Phase.READY)


def test_drain_gives_up_loads_and_keeps_leases() -> None:
    sim = Simulation(make_hardware())
    kept, idle = sim.load(A), sim.load(B)
    lease = sim.request(A)
    waits = sim.request(C)
    sim.probed()
    loading = sim.of_phase(Phase.LOADING)
    sim.do(sim.core.on_drain(sim.now))
    assert isinstance(sim.errors[waits], StoppingError)
    assert set(sim.of_phase(Phase.STOPPING)) == {idle, *loading}
    sim.release(lease)
    assert set(sim.of_phase(Phase.STOPPING)) == {kept, idle, *loading}


def test_a_retry_ends_with_those_who_waited_for_it() -> None:
    sim = Simulation(GPU)
    request = sim.request(MOE)
    sim.probed()
    sim.load_failed(next(iter(sim.processes)), out_of_memory=True)
    sim.cancel(request)
    worker = sim.load(MOE)
    assert sim.processes[worker].rung.placement.mode == "gpu"


def test_deaths_hold_a_model_back_for_longer_and_longer() -> None:
    sim = Simulation(make_hardware())
    for hold_s in (0, 0, 10, 20, 40, 80, 160, 300, 300):
        request = sim.request(A)
        sim.settle()
        assert request in sim.granted
        sim.exits(sim.of_phase(Phase.READY)[0], ABORTED)
        refused = sim.request(A)
        if hold_s:
            error = sim.errors[refused]
            assert isinstance(error, HeldBackError)
            assert error.retry_after_s == hold_s
            assert "the last one was aborted" in error.message
        else:
            sim.cancel(refused)
        sim.settle()
        sim.advance(hold_s)


def test_a_completed_request_forgives_deaths() -> None:
    sim = Simulation(make_hardware())
    for _ in range(5):
        sim.request(A)
        sim.settle()
        sim.exits(sim.of_phase(Phase.READY)[0], ABORTED)
        sim.load(A)
        sim.exits(sim.of_phase(Phase.READY)[0], ABORTED)
    assert not sim.kinds("held")


def test_those_behind_the_dead_get_a_fresh_worker() -> None:
    sim = Simulation(make_hardware())
    sim.load(A)
    for _ in range(3):
        sim.request(A)
    behind = sim.request(A)
    sim.exits(sim.of_phase(Phase.READY)[0], ABORTED)
    sim.settle()
    assert list(sim.granted) == [behind]


# --- threads ----------------------------------------------------------------------------------


def test_busy_workers_share_the_cores() -> None:
    sim = Simulation(make_hardware(n_cores=6))
    a, b, c = (sim.load(model) for model in (A, B, C))
    one = sim.request(A)
    assert sim.threads[a] == 6
    two = sim.request(B)
    sim.request(C)
    assert [sim.threads[worker] for worker in (a, b, c)] == [2, 2, 2]
    sim.release(one)
    sim.release(two)
    assert sim.threads[c] == 6


def test_a_model_on_the_gpu_takes_none_of_them() -> None:
    sim = Simulation(make_hardware(n_cores=6, vram_mib=600, ram_mib=10_000))
    gpu = sim.load(A)
    sim.request(A)
    cpu = sim.resident(A) and sim.load(B)
    assert cpu is not None
    sim.request(B)
    assert (sim.threads[gpu], sim.threads[cpu]) == (4, 6)


@pytest.mark.parametrize(
    ("mib", "on_gpu", "is_embedding", "expected"),
    [(8, False, False, 1), (40, False, False, 2), (4000, False, False, 6),
     (4000, True, False, 4), (8, False, True, 6)],
)  # fmt: skip
def test_a_small_model_gets_no_more_threads_than_it_has_work_for(
    mib: int, on_gpu: bool, is_embedding: bool, expected: int
) -> None:
    shape = replace(
        placement_model(n_layer=1, dense_mib=mib, n_expert=0),
        output_bytes=0,
        is_embedding=is_embedding,
    )
    plan = plan_model(shape, machine(24) if on_gpu else machine())
    assert plan.chosen is not None
    assert most_threads(shape, plan.chosen.placement, 6) == expected


def test_a_fixed_number_of_threads_is_kept() -> None:
    limits = Limits(keep_alive_s=300, max_queue=9, n_threads=3)
    sim = Simulation(make_hardware(n_cores=6), limits)
    workers = [sim.load(A), sim.load(B)]
    sim.request(A)
    sim.request(B)
    assert [sim.threads[worker] for worker in workers] == [3, 3]
