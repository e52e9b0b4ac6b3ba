"""Exact figures: asked for where they may change a plan, kept, and done without where they fail."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from shimpy.config import Config
from shimpy.gguf.arch import ModelShape
from shimpy.names import parse_model_name
from shimpy.placement.figures import Setup, use_from_buffers
from shimpy.placement.hardware import Hardware, suppose
from shimpy.placement.memory import Context, Layout, MemoryUse, Use, estimate_memory
from shimpy.placement.placement import PlanOptions
from shimpy.placement.planner import plan_model
from shimpy.protocol.messages import BufferUse, Load, Simulated
from shimpy.registry.model import Model
from shimpy.registry.registry import model_of_files
from shimpy.scheduler.loads import load_message, simulated_load
from shimpy.scheduler.scheduler import Scheduler
from shimpy.scheduler.simulations import Simulations, needs_check, run_simulation
from shimpy.units import GIB, MIB
from tests.placement.machines import MACHINES, MODELS, machine, model
from tests.scheduler.workshop import FAKE_ENGINE, FakeClock, Workshop, use

MOE = model()
OPTIONS = PlanOptions(n_ctx=4096)


def known_machine(*vram: float, ram: float = 64) -> Hardware:
    """A machine whose llama.cpp can be asked."""
    return replace(machine(*vram, ram=ram), library="0.3.36 (b1)")


def model_with(shape: ModelShape, *, digest: str = "abc", path: str = "/models/m.gguf") -> Model:
    return Model(
        name=parse_model_name("m"),
        files=(Path(path),),
        size_bytes=shape.file_bytes,
        modified_s=0.0,
        digest=digest,
        source="test",
        shape=shape,
    )


@dataclass
class Truth:
    """Simulates by the formulas, but for compute buffers that are smaller or larger."""

    shape: ModelShape
    off_bytes: Callable[[Layout], int] = lambda _layout: 0
    asked: list[list[Load]] = field(default_factory=list)

    def use(self, setup: Setup) -> MemoryUse:
        use = estimate_memory(self.shape, setup.layout, setup.context)
        off = self.off_bytes(setup.layout)
        gpus = tuple(
            replace(gpu, compute_bytes=max(0, gpu.compute_bytes + off)) for gpu in use.gpus
        )
        return MemoryUse(gpus=gpus, host=use.host)

    def __call__(self, loads: Sequence[Load], _timeout_s: float) -> Iterator[Simulated]:
        self.asked.append(list(loads))
        # As the engine does: in any order.
        for index, load in reversed(list(enumerate(loads))):
            yield Simulated(index=index, memory=list(self._buffers(load)))

    def _buffers(self, load: Load) -> Iterator[BufferUse]:
        layout = Layout(
            n_gpu_layers=load.n_gpu_layers,
            n_cpu_moe=load.n_cpu_moe,
            split=tuple(load.tensor_split) or (1.0,) * len(load.devices),
        )
        context = Context(
            n_ctx=load.n_ctx,
            n_slots=load.n_slots,
            n_ubatch=load.n_ubatch,
            kv_type=load.kv_type,
            flash_attn=load.flash_attn != "off",
            kv_unified=load.kv_unified,
        )
        setup = Setup(devices=tuple(load.devices), layout=layout, context=context)
        use = self.use(setup)
        for name, part in zip((*load.devices, "CPU"), (*use.gpus, use.host), strict=True):
            yield BufferUse(name, part.weights_bytes, part.kv_bytes, part.compute_bytes)

    @property
    def n_asked(self) -> int:
        return sum(len(loads) for loads in self.asked)


def test_the_chosen_placement_is_simulated() -> None:
    truth = Truth(MOE, lambda _: -70 * MIB)
    hardware = known_machine(8)

    plan = Simulations(None, run=truth).plan_exactly(model_with(MOE), hardware, OPTIONS)

    formulas = plan_model(MOE, hardware, OPTIONS)
    assert plan.chosen is not None
    assert formulas.chosen is not None
    assert plan.chosen.is_exact
    assert not formulas.chosen.is_exact
    device, estimated = plan.chosen.devices[0], formulas.chosen.devices[0]
    layout = Layout(n_gpu_layers=29, n_cpu_moe=plan.chosen.placement.n_cpu_moe, split=(1.0,))
    assert (
        device.compute_bytes
        == truth.use(
            Setup(
                devices=("CUDA0",), layout=layout, context=_context(plan.chosen.placement.n_ubatch)
            )
        )
        .gpus[0]
        .compute_bytes
    )
    # An exact figure needs less of a margin.
    assert device.margin_bytes < estimated.margin_bytes


def _context(n_ubatch: int) -> Context:
    return Context(n_ctx=4096, n_slots=16, n_ubatch=n_ubatch)


def test_a_better_placement_that_fits_after_all_is_taken() -> None:
    """Where formulas ask for a little too much, the simulation gives a layer's experts back."""
    model_, hardware = model_with(MOE), known_machine(8)
    formulas = plan_model(MOE, hardware, OPTIONS).chosen
    assert formulas is not None
    n = formulas.placement.n_cpu_moe
    # So much free that one layer less lacks 40 MiB by formula.
    less = plan_model(MOE, hardware, replace(OPTIONS, cpu_moe=n - 1)).ladder[0]
    more = less.devices[0].missing_bytes - 40 * MIB
    roomier = replace(
        hardware, gpus=(replace(hardware.gpus[0], free_bytes=hardware.gpus[0].free_bytes + more),)
    )

    plan = Simulations(None, run=Truth(MOE, lambda _: -60 * MIB)).plan_exactly(
        model_, roomier, OPTIONS
    )

    assert plan_model(MOE, roomier, OPTIONS).chosen is not None
    assert plan.chosen is not None
    assert plan.chosen.placement.n_cpu_moe == n - 1
    assert plan.chosen.is_exact


