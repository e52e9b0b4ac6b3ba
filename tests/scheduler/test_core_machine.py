"""The core under random events: whatever the order, the simulation's checks hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from enum import Enum
from functools import partial
from typing import TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from shimpy.placement.placement import PlanOptions
from shimpy.scheduler.books import Limits
from shimpy.scheduler.states import Phase
from tests.scheduler.simulation import ABORTED, OUT_OF_MEMORY, Simulation
from tests.scheduler.support import MIB, make_hardware, make_model, make_shape, plan

MODELS = {
    str(model.name): model
    for model in (
        make_model("small", make_shape(dense_mib=100, kv_bytes=1024)),
        make_model("dense", make_shape(dense_mib=600, kv_bytes=1024)),
        make_model("large", make_shape(dense_mib=900)),
        make_model("moe", make_shape(dense_mib=200, expert_mib=700)),
        make_model("light-moe", make_shape(dense_mib=100, expert_mib=300, kv_bytes=1024)),
        make_model("middle", make_shape(dense_mib=400)),
        make_model("huge", make_shape(dense_mib=9000)),
    )
}
HARDWARE = {
    "cpu": make_hardware(ram_mib=1000),
    "gpu": make_hardware(ram_mib=1500, vram_mib=1000, others_mib=4000),
    "roomy": make_hardware(ram_mib=2500, vram_mib=1300, others_mib=4000),
    "little-ram": make_hardware(ram_mib=300, vram_mib=1000),
    "little-vram": make_hardware(ram_mib=3000, vram_mib=500, others_mib=4000),
}
OPTIONS = {
    "any": PlanOptions(),
    "short": PlanOptions(n_ctx=1024),
    "long": PlanOptions(n_ctx=8192),
    "longest": PlanOptions(n_ctx=65536),
    "one-slot": PlanOptions(n_slots=1),
}
T = TypeVar("T")

# More rounds than anything can take to come to rest.
MANY = 400


class Fault(Enum):
    ABORTED = 1
    OUT_OF_MEMORY = 2
    LOAD_FAILED = 3
    LOAD_OUT_OF_MEMORY = 4


# After each event so many of the answers that are due arrive; which ones, by their index.
ANSWERS = st.lists(st.integers(0, 11), max_size=5)


class CoreMachine(RuleBasedStateMachine):
    simulation: Simulation

    @initialize(
        hardware=st.sampled_from(list(HARDWARE)),
        keep_alive_s=st.sampled_from([300.0, 10.0, 0.0]),
        max_queue=st.sampled_from([512, 3]),
        replan_interval_s=st.sampled_from([5.0, 5.0, 0.0]),
        margin_mib=st.sampled_from([20, 0]),
        pinned=st.sampled_from(["", "", "middle:latest"]),
        parked_mib=st.sampled_from([200, 1000, 0]),
    )
    def start(  # noqa: PLR0917 - called by name
        self,
        hardware: str,
        keep_alive_s: float,
        max_queue: int,
        replan_interval_s: float,
        margin_mib: int,
        pinned: str,
        parked_mib: int,
    ) -> None:
        limits = Limits(
            keep_alive_s=keep_alive_s,
            max_queue=max_queue,
            replan_interval_s=replan_interval_s,
            pinned=frozenset({pinned} - {""}),
            parked_bytes=parked_mib * MIB,
        )
        planner = partial(plan, margin_mib=margin_mib)
        self.simulation = Simulation(HARDWARE[hardware], limits, planner)

    @rule(
        models=st.lists(st.sampled_from(list(MODELS)), min_size=1, max_size=4),
        options=st.sampled_from(list(OPTIONS)),
        keep_alive_s=st.sampled_from([None, None, None, 0.0, 5.0, math.inf]),
        answers=ANSWERS,
    )
    def requests(
        self,
        models: list[str],
        options: str,
        keep_alive_s: float | None,
        answers: list[int],
    ) -> None:
        for model in models:
            self.simulation.request(MODELS[model], OPTIONS[options], keep_alive_s)
        self._answer(answers)

    @rule(models=st.lists(st.sampled_from(list(MODELS)), min_size=1, max_size=3))
    def serves(self, models: list[str]) -> None:
        """One after the other is asked for, served and left idle, where that can be."""
        simulation = self.simulation
        for model in models:
            request = simulation.request(MODELS[model])
            simulation.settle()
            if request in simulation.granted:
                simulation.release(request)
            else:
                simulation.cancel(request)

    @rule(answers=ANSWERS)
    def answers(self, answers: list[int]) -> None:
        self._answer(answers)

    @precondition(lambda self: self.simulation.granted)
    @rule(which=st.integers(0), completed=st.booleans(), answers=ANSWERS)
    def release(self, which: int, completed: bool, answers: list[int]) -> None:
        request = pick(sorted(self.simulation.granted), which)
        self.simulation.release(request, completed=completed)
        self._answer(answers)

    @precondition(lambda self: self.simulation.granted or self.simulation.waiting)
    @rule(which=st.integers(0), answers=ANSWERS)
    def cancel(self, which: int, answers: list[int]) -> None:
        simulation = self.simulation
        simulation.cancel(pick(sorted([*simulation.granted, *simulation.waiting]), which))
        self._answer(answers)

    @precondition(lambda self: self.simulation.processes)
    @rule(which=st.integers(0), fault=st.sampled_from(list(Fault)), answers=ANSWERS)
    def fault(self, which: int, fault: Fault, answers: list[int]) -> None:
        simulation = self.simulation
        worker = pick(sorted(simulation.processes), which)
        if fault is Fault.ABORTED:
            simulation.exits(worker, ABORTED)
        elif fault is Fault.OUT_OF_MEMORY:
            simulation.exits(worker, OUT_OF_MEMORY)
        elif worker in simulation.of_phase(Phase.LOADING):
            no_memory = fault is Fault.LOAD_OUT_OF_MEMORY
            simulation.load_failed(worker, out_of_memory=no_memory)
        self._answer(answers)

    @rule()
    def probe_failed(self) -> None:
        if self.simulation.snapshot is not None:
            self.simulation.snapshot = None
            core = self.simulation.core
            self.simulation.do(core.on_probe_failed("no", self.simulation.now))

    @precondition(lambda self: self.simulation.of_phase(Phase.LOADING))
    @rule(which=st.integers(0), is_visible=st.booleans())
    def allocates(self, which: int, is_visible: bool) -> None:
        worker = pick(self.simulation.of_phase(Phase.LOADING), which)
        self.simulation.processes[worker].is_visible = is_visible

    @rule(seconds=st.sampled_from([0.1, 3.0, 31.0]), answers=ANSWERS)
    def advance(self, seconds: float, answers: list[int]) -> None:
        self.simulation.advance(seconds)
        self._answer(answers)

    @rule(seconds=st.sampled_from([20.0, 70.0, 200.0]))
    def nobody_asks(self, seconds: float) -> None:
        """Long enough for models to move up, with an answer to everything."""
        for request in list(self.simulation.granted):
            self.simulation.release(request)
        self.simulation.watch(seconds)

    @rule(
        vram_share=st.sampled_from([0.0, 0.0, 0.5, 1.0]),
        ram_share=st.sampled_from([0.0, 0.0, 0.5, 1.0]),
        answers=ANSWERS,
    )
    def others_take(self, vram_share: float, ram_share: float, answers: list[int]) -> None:
        self.simulation.others_take(vram_share=vram_share, ram_share=ram_share)
        self._answer(answers)

    @precondition(lambda self: self.simulation.of_phase(Phase.READY))
    @rule(which=st.integers(0), share=st.sampled_from([1.0, 1.0, 0.5, 0.0]), answers=ANSWERS)
    def parks(self, which: int, share: float, answers: list[int]) -> None:
        self.simulation.parks(pick(self.simulation.of_phase(Phase.READY), which), share)
        self._answer(answers)

    @rule(model=st.sampled_from(list(MODELS)), pinned=st.sampled_from([False, False, True]))
    def pin(self, model: str, pinned: bool) -> None:
        self.simulation.pin(MODELS[model], pinned=pinned)

    @rule(model=st.sampled_from(list(MODELS)))
    def unload(self, model: str) -> None:
        self.simulation.unload(MODELS[model])

    def _answer(self, which: list[int]) -> None:
        """Deliver some of what the core waits for, in any order."""
        simulation = self.simulation
        for index in which:
            due: list[Callable[[], None]] = [
                *(partial(simulation.exits, w) for w in simulation.of_phase(Phase.STOPPING)),
                *(partial(simulation.ready, w) for w in simulation.of_phase(Phase.LOADING)),
                *(partial(simulation.hears, w) for w in simulation.told),
                *([simulation.probed] if simulation.snapshot is not None else []),
            ]
            if due:
                pick(due, index)()

    def teardown(self) -> None:
        """Everyone is served or told why not, with no new events but the answers to effects."""
        if not hasattr(self, "simulation"):
            return
        simulation = self.simulation
        # With the machine as it is from now on, whoever waits is served or told why not.
        for _ in range(MANY):
            simulation.settle()
            if not simulation.granted and not simulation.waiting:
                break
            for request in list(simulation.granted):
                simulation.release(request)
            if simulation.waiting:
                simulation.advance(1.0)
        assert not simulation.waiting, f"a request waits for ever: {simulation.describe()}"
        simulation.drain()
        simulation.settle()
        assert not simulation.processes


def pick(things: Sequence[T], which: int) -> T:
    return things[which % len(things)]


TestCore = CoreMachine.TestCase
TestCore.settings = settings(
    max_examples=100,
    stateful_step_count=100,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
