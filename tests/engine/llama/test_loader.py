"""What is loaded where, and what is said when it can't be."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from shimpy.engine.llama import open_backend
from shimpy.engine.llama.failures import load_error
from shimpy.errors import LoadError
from shimpy.protocol.messages import Load
from tests.engine.llama.running import generate, load, loaded, run_apart
from tests.synthetic import write_deepseek, write_llama, write_mixtral


@pytest.mark.parametrize(
    ("n_cpu_moe", "n_tensors"),
    [(0, 0), (1, 0), (2, 3), (3, 6), (4, 9), (99, 9)],
    ids=["none", "dense layer", "one", "two", "all", "more than all"],
)
def test_deepseek_experts_are_overridden_by_layer(
    deepseek_model: Path, n_cpu_moe: int, n_tensors: int
) -> None:
    """Three tensors a layer, never the shared experts; the first layer has none."""
    with loaded(deepseek_model, n_cpu_moe=n_cpu_moe) as backend:
        assert backend.n_overridden == n_tensors


def test_llama_cpp_itself_names_the_overridden_tensors(
    mixtral_model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with loaded(mixtral_model, n_cpu_moe=2):
        pass
    lines = [line for line in capfd.readouterr().err.splitlines() if "overridden to CPU" in line]
    names = {line.split()[1] for line in lines}
    assert names == {
        f"blk.{layer}.ffn_{part}_exps.weight" for layer in (0, 1) for part in ("gate", "up", "down")
    }


@pytest.mark.parametrize("n_cpu_moe", [1, 10])
def test_layer_1_is_not_taken_for_layer_10(tmp_path: Path, n_cpu_moe: int) -> None:
    path = write_mixtral(tmp_path / "deep.gguf", n_layer=12)
    with loaded(path, n_cpu_moe=n_cpu_moe) as backend:
        assert backend.n_overridden == 3 * n_cpu_moe


def test_all_experts_of_the_16b_layout_are_overridden(tmp_path: Path) -> None:
    """28 layers, the first dense: 27 x 3 tensors."""
    with loaded(write_deepseek(tmp_path / "deep.gguf", n_layer=28), n_cpu_moe=28) as backend:
        assert backend.n_overridden == 81


def test_where_the_experts_are_does_not_change_the_text(deepseek_model: Path) -> None:
    with loaded(deepseek_model) as backend:
        text = generate(backend, "Hello")
    with loaded(deepseek_model, n_cpu_moe=4, load_mode="locked") as backend:
        assert generate(backend, "Hello") == text


def test_a_file_in_parts_is_loaded_by_its_first(tmp_path: Path, llama_model: Path) -> None:
    first = write_llama(tmp_path / "parts.gguf", split_max_tensors=8)
    assert first.name == "parts-00001-of-00003.gguf"
    with loaded(llama_model) as whole, loaded(first) as parts:
        assert generate(parts, "Hello") == generate(whole, "Hello")


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    first = write_llama(tmp_path / "parts.gguf", split_max_tensors=8)
    (tmp_path / "parts-00002-of-00003.gguf").unlink()
    with pytest.raises(LoadError, match="00002-of-00003"):
        load(first)


def test_progress_goes_from_nothing_to_all(llama_model: Path) -> None:
    seen: list[float] = []
    backend = open_backend(Load(path=str(llama_model), n_ctx=256), on_progress=seen.append)
    backend.close()
    assert seen == sorted(seen)
    assert seen[0] < 0.5
    assert seen[-1] == 1.0


def test_a_load_can_be_cancelled(llama_model: Path) -> None:
    with pytest.raises(LoadError, match="cancelled"):
        open_backend(Load(path=str(llama_model), n_ctx=256), on_progress=lambda _: False)


def test_an_error_of_the_progress_handler_ends_the_load(llama_model: Path) -> None:
    def hang_up(_: float) -> None:
        raise ConnectionError

    with pytest.raises(ConnectionError):
        open_backend(Load(path=str(llama_model), n_ctx=256), on_progress=hang_up)


def _cut(data: bytes) -> bytes:
    return data[: len(data) * 2 // 3]


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda _: b"", "no GGUF model|failed to read"),
        (lambda _: b"<html>Not found</html>" * 10, "magic"),
        (_cut, "not within the file bounds.*fetch it again"),
        (lambda data: data[:100], "read"),
        (lambda data: data.replace(b"llama.block_count", b"llama.blocc_count"), "block_count"),
        (lambda data: data.replace(b"blk.1.ffn_down", b"blk.1.ffn_dawn"), "blk.1.ffn_down"),
        (
            lambda data: data.replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0lmaaa", 1),
            "unknown model arch.*update",
        ),
    ],
    ids=["empty", "web page", "truncated", "cut in the header", "no key", "no tensor", "new arch"],
)
def test_a_broken_file_gives_llama_cpps_own_reason(
    tmp_path: Path, llama_model: Path, spoil: Callable[[bytes], bytes], reason: str
) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(spoil(llama_model.read_bytes()))
    with pytest.raises(LoadError, match=f"(?s)broken.gguf.*{reason}") as caught:
        load(path)
    assert not caught.value.out_of_memory


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"nothing\.gguf"):
        load(tmp_path / "nothing.gguf")


def test_the_error_of_the_last_load_is_not_repeated(tmp_path: Path, llama_model: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(_cut(llama_model.read_bytes()))
    with pytest.raises(LoadError):
        load(broken)
    web_page = tmp_path / "page.gguf"
    web_page.write_text("<html>")
    with pytest.raises(LoadError) as caught:
        load(web_page)
    assert "bounds" not in caught.value.message


def test_a_path_outside_ascii_is_found(tmp_path: Path, llama_model: Path) -> None:
    path = tmp_path / "mödel 日本.gguf"
    shutil.copy(llama_model, path)
    with loaded(path) as backend:
        assert backend.n_vocab == 512


def test_a_device_that_this_build_lacks_is_named(llama_model: Path) -> None:
    with pytest.raises(LoadError, match=r"no device CUDA7; it has .*CPU"):
        load(llama_model, devices=["CUDA7"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"n_ctx": 0}, "n_ctx"),
        ({"n_slots": 0}, "0 slots"),
        ({"n_slots": 257}, "257 slots"),
        ({"n_batch": 0}, "n_batch"),
        ({"n_ubatch": -1}, "n_ubatch"),
        ({"n_threads": 0}, "n_threads"),
        ({"kv_type": "q8_0", "flash_attn": "off"}, "flash_attn"),
        ({"tensor_split": [1.0] * 99}, "99 devices"),
    ],
)
def test_options_that_can_not_be_are_refused(
    llama_model: Path, options: dict[str, int], said: str
) -> None:
    with pytest.raises(LoadError, match=said):
        load(llama_model, **options)


def test_a_kv_type_that_does_not_divide_the_heads_is_explained(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "narrow.gguf", n_embd=64, n_head=4)
    with pytest.raises(LoadError, match="q8_0 with block size 32 does not divide"):
        load(path, kv_type="q8_0")


@pytest.fixture
def wide_model(tmp_path: Path) -> Path:
    """128 KiB of KV cache a token: a context of 65,536 takes 8 GiB, little else does."""
    return write_llama(tmp_path / "wide.gguf", n_layer=8, n_head=16, n_head_kv=16, n_embd_head=256)


def test_a_context_without_memory_for_it_is_out_of_memory(wide_model: Path) -> None:
    said = run_apart(
        """
        import resource
        from pathlib import Path
        from shimpy.errors import LoadError
        resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30, 4 * 2**30))
        try:
            load(Path(sys.argv[1]), n_ctx=65536)
        except LoadError as error:
            print(error.out_of_memory, error)
        """,
        wide_model,
    )
    assert said.startswith("True llama.cpp could not make a context of 65536 tokens for wide.gguf")
    assert "failed to allocate buffer" in said


@pytest.mark.parametrize(
    "line",
    [
        "alloc_buffer: allocating 9000.00 MiB on device 0: cudaMalloc failed: out of memory",
        "alloc_tensor_range: failed to allocate CUDA0 buffer of size 9437184000",
        "failed to initialize the context: failed to allocate buffer for kv cache",
        "ggml_vulkan: vk::Device::allocateMemory: ErrorOutOfDeviceMemory",
    ],
)
def test_lack_of_memory_is_told_from_other_failures(line: str) -> None:
    """Such a load is tried again one rung down."""
    assert load_error("it failed", [line]).out_of_memory


def test_a_reason_is_said_once() -> None:
    error = load_error(
        "it failed",
        [
            "llama_model_load: error loading model: missing tensor 'blk.0.ffn_gate_exps.weight'",
            "llama_model_load_from_file_impl: failed to load model",
        ],
    )
    assert error.message.startswith(
        "it failed: error loading model: missing tensor 'blk.0.ffn_gate_exps.weight'. A Mixtral"
    )
    assert "failed to load model" not in error.message


def test_a_failure_without_a_word_is_still_an_error() -> None:
    assert load_error("it failed", []).message == "it failed: llama.cpp gave no reason"


def test_nan_weights_are_refused_when_asked(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "nan.gguf", quant="f32")
    data = bytearray(path.read_bytes())
    data[-4:] = b"\xff\xff\xff\x7f"
    path.write_bytes(data)
    with pytest.raises(LoadError, match="invalid data"):
        load(path, check_tensors=True)


def test_weights_are_freed_when_there_is_no_context_for_them(wide_model: Path) -> None:
    said = run_apart(
        """
        import psutil, resource
        from pathlib import Path
        from shimpy.errors import LoadError
        resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30, 4 * 2**30))
        path = Path(sys.argv[1])
        load(path, load_mode="locked").close()
        before = psutil.Process().memory_info().rss
        for _ in range(4):
            try:
                load(path, load_mode="locked", n_ctx=65536).close()
            except LoadError as error:
                assert "context" in error.message
        grown = psutil.Process().memory_info().rss - before
        print(grown / path.stat().st_size)
        """,
        wide_model,
    )
    assert float(said) < 1