def test_a_placement_that_does_not_fit_after_all_is_left() -> None:
    """Where formulas promise too much, the next placement that fits is taken, and is exact."""
    hardware = known_machine(8)
    simulations = Simulations(None, run=Truth(MOE, lambda _: 500 * MIB))

    plan = simulations.plan_exactly(model_with(MOE), hardware, OPTIONS)

    formulas = plan_model(MOE, hardware, OPTIONS).chosen
    assert plan.chosen is not None
    assert formulas is not None
    assert plan.chosen.is_exact
    assert plan.chosen.placement.n_cpu_moe > formulas.placement.n_cpu_moe
    assert plan.chosen.devices[0].missing_bytes == 0


@given(
    shape=MODELS,
    hardware=MACHINES,
    offs=st.lists(st.integers(-60, 60), min_size=1, max_size=9),
)
@settings(max_examples=60, deadline=None)
def test_what_is_chosen_fits_by_what_is_known(
    shape: ModelShape, hardware: Hardware, offs: list[int]
) -> None:
    """However far the formulas are off: an exact choice fits, and little is simulated for it."""
    truth = Truth(shape, lambda layout: offs[layout.n_cpu_moe % len(offs)] * MIB)
    simulations = Simulations(None, run=truth)
    hardware = replace(hardware, library="b1")

    plan = simulations.plan_exactly(model_with(shape), hardware, PlanOptions())

    assert truth.n_asked <= 16
    chosen = plan.chosen
    if chosen is None or not chosen.is_exact:
        return
    free = {gpu.name: gpu.free_bytes for gpu in hardware.gpus}
    for device in chosen.devices:
        assert device.total_bytes + device.margin_bytes <= free[device.name]
    # The same again costs nothing.
    n_asked = truth.n_asked
    assert simulations.plan(shape, hardware, PlanOptions()).chosen == chosen
    assert truth.n_asked == n_asked


