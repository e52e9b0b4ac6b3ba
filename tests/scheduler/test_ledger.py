"""What a snapshot can't know, and what comes back when residents leave."""

from __future__ import annotations

from msgspec.structs import replace

from shimpy.placement.placement import DeviceUse, HostUse, PlanOptions, Rung
from shimpy.protocol.messages import BufferUse, Ready
from shimpy.scheduler.ledger import Ledger, rung_fits, use_of
from shimpy.scheduler.states import Phase, Purpose, Resident, WorkerId
from tests.scheduler.support import MIB, make_hardware, make_model, make_shape, plan, taken

EMPTY = make_hardware(ram_mib=1000, vram_mib=1000, others_mib=1000)
PURPOSE = Purpose(loaded_for=PlanOptions(), asked=PlanOptions(), default_n_ctx=0)


def make_rung(*, vram: int = 0, ram: int = 0, locked: bool = True) -> Rung:
    """A rung that takes so many MiB."""
    base = plan(make_shape(dense_mib=0), EMPTY, PlanOptions()).ladder[0]
    device = replace(base.devices[0], weights_bytes=vram * MIB)
    host = replace(base.host, weights_bytes=ram * MIB, locked=locked)
    return replace(base, devices=(device,), host=host)


def make_resident(rung: Rung, *, phase: Phase = Phase.READY, worker: int = 1) -> Resident:
    ready = None if phase is Phase.LOADING else make_ready(is_mapped=not rung.host.locked)
    return Resident(
        worker=WorkerId(worker),
        model=make_model(),
        purpose=PURPOSE,
        rung=rung,
        lower_rungs=(),
        keep_alive_s=1,
        n_threads=1,
        started_s=0,
        phase=phase,
        ready=ready,
    )


def make_ready(memory: list[BufferUse] | None = None, *, is_mapped: bool = True) -> Ready:
    return Ready(
        memory=memory or [],
        n_ctx=1,
        n_ctx_train=1,
        n_slots=1,
        n_vocab=1,
        n_embd=1,
        load_s=1.0,
        is_mapped=is_mapped,
    )


def free_mib(hardware_like: Ledger, *gone: Resident) -> tuple[int, int]:
    """Return what is left on the GPU and in RAM when some have gone."""
    left = hardware_like.remaining(without=gone)
    return left.gpus[0].free_bytes // MIB, left.host.available_bytes // MIB


def test_what_loads_is_counted_though_no_snapshot_shows_it() -> None:
    loading = make_resident(make_rung(vram=300, ram=200), phase=Phase.LOADING)
    assert free_mib(Ledger(EMPTY, [loading])) == (700, 800)


def test_what_is_loaded_is_in_the_snapshot_already() -> None:
    resident = make_resident(make_rung(vram=300, ram=200))
    snapshot = taken(EMPTY, vram=300 * MIB, ram=200 * MIB)
    ledger = Ledger(snapshot, [resident])
    assert free_mib(ledger) == (700, 800)
    assert free_mib(ledger, resident) == (1000, 1000)


def test_buffers_that_were_never_touched_are_counted() -> None:
    """They show as free. With no other program, the total tells better."""
    alone = make_hardware(ram_mib=1000, vram_mib=1000)
    resident = make_resident(make_rung(vram=300, ram=200))
    assert free_mib(Ledger(alone, [resident])) == (700, 800)


def test_what_was_not_touched_yet_is_not_for_others() -> None:
    """The snapshot shows it as free, and no more than was taken comes back."""
    resident = make_resident(make_rung(ram=200))
    resident.untouched_bytes = 150 * MIB
    ledger = Ledger(taken(EMPTY, ram=50 * MIB), [resident])
    assert free_mib(ledger) == (1000, 800)
    assert ledger.present().host.available_bytes == 800 * MIB
    assert free_mib(ledger, resident) == (1000, 1000)


def test_mapped_weights_are_available_to_the_system_but_not_to_others() -> None:
    resident = make_resident(make_rung(ram=400, locked=False))
    ledger = Ledger(EMPTY, [resident])
    assert free_mib(ledger)[1] == 600
    assert free_mib(ledger, resident)[1] == 1000


def test_what_is_locked_in_its_file_is_counted_though_the_system_calls_it_available() -> None:
    resident = make_resident(make_rung(ram=400))
    resident.ready = make_ready([BufferUse("CPU", 390 * MIB, 20 * MIB, 0)], is_mapped=True)
    use = use_of(resident)
    assert (use.host, use.mapped) == (20 * MIB, 400 * MIB)
    ledger = Ledger(taken(EMPTY, ram=20 * MIB), [resident])
    assert free_mib(ledger)[1] == 580
    assert free_mib(ledger, resident)[1] == 1000


def test_stopping_workers_give_back_but_not_yet() -> None:
    stopping = make_resident(make_rung(vram=300), phase=Phase.STOPPING)
    ledger = Ledger(taken(EMPTY, vram=300 * MIB), [stopping])
    assert ledger.has_returning
    assert ledger.present().gpus[0].free_bytes == 700 * MIB
    assert free_mib(ledger)[0] == 1000


def test_what_was_really_taken_comes_back() -> None:
    """Per device, with the process's own share, and mapped weights apart."""
    rung = make_rung(vram=300, ram=100, locked=False)
    device = replace(rung.devices[0], overhead_bytes=50 * MIB)
    rung = replace(rung, devices=(device,), host=replace(rung.host, overhead_bytes=10 * MIB))
    resident = make_resident(rung)
    assert use_of(resident).devices == {"GPU0": 350 * MIB}
    resident.ready = make_ready(
        [
            BufferUse("GPU0", 200 * MIB, 30 * MIB, 4 * MIB),
            BufferUse("GPU0", 0, 0, 1 * MIB),
            BufferUse("CPU", 90 * MIB, 20 * MIB, 3 * MIB),
        ]
    )
    use = use_of(resident)
    assert use.devices == {"GPU0": (235 + 50) * MIB}
    assert (use.host, use.mapped) == ((23 + 10) * MIB, 100 * MIB)


def test_claims_are_kept_from_later_ones() -> None:
    resident = make_resident(make_rung(vram=600))
    ledger = Ledger(taken(EMPTY, vram=600 * MIB), [resident])
    ledger.claim(make_rung(vram=700, ram=10), after=[resident])
    assert free_mib(ledger) == (300, 990)
    ledger.claim(make_rung(vram=250))
    assert free_mib(ledger) == (50, 990)


def test_a_rung_fits_with_its_margin() -> None:
    device = DeviceUse(
        name="GPU0",
        free_bytes=0,
        weights_bytes=900 * MIB,
        kv_bytes=0,
        compute_bytes=0,
        overhead_bytes=0,
        margin_bytes=100 * MIB,
    )
    host = HostUse(available_bytes=0, weights_bytes=0, kv_bytes=0, compute_bytes=0, locked=True)
    rung = replace(make_rung(), devices=(device,), host=host)
    assert rung_fits(rung, EMPTY)
    assert not rung_fits(rung, taken(EMPTY, vram=1))
    assert not rung_fits(rung, replace(EMPTY, gpus=()))
