"""Predicted memory against published and measured figures; sizes in MiB unless named otherwise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from shimpy.gguf.arch import ModelShape, describe_model
from shimpy.gguf.reader import read_header
from shimpy.placement.hardware import suppose
from shimpy.placement.memory import (
    Context,
    Layout,
    MemoryUse,
    estimate_memory,
    kv_layer_bytes,
)
from shimpy.placement.placement import PlanOptions
from shimpy.placement.planner import plan_model
from shimpy.units import GIB, MIB
from tests.shapes import MODELS, FileType, quantized, write_gguf

ShapeOf = Callable[[str, FileType], ModelShape]

ALL = 999


@pytest.fixture(scope="module")
def shape_of(tmp_path_factory: pytest.TempPathFactory) -> ShapeOf:
    """Describe a header-only file of a model, written once."""
    folder: Path = tmp_path_factory.mktemp("shapes")
    known: dict[tuple[str, FileType], ModelShape] = {}

    def get(model: str, file_type: FileType) -> ModelShape:
        if (model, file_type) not in known:
            path = write_gguf(folder / f"{model}-{file_type}.gguf", MODELS[model](), file_type)
            known[model, file_type] = describe_model(read_header(path))
            path.unlink()
        return known[model, file_type]

    return get


def on_one_gpu(
    shape: ModelShape, context: Context, *, n_gpu_layers: int = ALL, n_cpu_moe: int = 0
) -> MemoryUse:
    layout = Layout(n_gpu_layers=n_gpu_layers, n_cpu_moe=n_cpu_moe, split=(1.0,))
    return estimate_memory(shape, layout, context)


# llama.cpp b6686 on a GH200, context 4096, 1 sequence, KV in f16, micro-batch 512: model, KV and
# compute buffer with everything on the GPU, the same with --cpu-moe, and the file in GiB.
PUBLISHED = {
    ("deepseek-moe-16b", "Q2_K"): ((6326.58, 896, 236.26), (535.07, 896, 212.00), 6.24),
    ("deepseek-moe-16b", "Q4_K_M"): ((10231.24, 896, 236.26), (760.24, 896, 243.51), 10.10),
    ("deepseek-moe-16b", "Q8_0"): ((16390.94, 896, 236.26), (1243.93, 896, 243.51), 16.21),
    ("phi-3.5-moe", "Q2_K"): ((14516.15, 512, 103.01), (616.15, 512, 240.89), 14.22),
    ("phi-3.5-moe", "Q4_K_M"): ((24100.66, 512, 103.01), (850.65, 512, 397.14), 23.60),
    ("phi-3.5-moe", "Q8_0"): ((42304.49, 512, 103.01), (1504.48, 512, 503.01), 41.44),
}


@pytest.mark.parametrize("placement", ["all-gpu", "cpu-moe"])
@pytest.mark.parametrize(("model", "file_type"), PUBLISHED, ids=str)
def test_predicts_the_published_rows(
    shape_of: ShapeOf, model: str, file_type: FileType, placement: str
) -> None:
    """The twelve rows that everybody can compare with; compute within 15 % or 64 MiB."""
    all_gpu, cpu_moe, _ = PUBLISHED[model, file_type]
    weights, kv, compute = all_gpu if placement == "all-gpu" else cpu_moe
    # Those figures were taken with a row of logits for each token of the micro-batch.
    context = Context(n_ctx=4096, n_slots=1, n_ubatch=512, n_outputs=512)
    n_cpu_moe = 0 if placement == "all-gpu" else ALL

    use = on_one_gpu(shape_of(model, file_type), context, n_cpu_moe=n_cpu_moe).gpus[0]

    assert use.weights_bytes / MIB == pytest.approx(weights, rel=0.0005)
    assert use.kv_bytes / MIB == kv
    off = abs(use.compute_bytes / MIB - compute)
    assert off <= max(0.15 * compute, 64)
    assert use.total_bytes / MIB == pytest.approx(weights + kv + compute, rel=0.02)


@pytest.mark.parametrize(("model", "file_type"), PUBLISHED, ids=str)
def test_shapes_have_the_published_file_sizes(
    shape_of: ShapeOf, model: str, file_type: FileType
) -> None:
    """The shapes under test are the real models', by llama-quantize's rules alone."""
    *_, file_gib = PUBLISHED[model, file_type]
    shape = shape_of(model, file_type)
    assert shape.file_bytes / GIB == pytest.approx(file_gib, abs=0.012)
    assert len(list(quantized(MODELS[model](), file_type))) > 300


def test_f16_and_mxfp4_models_match_their_reports(shape_of: ShapeOf) -> None:
    """Reported in GiB, model buffer: GPT-OSS 11.8 to 2.3, DeepSeek 30.1 to 2.3, Phi 77.7 to 2.8."""
    context = Context(n_ctx=4096, n_slots=1, n_ubatch=512)
    reported = {
        "gpt-oss-20b": (11.8, 2.3),
        "deepseek-moe-16b": (30.1, 2.3),
        "phi-3.5-moe": (77.7, 2.8),
    }
    for model, (whole, without) in reported.items():
        shape = shape_of(model, "F16")
        all_gpu = on_one_gpu(shape, context).gpus[0].weights_bytes / GIB
        cpu_moe = on_one_gpu(shape, context, n_cpu_moe=ALL).gpus[0].weights_bytes / GIB
        assert all_gpu == pytest.approx(whole, rel=0.01)
        assert cpu_moe == pytest.approx(without, abs=0.06)


# On an H200, context 16384, 16 slots with a row of logits each: KV is 3584 MiB in each row.
MEASURED = [
    pytest.param(512, 0, 10231.2, 92.1, id="all-gpu"),
    pytest.param(512, 28, 760.2, 251.9, id="experts-in-ram"),
    pytest.param(2048, 28, 760.2, 446.6, id="experts-in-ram-2048"),
    pytest.param(2048, 14, 5754.2, 446.6, id="experts-of-14-in-ram-2048"),
]


@pytest.mark.parametrize(("n_ubatch", "n_cpu_moe", "weights", "compute"), MEASURED)
def test_predicts_what_a_card_took(
    shape_of: ShapeOf, n_ubatch: int, n_cpu_moe: int, weights: float, compute: float
) -> None:
    """The engine's own settings on a real card, within 4 % of the compute buffer."""
    context = Context(n_ctx=16384, n_slots=16, n_ubatch=n_ubatch)
    use = on_one_gpu(shape_of("deepseek-moe-16b", "Q4_K_M"), context, n_cpu_moe=n_cpu_moe).gpus[0]
    assert use.weights_bytes / MIB == pytest.approx(weights, abs=0.1)
    assert use.kv_bytes / MIB == 3584
    assert use.compute_bytes / MIB == pytest.approx(compute, rel=0.04)


