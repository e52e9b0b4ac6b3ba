"""What a pull says before the bytes, for the real models' layouts on supposed machines."""

from __future__ import annotations

import pytest

from shimpy.config import Config
from shimpy.gguf.arch import ModelShape, describe_model
from shimpy.gguf.reader import read_header
from shimpy.server.judging import PlanJudge
from tests.placement.machines import machine
from tests.shapes import deepseek_moe_16b, write_gguf


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> ModelShape:
    """DeepSeek-MoE 16B in Q4_K_M: its header, and a hole of 10.1 GiB."""
    path = tmp_path_factory.mktemp("deepseek") / "deepseek-moe-16b-Q4_K_M.gguf"
    return describe_model(read_header(write_gguf(path, deepseek_moe_16b(), "Q4_K_M")))


@pytest.mark.parametrize(
    ("vram", "ram", "fits", "is_in_vram", "headline"),
    [
        ((24,), 64, True, True, "10.1 GiB: will run wholly on CUDA0: "),
        ((4,), 64, True, False, "10.1 GiB: will run with the experts of 27 layers in RAM: "),
        ((8,), 64, True, False, "10.1 GiB: will run with the experts of "),
        ((), 64, True, False, "10.1 GiB: will run on the CPU alone: "),
        ((), 4, False, False, "10.1 GiB: can't run here"),
    ],
)
def test_the_first_line_says_how_it_will_run(
    deepseek: ModelShape,
    *,
    vram: tuple[float, ...],
    ram: float,
    fits: bool,
    is_in_vram: bool,
    headline: str,
) -> None:
    judge = PlanJudge(hardware=machine(*vram, ram=ram), config=Config())
    verdict = judge.weigh("deepseek-moe-16b:q4_k_m", deepseek)
    assert (verdict.fits, verdict.is_in_vram) == (fits, is_in_vram)
    assert verdict.headline.startswith(headline)
    assert verdict.headline.endswith("RAM" if fits else "can't run here")
    assert ("VRAM" in verdict.headline) == (fits and bool(vram))
    assert verdict.plan["fits"] == fits
    assert verdict.reason


def test_it_knows_the_memory_of_its_machine() -> None:
    judge = PlanJudge(hardware=machine(8, 16, ram=32), config=Config())
    assert (judge.vram_bytes, judge.ram_bytes) == (24 << 30, 32 << 30)


def test_the_configs_options_count(deepseek: ModelShape) -> None:
    judge = PlanJudge(hardware=machine(24), config=Config(cpu_moe="on"))
    assert "experts of 27 layers in RAM" in judge.weigh("x", deepseek).headline
