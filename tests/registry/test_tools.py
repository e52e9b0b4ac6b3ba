"""The stores of five other tools, each as it is on disk."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shimpy.config import tool_folders
from shimpy.errors import NotFoundError
from shimpy.registry import registry as registry_module
from shimpy.registry.discovery import Source
from shimpy.registry.model import Model
from shimpy.registry.registry import Registry
from shimpy.registry.settings import ModelSettings, Turn
from shimpy.registry.tools import tool_sources
from shimpy.registry.tools.huggingface import HubCache
from shimpy.registry.tools.llama_cpp import LlamaCppCache
from shimpy.registry.tools.lmstudio import LmStudioModels
from shimpy.registry.tools.ollama import OllamaStore
from shimpy.registry.tools.ramalama import RamaLamaStore
from shimpy.values import TOOLS
from tests.gguf.build import Gguf, small_model
from tests.registry import layouts
from tests.registry.layouts import put


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return small_model(tmp_path / "source.gguf", **{"general.name": "first"})


@pytest.fixture
def other(tmp_path: Path) -> Path:
    return small_model(tmp_path / "other.gguf", **{"general.name": "second"})


@pytest.fixture
def projector(tmp_path: Path) -> Path:
    metadata = {"general.architecture": "clip", "general.type": "mmproj"}
    tensors = [("v.patch_embd.weight", (64,), "F32")]
    return Gguf(metadata=metadata, tensors=tensors).write(tmp_path / "projector.gguf")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "tool"


def _registry(tmp_path: Path, *sources: Source, folders: tuple[Path, ...] = ()) -> Registry:
    registry = Registry(folders, index_path=tmp_path / "index.sqlite", after=sources)
    registry.refresh()
    return registry


def _listed(registry: Registry) -> list[str]:
    return [str(model.name) for model in registry.models()]


def _aliases(model: Model) -> list[str]:
    return [str(alias) for alias in model.aliases]


# --- Hugging Face ----------------------------------------------------------------------------


def test_hub_models_are_named_by_repository_and_quantization(
    tmp_path: Path, store: Path, model: Path, other: Path, projector: Path
) -> None:
    layouts.hub_repo(
        store,
        "Org/Qwen2.5-7B-Instruct-GGUF",
        {
            "qwen2.5-7b-instruct-Q4_K_M.gguf": model,
            "sub/qwen2.5-7b-instruct-q8_0.gguf": other,
            "mmproj-f16.gguf": projector,
        },
    )
    put(store / "datasets--x--y" / "snapshots" / "1" / "data.gguf", "nothing of ours")
    put(store / "version.txt", "1")
    registry = _registry(tmp_path, HubCache([store]))
    assert _listed(registry) == ["qwen2.5-7b-instruct:q4_k_m", "qwen2.5-7b-instruct:q8_0"]
    for text in (
        "hf.co/Org/Qwen2.5-7B-Instruct-GGUF:Q4_K_M",
        "huggingface.co/org/qwen2.5-7b-instruct-gguf:q4_k_m",
        "qwen2.5-7b-instruct:q4_k_m",
    ):
        found = registry.resolve(text)
        assert found.path.name == "qwen2.5-7b-instruct-Q4_K_M.gguf"
    assert (found.source, found.tool) == ("huggingface", "huggingface")
    assert found.projector == found.path.with_name("mmproj-f16.gguf")
    with pytest.raises(NotFoundError, match="means 2 models"):
        registry.resolve("hf.co/org/qwen2.5-7b-instruct-gguf")
    assert registry.problems == ()


def test_one_model_of_a_repository_answers_to_it_without_a_tag(
    tmp_path: Path, store: Path, model: Path
) -> None:
    layouts.hub_repo(store, "gpt2-gguf", {"model.Q8_0.gguf": model})
    registry = _registry(tmp_path, HubCache([store]))
    assert _listed(registry) == ["gpt2:q8_0"]
    assert registry.resolve("hf.co/gpt2-gguf") is registry.resolve("model:q8_0")


def test_several_models_of_one_quantization_are_named_by_their_files(
    tmp_path: Path, store: Path, model: Path, other: Path
) -> None:
    files = {"alpha-Q8_0.gguf": model, "beta-Q8_0.gguf": other}
    layouts.hub_repo(store, "ggml-org/models", files)
    assert _listed(_registry(tmp_path, HubCache([store]))) == ["alpha:q8_0", "beta:q8_0"]


def test_main_goes_before_older_commits_which_add_what_it_lacks(
    tmp_path: Path, store: Path, model: Path, other: Path
) -> None:
    old = "f" * 40
    layouts.hub_repo(store, "a/m", {"m-Q8_0.gguf": other, "m-Q4_0.gguf": other}, commit=old)
    layouts.hub_repo(store, "a/m", {"m-Q8_0.gguf": model})
    registry = _registry(tmp_path, HubCache([store]))
    assert [(m.path.parent.name, str(m.name)) for m in registry.models()] == [
        (old, "m:q4_0"),
        (layouts.COMMIT, "m:q8_0"),
    ]


def test_a_download_that_is_not_done_is_not_there(tmp_path: Path, store: Path, model: Path) -> None:
    folder = layouts.hub_repo(store, "a/m", {"m-Q8_0.gguf": model})
    put(folder / "blobs" / ("0" * 64 + ".incomplete"), "half")
    (folder / "snapshots" / layouts.COMMIT / "m-Q4_0.gguf").symlink_to("../../blobs/gone")
    registry = _registry(tmp_path, HubCache([store, tmp_path / "no-such-cache"]))
    assert _listed(registry) == ["m:q8_0"]


# --- Ollama ----------------------------------------------------------------------------------


def test_ollama_models_have_ollamas_names_and_settings(
    tmp_path: Path, store: Path, model: Path, projector: Path
) -> None:
    layouts.ollama_model(
        store,
        "registry.ollama.ai/library/qwen3/8b",
        model,
        projector=projector,
        layers={
            "template": "{{ .System }}{{ .Prompt }}",
            "system": "You are kind.",
            "params": {"stop": ["<|im_end|>"], "temperature": 0.6},
            "messages": [{"role": "user", "content": "Hi"}],
            "license": ["MIT", "Apache"],
        },
    )
    layouts.ollama_model(store, "registry.ollama.ai/someone/Tuned/Q4_K_M", model)
    layouts.ollama_model(store, "hf.co/Org/Repo-GGUF/Q8_0", model)
    registry = _registry(tmp_path, OllamaStore([store]))
    assert _listed(registry) == ["hf.co/org/repo-gguf:q8_0", "qwen3:8b", "someone/tuned:q4_k_m"]
    found = registry.resolve("qwen3:8b")
    assert found.settings == ModelSettings(
        parameters={"stop": ["<|im_end|>"], "temperature": 0.6},
        system="You are kind.",
        template="{{ .System }}{{ .Prompt }}",
        messages=(Turn("user", "Hi"),),
        license="MIT\nApache",
    )
    assert found.projector is not None
    assert found.projector.name == f"sha256-{layouts.sha256(projector.read_bytes())}"
    assert (found.source, found.error) == ("ollama", None)
    assert registry.resolve("hf.co/Org/Repo-GGUF").settings.is_empty


def test_old_names_of_ollamas_blobs_are_known(tmp_path: Path, store: Path, model: Path) -> None:
    layouts.ollama_model(store, "registry.ollama.ai/library/m/latest", model, separator=":")
    registry = _registry(tmp_path, OllamaStore([store]))
    assert registry.resolve("m").path.name.startswith("sha256:")


def test_a_changed_ollama_model_is_read_anew(tmp_path: Path, store: Path, model: Path) -> None:
    name = "registry.ollama.ai/library/m/latest"
    path = layouts.ollama_model(store, name, model, layers={"system": "one"})
    registry = _registry(tmp_path, OllamaStore([store]))
    assert registry.resolve("m").settings.system == "one"
    path.unlink()
    layouts.ollama_model(store, name, model, layers={"system": "another"})
    registry.refresh()
    assert registry.resolve("m").settings.system == "another"


def test_broken_ollama_models_say_why_and_cloud_models_are_left_out(
    tmp_path: Path, store: Path, model: Path, other: Path
) -> None:
    library = "registry.ollama.ai/library"
    layouts.ollama_model(store, f"{library}/whole/latest", model)
    layouts.ollama_model(store, f"{library}/gone/latest", other)
    (store / "blobs" / f"sha256-{layouts.sha256(other.read_bytes())}").unlink()
    layouts.ollama_model(store, f"{library}/tuned/latest", model, layers={"adapter": "lora"})
    put(store / "manifests" / library / "noise" / "latest", "<html>")
    put(store / "manifests" / library / "cloud" / "latest", '{"layers": []}')
    put(store / "manifests" / library / "empty" / "latest", "{}")
    outside = '{"layers": [{"mediaType": "%s", "digest": "../../../../etc/passwd"}]}'
    put(store / "manifests" / library / "evil" / "latest", outside % (layouts.MEDIA + "model"))
    errors = {
        m.name.name: m.error or "" for m in _registry(tmp_path, OllamaStore([store])).models()
    }
    assert errors.pop("whole") == ""
    assert "`ollama pull gone:latest`" in errors.pop("gone")
    assert "adapter" in errors.pop("tuned")
    assert "noise" in errors.pop("noise")
    assert str(store / "blobs") in errors.pop("evil")
    assert errors == {}


def test_nonsense_in_ollamas_small_layers_is_done_without(
    tmp_path: Path, store: Path, model: Path
) -> None:
    layers = {"params": "not json", "messages": {"role": 1}, "system": "ok"}
    layouts.ollama_model(store, "registry.ollama.ai/library/m/latest", model, layers=layers)
    registry = _registry(tmp_path, OllamaStore([store]))
    assert registry.resolve("m").settings == ModelSettings(system="ok")


# --- LM Studio, llama.cpp, RamaLama ----------------------------------------------------------


def test_lmstudio_models_are_named_by_their_files(
    tmp_path: Path, store: Path, model: Path, projector: Path
) -> None:
    folder = store / "lmstudio-community" / "Phi-4-GGUF"
    put(folder / "phi-4-Q4_K_M.gguf", model.read_bytes())
    put(folder / "mmproj-phi-4-F16.gguf", projector.read_bytes())
    registry = _registry(tmp_path, LmStudioModels([store, tmp_path / "nowhere"]))
    (found,) = registry.models()
    assert (str(found.name), found.source) == ("phi-4:q4_k_m", "lmstudio")
    assert found.projector == folder / "mmproj-phi-4-F16.gguf"
    assert registry.resolve("lmstudio-community/phi-4-gguf") is found
    assert registry.problems == ()


def test_llama_cpps_files_are_named_by_where_they_came_from(
    tmp_path: Path, store: Path, model: Path, other: Path
) -> None:
    layouts.llama_cpp_file(store, "ggml-org", "Tiny_Model-GGUF", "tiny-Q8_0.gguf", model)
    put(store / "some_model-Q4_0.gguf", other.read_bytes())
    layouts.hub_repo(store, "a/m", {"m-Q8_0.gguf": model})
    registry = _registry(tmp_path, LlamaCppCache([store]))
    assert _listed(registry) == ["some_model:q4_0", "tiny:q8_0"]
    found = registry.resolve("hf.co/ggml-org/tiny_model-gguf:q8_0")
    assert found is registry.resolve("ggml-org_tiny_model-gguf_tiny:q8_0")
    assert found.source == "llama.cpp"


def test_ramalamas_models_are_named_as_its_users_do(
    tmp_path: Path, store: Path, model: Path, other: Path, projector: Path
) -> None:
    layouts.ramalama_model(
        store,
        "ollama/library/smollm",
        "135m",
        {
            "smollm": ("gguf", model.read_bytes()),
            "chat_template": ("chat_template", b"{{ .Prompt }}"),
            "chat_template_converted": ("chat_template", b"{% for m in messages %}{% endfor %}"),
        },
    )
    layouts.ramalama_model(
        store,
        "huggingface/ibm-granite/granite-GGUF/granite-Q4_K_M.gguf",
        "latest",
        {
            "granite-Q4_K_M.gguf": ("gguf", other.read_bytes()),
            "mmproj.gguf": ("mmproj", projector.read_bytes()),
            "config.json": ("other", b"{}"),
        },
    )
    registry = _registry(tmp_path, RamaLamaStore([store]))
    assert _listed(registry) == ["granite:q4_k_m", "smollm:135m"]
    smollm = registry.resolve("ollama/library/smollm:135m")
    assert smollm.settings.template == "{% for m in messages %}{% endfor %}"
    assert smollm.source == "ramalama"
    granite = registry.resolve("granite")
    assert granite.projector is not None
    assert granite.projector.name == "mmproj.gguf"
    assert "huggingface/ibm-granite/granite-gguf/granite-q4_k_m:latest" in _aliases(granite)


def test_an_unfinished_ramalama_model_is_not_there(
    tmp_path: Path, store: Path, model: Path, other: Path
) -> None:
    ref = layouts.ramalama_model(
        store, "ollama/library/m", "latest", {"m": ("gguf", model.read_bytes())}
    )
    (ref.parent.parent / "blobs" / f"sha256-{layouts.sha256(model.read_bytes())}").unlink()
    put(ref.with_name("broken.json"), "<html>")
    registry = _registry(tmp_path, RamaLamaStore([store]))
    assert registry.models() == ()
    assert "broken.json" in registry.problems[0]


# --- together --------------------------------------------------------------------------------


def test_a_file_in_several_stores_is_one_model_with_several_names(
    tmp_path: Path, store: Path, model: Path
) -> None:
    """By its inode where it is linked, by its digest where it is a copy."""
    repo = layouts.hub_repo(store / "hub", "org/tiny-GGUF", {"tiny-Q8_0.gguf": model})
    layouts.ollama_model(store / "ollama", "registry.ollama.ai/library/small/latest", model)
    (blob,) = (repo / "blobs").iterdir()
    linked = store / "lmstudio" / "org" / "linked" / "linked-Q8_0.gguf"
    linked.parent.mkdir(parents=True)
    os.link(blob, linked)
    registry = _registry(
        tmp_path,
        HubCache([store / "hub"]),
        OllamaStore([store / "ollama"]),
        LmStudioModels([store / "lmstudio"]),
    )
    (found,) = registry.models()
    assert str(found.name) == "tiny:q8_0"
    assert _aliases(found) == [
        "hf.co/org/tiny-gguf:q8_0", "small:latest", "linked:q8_0", "org/linked:q8_0",
    ]  # fmt: skip
    assert registry.resolve("small") is found


def test_the_same_name_in_two_tools_is_told_apart_by_the_tool(
    tmp_path: Path, store: Path, model: Path, other: Path
) -> None:
    put(store / "folder" / "m-Q8_0.gguf", model.read_bytes())
    layouts.ollama_model(store / "ollama", "registry.ollama.ai/library/m/q8_0", other)
    registry = _registry(tmp_path, OllamaStore([store / "ollama"]), folders=(store / "folder",))
    assert _listed(registry) == ["m:q8_0", "ollama/m:q8_0"]


def test_a_restart_opens_no_known_file(
    tmp_path: Path, store: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The index of headers serves all sources."""
    layouts.ollama_model(store, "registry.ollama.ai/library/m/latest", model)
    layouts.hub_repo(store, "a/b", {"b-Q8_0.gguf": small_model(tmp_path / "b.gguf")})
    sources = (OllamaStore([store]), HubCache([store]))
    before = _registry(tmp_path, *sources).models()

    def refuse(_paths: object) -> None:
        raise AssertionError("a header was read again")

    monkeypatch.setattr(registry_module, "read_files", refuse)
    monkeypatch.setattr(registry_module, "read_header", refuse)
    again = _registry(tmp_path, OllamaStore([store]), HubCache([store]))
    assert again.models() == before
    assert len(before) == 2