# (model, n_ctx, n_slots, n_ubatch, n_gpu_layers, n_cpu_moe, kv_type): compute buffer that
# llama.cpp 0.3.36 reserves under no_alloc for a GPU with the CUDA backend's rules of layout.
RESERVED = [
    (("llama3-8b", 4096, 16, 512, ALL, 0, "f16"), 112.0),
    (("llama3-8b", 32768, 16, 2048, ALL, 0, "f16"), 560.0),
    (("llama3-8b", 32768, 16, 512, ALL, 0, "q8_0"), 192.1),
    (("llama3-8b", 4096, 16, 512, 16, 0, "f16"), 131.5),
    (("gemma3-12b", 32768, 16, 512, ALL, 0, "f16"), 177.0),
    (("gemma3-12b", 32768, 16, 512, ALL, 0, "q8_0"), 351.6),
    (("qwen3-30b-a3b", 4096, 16, 512, ALL, 0, "f16"), 88.0),
    (("qwen3-30b-a3b", 4096, 16, 2048, ALL, ALL, "f16"), 413.5),
    (("mixtral-8x7b", 4096, 16, 2048, ALL, ALL, "f16"), 812.0),
    (("mixtral-8x7b", 4096, 16, 512, ALL, 16, "f16"), 467.5),
    (("deepseek-v2-lite", 32768, 16, 512, ALL, 0, "f16"), 108.1),
    (("mamba-2.8b", 4096, 16, 512, ALL, 0, "f16"), 66.9),
]


