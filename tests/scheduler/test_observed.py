"""What a load really took is what the next plan goes by, also after a restart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from shimpy.config import Config
from shimpy.placement.hardware import Hardware
from shimpy.placement.placement import Plan
from shimpy.protocol.messages import BufferUse, Load, Simulated
from shimpy.scheduler.loads import with_defaults
from shimpy.scheduler.scheduler import Scheduler
from shimpy.scheduler.simulations import Simulations
from shimpy.units import MIB
from tests.scheduler.support import make_hardware
from tests.scheduler.test_real_engine import SMALL, model_at
from tests.scheduler.test_simulations import MOE, OPTIONS, known_machine, model_with

MODEL = model_with(MOE)
MACHINE = known_machine(24)


def never(_loads: Sequence[Load], _timeout_s: float) -> Iterator[Simulated]:
    """Stands for llama.cpp where it must not be asked."""
    raise AssertionError("nothing is in doubt")
    yield


def estimate(simulations: Simulations, hardware: Hardware = MACHINE) -> Plan:
    return simulations.plan(MOE, hardware, OPTIONS)


def took(plan: Plan, *, more_mib: int) -> list[BufferUse]:
    """What a worker reports that took so much more of the card than was planned."""
    assert plan.chosen is not None
    (device,), host = plan.chosen.devices, plan.chosen.host
    compute = device.compute_bytes + more_mib * MIB
    return [
        BufferUse(device.name, device.weights_bytes, device.kv_bytes, compute),
        BufferUse("CPU", host.weights_bytes, host.kv_bytes, host.compute_bytes),
    ]


def test_the_next_plan_counts_what_was_taken() -> None:
    simulations = Simulations(None, run=never)
    plan = estimate(simulations)
    assert plan.chosen is not None
    assert simulations.observe(MODEL, plan.chosen.placement, took(plan, more_mib=300), MACHINE)
    (before,) = plan.chosen.devices
    again = estimate(simulations).chosen
    assert again is not None
    assert again.placement == plan.chosen.placement
    assert again.is_exact
    assert again.devices[0].total_bytes == before.total_bytes + 300 * MIB


@pytest.mark.parametrize("more_mib", [-200, 200])
def test_it_decides_what_fits(more_mib: int) -> None:
    """A card with 100 MiB less than the forecast has room after all, or one with more has not."""
    simulations = Simulations(None, run=never)
    plan = estimate(simulations)
    assert plan.chosen is not None
    (device,) = plan.chosen.devices
    needs = device.total_bytes + device.margin_bytes
    tight = known_machine((needs + more_mib * MIB // 2) / 2**30)
    forecast = estimate(simulations, tight).chosen
    simulations.observe(MODEL, plan.chosen.placement, took(plan, more_mib=more_mib), tight)
    informed = estimate(simulations, tight).chosen
    assert forecast is not None
    assert informed is not None
    fitted = forecast.placement == plan.chosen.placement
    assert fitted is (more_mib > 0)
    assert (informed.placement == plan.chosen.placement) is not fitted


def test_it_is_known_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "simulations.json"
    first = Simulations(path, run=never)
    plan = estimate(first)
    assert plan.chosen is not None
    first.observe(MODEL, plan.chosen.placement, took(plan, more_mib=300), MACHINE)
    second = Simulations(path, run=never)
    again = second.plan_exactly(MODEL, MACHINE, OPTIONS).chosen
    assert again is not None
    assert again.devices[0].compute_bytes == plan.chosen.devices[0].compute_bytes + 300 * MIB


def test_the_same_again_is_no_news(tmp_path: Path) -> None:
    path = tmp_path / "simulations.json"
    simulations = Simulations(path, run=never)
    plan = estimate(simulations)
    assert plan.chosen is not None
    memory = took(plan, more_mib=300)
    assert simulations.observe(MODEL, plan.chosen.placement, memory, MACHINE)
    written = path.stat().st_mtime_ns
    assert not simulations.observe(MODEL, plan.chosen.placement, memory, MACHINE)
    assert path.stat().st_mtime_ns == written


@pytest.mark.parametrize("memory", [[], [BufferUse("CUDA7", 1, 1, 1)]])
def test_a_report_that_says_nothing_teaches_nothing(memory: list[BufferUse]) -> None:
    simulations = Simulations(None, run=never)
    plan = estimate(simulations)
    assert plan.chosen is not None
    assert not simulations.observe(MODEL, plan.chosen.placement, memory, MACHINE)
    assert estimate(simulations) == plan


@pytest.mark.slow
async def test_a_real_load_teaches_what_it_took(llama_model: Path, tmp_path: Path) -> None:
    simulations = Simulations(tmp_path / "simulations.json", run=never)
    config = Config(n_threads=1)
    hardware = make_hardware(ram_mib=4000)
    model = model_at(llama_model)
    assert model.shape is not None
    async with (
        Scheduler(config, lambda: hardware, simulations=simulations) as scheduler,
        scheduler.acquire(model, SMALL) as lease,
    ):
        (host,) = lease.ready.memory
    chosen = simulations.plan(model.shape, hardware, with_defaults(SMALL, config)).chosen
    assert chosen is not None
    assert chosen.is_exact
    assert chosen.host.kv_bytes == host.context_bytes > 0
    assert (tmp_path / "simulations.json").exists()