def test_figures_are_kept_on_disk(tmp_path: Path) -> None:
    path, hardware = tmp_path / "state" / "simulations.json", known_machine(8)
    first = Simulations(path, run=Truth(MOE)).plan_exactly(model_with(MOE), hardware, OPTIONS)
    truth = Truth(MOE)

    again = Simulations(path, run=truth).plan_exactly(model_with(MOE), hardware, OPTIONS)

    assert again == first
    assert not truth.asked
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda m, h: (replace(m, digest="def"), h), id="another-file"),
        pytest.param(lambda m, h: (m, replace(h, library="b2")), id="another-llama.cpp"),
        pytest.param(
            lambda m, h: (m, replace(h, gpus=(replace(h.gpus[0], description="B200"),))),
            id="another-card",
        ),
    ],
)
def test_figures_hold_for_what_they_were_simulated_for(
    tmp_path: Path, change: Callable[[Model, Hardware], tuple[Model, Hardware]]
) -> None:
    path, hardware, file = tmp_path / "s.json", known_machine(8), model_with(MOE)
    Simulations(path, run=Truth(MOE)).plan_exactly(file, hardware, OPTIONS)
    truth = Truth(MOE)

    Simulations(path, run=truth).plan_exactly(*change(file, hardware), OPTIONS)

    assert truth.asked


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b'{"version":9,"rows":{}}', b'{"version":2,"rows":{"a":[1]}}', b"[1]", b"\xff"],
)
def test_a_file_that_cannot_be_read_is_written_anew(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "s.json"
    path.write_bytes(content)

    plan = Simulations(path, run=Truth(MOE)).plan_exactly(
        model_with(MOE), known_machine(8), OPTIONS
    )

    assert plan.chosen is not None
    assert plan.chosen.is_exact
    assert json.loads(path.read_bytes())["version"] == 2


def test_a_failed_simulation_leaves_the_formulas_and_is_not_tried_at_once() -> None:
    clock, asked = FakeClock(), []

    def fail(loads: Sequence[Load], _timeout_s: float) -> Iterator[Simulated]:
        asked.append(len(loads))
        yield Simulated(index=0, error="no such tensor")

    simulations = Simulations(None, run=fail, clock=clock.now)
    hardware = known_machine(8)

    for _ in range(3):
        plan = simulations.plan_exactly(model_with(MOE), hardware, OPTIONS)
        assert plan == plan_model(MOE, hardware, OPTIONS)
    assert len(asked) == 1
    clock.advance(3600)
    simulations.plan_exactly(model_with(MOE), hardware, OPTIONS)
    assert len(asked) == 2


def test_nothing_is_simulated_where_it_cannot_be_or_has_no_room() -> None:
    truth = Truth(MOE)
    simulations = Simulations(None, run=truth)
    hardware = known_machine(8)
    full = replace(hardware, gpus=(replace(hardware.gpus[0], free_bytes=767 * MIB),))
    for unable in (
        machine(8),
        suppose(hardware, vram_bytes=[8 * GIB], ram_bytes=None),
        full,
    ):
        plan = simulations.plan_exactly(model_with(MOE), unable, replace(OPTIONS, cpu_moe="on"))
        assert not any(rung.is_exact and rung.devices for rung in plan.ladder)
    assert not [load for loads in truth.asked for load in loads if load.devices]


def test_only_what_may_change_a_load_is_checked() -> None:
    """On a CPU formulas do as long as RAM is plentiful; on a card all is checked once."""
    dense = model(n_expert=0)
    assert needs_check(plan_model(dense, known_machine(80)))
    assert not needs_check(plan_model(dense, known_machine()))
    assert needs_check(plan_model(dense, known_machine(ram=3.2)))


def test_a_load_is_checked_before_it_starts(workshop: Workshop) -> None:
    """The scheduler's resident is what llama.cpp said, without a word from anyone else."""
    file = workshop.model("m")
    assert file.shape is not None
    truth = Truth(file.shape, lambda _: -3 * MIB)
    hardware = known_machine(8)

    async def scenario() -> None:
        async with Scheduler(
            Config(),
            lambda: hardware,
            simulations=Simulations(None, run=truth),
            engine_argv=FAKE_ENGINE,
        ) as scheduler:
            await use(scheduler, file)
            (resident,) = scheduler.residents()
            assert resident.rung.is_exact
            n_asked = truth.n_asked
            await use(scheduler, file)
            assert truth.n_asked == n_asked

    asyncio.run(scenario())
    assert truth.n_asked


# --- the process --------------------------------------------------------------------------


def test_llama_cpp_says_what_its_own_load_takes(
    deepseek_model: Path, bert_model: Path, tmp_path: Path
) -> None:
    """Real ones: several contexts of one model, an encoder, and what can't be simulated."""
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(deepseek_model.read_bytes()[:3000])
    file, encoder = model_of_files([deepseek_model]), model_of_files([bert_model])
    setups = [
        Setup(devices=(), layout=Layout(), context=Context(n_ctx=n_ctx, n_slots=4, n_ubatch=256))
        for n_ctx in (512, 1024)
    ]
    loads = [simulated_load(file, setup) for setup in setups]
    loads.append(simulated_load(encoder, replace(setups[0], context=_encoder_context())))
    loads.append(Load(path=str(broken), n_ctx=512))
    loads.append(simulated_load(file, replace(setups[0], devices=("CUDA9",))))

    answers = {answer.index: answer for answer in run_simulation(loads, 30)}

    assert sorted(answers) == [0, 1, 2, 3, 4]
    assert "CUDA9" in answers[4].error
    assert answers[3].error
    assert not answers[3].memory
    for answer, shape, setup in zip(
        (answers[0], answers[1]), (file.shape, file.shape), setups, strict=True
    ):
        assert shape is not None
        assert not answer.error
        (host,) = answer.memory
        use = estimate_memory(shape, setup.layout, setup.context).host
        assert (host.model_bytes, host.context_bytes) == (use.weights_bytes, use.kv_bytes)
    assert answers[1].memory[0].context_bytes == 2 * answers[0].memory[0].context_bytes
    assert answers[2].memory[0].model_bytes > 0


def _encoder_context() -> Context:
    return Context(n_ctx=512, n_slots=1, n_ubatch=512)


@pytest.mark.parametrize(
    ("script", "n_known"),
    [
        pytest.param("import os; {said}; os.abort()", 1, id="aborts"),
        pytest.param("{said}; import time; time.sleep(60)", 1, id="hangs"),
        pytest.param("print('GGML_ASSERT'); print('{{}}'); print('[1')", 0, id="says-no-figures"),
        pytest.param("print('{{\"index\":7}}')", 0, id="answers-nothing-that-was-asked"),
    ],
)
def test_a_process_that_fails_is_ended_and_what_it_said_is_kept(script: str, n_known: int) -> None:
    said = 'print(\'{"index":1,"memory":[]}\', flush=True)'
    argv = (sys.executable, "-c", script.format(said=said))

    answers = list(run_simulation([Load(path="a", n_ctx=1)] * 2, 1.0, argv))

    assert [answer.index for answer in answers] == [1] * n_known


def test_a_process_that_cannot_start_is_no_error() -> None:
    assert not list(run_simulation([Load(path="a", n_ctx=1)], 1.0, ("/nowhere/python",)))


@given(shape=MODELS, hardware=MACHINES)
@settings(max_examples=30, deadline=None)
def test_what_is_simulated_is_what_is_loaded(shape: ModelShape, hardware: Hardware) -> None:
    """The simulated message is the loading one in all that memory depends on."""
    file = model_with(shape)
    plan = plan_model(shape, hardware, PlanOptions())
    if plan.chosen is None:
        return
    assert not plan.chosen.is_exact
    real = load_message(file, plan.chosen, 3)
    simulated = simulated_load(file, plan.doubts[0])
    assert real.n_threads == 3
    assert real.load_mode == plan.chosen.placement.load_mode
    same = {name: getattr(real, name) for name in ("load_mode", "n_threads")}
    assert replace(simulated, **same) == real


def test_zero_is_a_figure() -> None:
    """A GPU that a split leaves without layers takes nothing, which is known."""
    use = use_from_buffers(["CUDA0", "CUDA1"], [BufferUse("CUDA0", 1, 2, 3)])
    assert use == MemoryUse(
        gpus=(Use(weights_bytes=1, kv_bytes=2, compute_bytes=3), Use()), host=Use()
    )
    assert use_from_buffers(["CUDA0"], [BufferUse("CUDA1", 1, 2, 3)]) is None