@pytest.mark.parametrize(("settings", "reserved"), RESERVED, ids=str)
def test_compute_buffers_of_other_architectures(
    shape_of: ShapeOf, settings: tuple[str, int, int, int, int, int, str], reserved: float
) -> None:
    """The formulas hold for shapes they were not made from, on both sides of the error."""
    model, n_ctx, n_slots, n_ubatch, n_gpu_layers, n_cpu_moe, kv_type = settings
    context = Context(n_ctx=n_ctx, n_slots=n_slots, n_ubatch=n_ubatch, kv_type=kv_type)  # type: ignore[arg-type]
    use = on_one_gpu(
        shape_of(model, "Q4_K_M"), context, n_gpu_layers=n_gpu_layers, n_cpu_moe=n_cpu_moe
    )
    off = abs(use.gpus[0].compute_bytes / MIB - reserved)
    assert off <= max(0.15 * reserved, 32)


def test_a_windowed_layer_keeps_its_window_only_when_asked(shape_of: ShapeOf) -> None:
    """Gemma 3 has 8 full and 40 windowed layers; the engine keeps all of them whole."""
    shape = shape_of("gemma3-12b", "Q4_K_M")
    whole = Context(n_ctx=32768, n_slots=1, n_ubatch=512)
    window = Context(n_ctx=32768, n_slots=1, n_ubatch=512, swa_full=False)
    per_token = (2048 + 2048) * 2
    assert sum(kv_layer_bytes(shape, whole)) == 48 * 32768 * per_token
    # llama-kv-cache-iswa.cpp: the window of 1024 and one micro-batch, padded to 256 cells.
    assert sum(kv_layer_bytes(shape, window)) == (8 * 32768 + 40 * 1536) * per_token


def test_latent_attention_keeps_one_latent_per_token(shape_of: ShapeOf) -> None:
    """DeepSeek-V2: 576 values per token and layer serve as K and V."""
    shape = shape_of("deepseek-v2-lite", "Q4_K_M")
    context = Context(n_ctx=4096, n_slots=16, n_ubatch=512)
    assert sum(kv_layer_bytes(shape, context)) / MIB == 121.5


def test_a_recurrent_state_is_kept_per_slot(shape_of: ShapeOf) -> None:
    """Mamba keeps no cache that grows with the context."""
    shape = shape_of("mamba-2.8b", "Q4_K_M")
    short = Context(n_ctx=4096, n_slots=16, n_ubatch=512)
    long = Context(n_ctx=65536, n_slots=16, n_ubatch=512)
    assert sum(kv_layer_bytes(shape, short)) == sum(kv_layer_bytes(shape, long)) == 380 * MIB


@pytest.mark.parametrize(
    ("kv_type", "mib"), [("f32", 1792), ("f16", 896), ("q8_0", 476), ("q4_0", 252)]
)
def test_a_quantized_cache_takes_whole_blocks(shape_of: ShapeOf, kv_type: str, mib: int) -> None:
    """28 layers of 2 x 2048 values for 4096 tokens."""
    context = Context(n_ctx=4096, n_slots=1, n_ubatch=512, kv_type=kv_type)  # type: ignore[arg-type]
    assert sum(kv_layer_bytes(shape_of("deepseek-moe-16b", "Q8_0"), context)) == mib * MIB


def test_a_tied_output_is_copied_to_the_gpu_but_not_in_ram(shape_of: ShapeOf) -> None:
    """Gemma has no output.weight: the token embeddings are on the GPU too, or once in RAM."""
    shape = shape_of("gemma3-12b", "Q4_K_M")
    context = Context(n_ctx=4096, n_slots=1, n_ubatch=512)
    on_gpu = on_one_gpu(shape, context)
    assert on_gpu.gpus[0].weights_bytes / MIB == pytest.approx(6956.18, abs=0.1)
    assert on_gpu.host.weights_bytes / MIB == pytest.approx(787.5, abs=0.1)
    on_cpu = estimate_memory(shape, Layout(), context)
    assert on_cpu.host.weights_bytes / MIB == pytest.approx(6956.12, rel=0.001)
    assert on_cpu.gpus == ()


