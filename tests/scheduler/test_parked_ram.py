"""RAM that workers have parked idle caches in: theirs as long as nobody else wants it."""

from __future__ import annotations

from functools import partial

import pytest

from shimpy.errors import DoesNotFitError
from shimpy.placement.hardware import Hardware
from shimpy.protocol.messages import Stats
from shimpy.scheduler.books import Limits
from shimpy.scheduler.policy import PARKED_SHARE, parked_share
from shimpy.scheduler.states import Phase
from tests.scheduler.simulation import Simulation
from tests.scheduler.support import MIB, make_hardware, make_model, make_shape, plan

# Another program holds memory too, so that nothing follows from the total alone.
MACHINE = make_hardware(ram_mib=1000, others_mib=5000)
A = make_model("a", make_shape(dense_mib=200))
B = make_model("b", make_shape(dense_mib=700))
LITTLE = make_model("little", make_shape(dense_mib=100))
LIMITS = Limits(keep_alive_s=300.0, max_queue=8, parked_bytes=400 * MIB, replan_interval_s=5.0)


def make_sim(hardware: Hardware = MACHINE, margin_mib: int = 0) -> Simulation:
    return Simulation(hardware, LIMITS, partial(plan, margin_mib=margin_mib))


def limit_mib(sim: Simulation, worker: int) -> float:
    return sim.core.residents[sim.of_phase(Phase.READY)[worker]].parked_limit / MIB


def test_a_load_leaves_a_quarter_of_the_rest_for_its_caches() -> None:
    sim = make_sim()
    worker = sim.load(A)
    assert sim.processes[worker].parked_limit == 800 // PARKED_SHARE * MIB
    roomy = make_sim(make_hardware(ram_mib=10_000))
    worker = roomy.load(A)
    assert roomy.processes[worker].parked_limit == LIMITS.parked_bytes


def test_caches_give_way_to_a_load_before_any_model_does() -> None:
    """And the load begins when their RAM is there, not before."""
    sim = make_sim()
    worker = sim.load(A)
    sim.parks(worker, 1.0)
    waits = sim.request(B)
    sim.probed()
    assert sim.told == [worker]
    assert len(sim.processes) == 1, "the RAM is not there yet"
    sim.hears(worker)
    assert sim.processes[worker].parked == (1000 - 200 - 700) // PARKED_SHARE * MIB
    sim.settle()
    assert waits in sim.granted
    assert sim.resident(A) == worker
    assert not sim.kinds("evict")


def test_where_there_is_room_beside_them_they_stay() -> None:
    sim = make_sim(make_hardware(ram_mib=5000))
    worker = sim.load(A)
    sim.parks(worker, 1.0)
    sim.load(B)
    assert sim.processes[worker].parked == LIMITS.parked_bytes
    assert not sim.told


def test_a_snapshot_of_before_they_gave_way_is_not_gone_by() -> None:
    """It shows their RAM as taken, and they are known to have none: `a` would have to leave."""
    sim = make_sim()
    worker = sim.load(A)
    sim.parks(worker, 1.0)
    sim.request(B)
    sim.probed()
    sim.request(LITTLE)
    assert sim.snapshot is not None
    sim.hears(worker)
    sim.settle()
    assert sim.resident(A) == worker


def test_the_margin_of_who_waits_is_kept_too() -> None:
    """All of it is wanted back, to the last byte that would be missing."""
    sim = make_sim(margin_mib=96)
    worker = sim.load(A)
    sim.parks(worker, 1.0)
    waits = sim.request(B)
    sim.settle()
    assert waits in sim.granted
    assert sim.resident(A) == worker


def test_they_are_no_reason_to_refuse() -> None:
    sim = make_sim()
    worker = sim.load(A)
    sim.parks(worker, 1.0)
    fits, never = (make_model(f"{n}", make_shape(dense_mib=n)) for n in (1000, 1001))
    served, refused = sim.request(fits), sim.request(never)
    sim.settle()
    assert isinstance(sim.errors[refused], DoesNotFitError)
    assert served in sim.granted
    assert sim.resident(A) is None


def test_they_give_way_to_other_programs_before_any_model_does() -> None:
    """And come back once these have gone."""
    sim = make_sim(margin_mib=50)
    worker = sim.load(A)
    before = limit_mib(sim, 0)
    sim.parks(worker, 1.0)
    sim.others_take(ram_share=1.0)
    sim.watch(10)
    assert sim.processes[worker].parked < 50 * MIB
    assert not sim.kinds("evict")
    sim.others_take()
    sim.watch(10)
    assert sim.processes[worker].parked_limit / MIB == limit_mib(sim, 0) == before


def test_models_share_and_those_that_park_nothing_have_no_part() -> None:
    sim = make_sim(make_hardware(ram_mib=1000, vram_mib=300, others_mib=5000))
    assert sim.processes[sim.load(A)].rung.placement.flash_attn
    assert limit_mib(sim, 0) == 0
    sim.load(make_model("one", make_shape(dense_mib=400)))
    assert limit_mib(sim, 1) == (1000 - 400) // PARKED_SHARE
    sim.load(make_model("two", make_shape(dense_mib=400)))
    sim.watch(10)
    assert limit_mib(sim, 1) == limit_mib(sim, 2) == (1000 - 800) // PARKED_SHARE // 2


@pytest.mark.parametrize(("n_left", "n_parking"), [(-1, 1), (0, 0), (3, 1)])
def test_a_share_of_nothing_is_nothing(n_left: int, n_parking: int) -> None:
    assert parked_share(n_left, n_parking) == 0


def test_what_a_worker_has_not_touched_yet_is_kept_for_it() -> None:
    """As it told with its load, and with its last Stats."""
    sim = make_sim()
    worker = sim.load(A)
    left = sim.core.present(MACHINE).host.available_bytes
    told = []
    for untouched_mib in (150, 40, 0):
        stats = Stats(0, 0, 0, untouched_bytes=untouched_mib * MIB)
        sim.do(sim.core.on_stats(worker, stats, sim.now))
        told.append((left - sim.core.present(MACHINE).host.available_bytes) // MIB)
    assert told == [150, 40, 0]