def test_a_store_that_may_not_be_read_is_told_and_takes_nothing_down(
    tmp_path: Path, store: Path, model: Path
) -> None:
    put(tmp_path / "folder" / "m.gguf", model.read_bytes())
    store.mkdir()
    loop = store / "manifests"
    loop.symlink_to(loop)
    registry = _registry(tmp_path, OllamaStore([store]), folders=(tmp_path / "folder",))
    assert _listed(registry) == ["m:latest"]
    assert "manifests" in registry.problems[0]


# --- where they are --------------------------------------------------------------------------


def test_every_tool_has_a_source_and_usual_folders(tmp_path: Path) -> None:
    folders = tool_folders({"HOME": str(tmp_path)})
    assert tuple(folders) == TOOLS
    assert len(tool_sources(folders)) == len(TOOLS)
    assert folders["huggingface"] == (tmp_path / ".cache/huggingface/hub",)
    assert folders["ollama"][0] == tmp_path / ".ollama/models"
    assert folders["lmstudio"][0] == tmp_path / ".lmstudio/models"
    assert folders["llama.cpp"][0] == tmp_path / ".cache/llama.cpp"
    assert folders["ramalama"][0] == tmp_path / ".local/share/ramalama"


@pytest.mark.parametrize(
    ("tool", "environ", "first"),
    [
        ("huggingface", {"HF_HUB_CACHE": "/a", "HF_HOME": "/b"}, "/a"),
        ("huggingface", {"HUGGINGFACE_HUB_CACHE": "/a"}, "/a"),
        ("huggingface", {"HF_HOME": "/b", "XDG_CACHE_HOME": "/c"}, "/b/hub"),
        ("huggingface", {"XDG_CACHE_HOME": "/c"}, "/c/huggingface/hub"),
        ("ollama", {"OLLAMA_MODELS": "/a"}, "/a"),
        ("llama.cpp", {"LLAMA_CACHE": "/a", "XDG_CACHE_HOME": "/c"}, "/a"),
        ("llama.cpp", {"XDG_CACHE_HOME": "/c"}, "/c/llama.cpp"),
        ("ramalama", {"RAMALAMA_STORE": "/a"}, "/a"),
    ],
)
def test_each_tools_own_variables_are_heeded(
    tool: str, environ: dict[str, str], first: str, tmp_path: Path
) -> None:
    folders = tool_folders({"HOME": str(tmp_path), **environ})
    assert {str(key): paths[0] for key, paths in folders.items()}[tool] == Path(first)


def test_llama_cpps_cache_may_have_either_layout(tmp_path: Path) -> None:
    folders = tool_folders({"HOME": str(tmp_path), "LLAMA_CACHE": "/a"})
    assert Path("/a") in folders["huggingface"]
    assert folders["llama.cpp"] == (Path("/a"),)


def test_lmstudios_own_choice_of_folders_is_heeded(tmp_path: Path) -> None:
    put(tmp_path / ".lmstudio-home-pointer", f"{tmp_path}/elsewhere\n")
    put(tmp_path / "elsewhere" / "settings.json", '{"downloadsFolder": "/big/disk"}')
    assert tool_folders({"HOME": str(tmp_path)})["lmstudio"] == (
        Path("/big/disk"),
        tmp_path / "elsewhere" / "models",
        tmp_path / ".cache/lm-studio/models",
    )