def test_layers_are_offloaded_from_the_back(shape_of: ShapeOf) -> None:
    """ngl 16 of Llama 8B: the output and the last 15 layers; llama.cpp says 2290.21 MiB."""
    use = on_one_gpu(
        shape_of("llama3-8b", "Q4_K_M"),
        Context(n_ctx=4096, n_slots=16, n_ubatch=512),
        n_gpu_layers=16,
    )
    assert use.gpus[0].weights_bytes / MIB == pytest.approx(2290.21, abs=0.1)
    assert use.host.weights_bytes / MIB == pytest.approx(2395.09, abs=0.1)
    assert use.gpus[0].kv_bytes / MIB == 240
    assert use.host.kv_bytes / MIB == 272


def test_several_gpus_share_the_layers_as_llama_cpp_does(shape_of: ShapeOf) -> None:
    """Equal and unequal shares of Mixtral over two GPUs, measured under no_alloc."""
    shape = shape_of("mixtral-8x7b", "Q4_K_M")
    context = Context(n_ctx=4096, n_slots=16, n_ubatch=512)
    equal = estimate_memory(shape, Layout(n_gpu_layers=ALL, split=(1.0, 1.0)), context)
    unequal = estimate_memory(shape, Layout(n_gpu_layers=ALL, split=(2.0, 1.0)), context)
    assert [use.weights_bytes / MIB for use in equal.gpus] == pytest.approx([14263.16, 12796.4])
    assert [use.weights_bytes / MIB for use in unequal.gpus] == pytest.approx([18417.44, 8642.12])
    assert [use.kv_bytes / MIB for use in unequal.gpus] == [352, 160]
    # The inputs are kept four times for pipeline parallelism.
    assert [use.compute_bytes / MIB for use in equal.gpus] == pytest.approx([240, 272], rel=0.05)


def test_moving_experts_only_moves_experts(shape_of: ShapeOf) -> None:
    """What leaves the GPU arrives in RAM, byte for byte; on DeepSeek the first layer has none."""
    shape = shape_of("deepseek-moe-16b", "Q4_K_M")
    context = Context(n_ctx=4096, n_slots=1, n_ubatch=512)
    uses = [on_one_gpu(shape, context, n_cpu_moe=n) for n in range(shape.n_layer + 1)]
    totals = {use.gpus[0].weights_bytes + use.host.weights_bytes for use in uses}
    assert len(totals) == 1
    assert uses[1].gpus[0] == uses[0].gpus[0]
    assert uses[0].gpus[0].weights_bytes - uses[28].gpus[0].weights_bytes == 9471 * MIB


# nvidia-smi's MiB on an H200 after one answer (micro-batch 2048): file type, n_ctx, experts
# of N layers in RAM.
ON_THE_CARD = [
    ("Q4_K_M", 4096, 0, 11849),
    ("Q4_K_M", 4096, 8, 9501),
    ("Q4_K_M", 4096, 16, 6757),
    ("Q4_K_M", 4096, 24, 4013),
    ("Q4_K_M", 4096, 28, 2477),
    ("Q4_K_M", 16384, 0, 14585),
    ("Q4_K_M", 16384, 16, 9493),
    ("F16", 4096, 14, 18999),
    ("F16", 4096, 28, 4245),
]


@pytest.mark.parametrize(("file_type", "n_ctx", "n_cpu_moe", "measured"), ON_THE_CARD)
def test_a_plan_predicts_what_the_card_shows(
    shape_of: ShapeOf, file_type: FileType, n_ctx: int, n_cpu_moe: int, measured: float
) -> None:
    """The driver's context and tables counted in; within 2 % or 64 MiB, by formulas alone."""
    hardware = suppose(None, vram_bytes=[139 * GIB], ram_bytes=125 * GIB)
    options = PlanOptions(n_ctx=n_ctx, cpu_moe=n_cpu_moe, n_ubatch=2048)
    plan = plan_model(shape_of("deepseek-moe-16b", file_type), hardware, options)
    assert plan.chosen is not None
    predicted = plan.chosen.devices[0].total_bytes / MIB
    assert abs(predicted - measured) <= max(0.02 * measured, 64)
