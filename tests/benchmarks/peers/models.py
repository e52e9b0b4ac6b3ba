"""The models that are measured, written once into a folder; and how each is served."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import shimpy.demo
from tests.benchmarks.peers.contenders import Setup
from tests.synthetic import write_bert, write_llama, write_preset


def setup_of(model: str, folder: Path, n_threads: int) -> Setup:
    """Return how a model is served; its file is written first where it is missing."""
    # Each in a folder of its own: the daemon would look at the others too.
    path = folder / model / f"{model}.gguf"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name("partial")
        _write(model, partial)
        partial.rename(path)
    setup = Setup(path=path, n_threads=n_threads)
    match model:
        case "deepseek-8b":
            # More would take minutes.
            return replace(setup, n_ctx=4096, n_warm=32)
        case "demo":
            # So small that a second thread waits more than it works.
            return replace(setup, n_ctx=8192, n_threads=1)
        case "bert":
            return replace(setup, n_ctx=4096, embeds=True)
        case _:
            return setup


def _write(model: str, path: Path) -> None:
    match model:
        case "demo":
            shutil.copyfile(Path(shimpy.demo.__file__).parent / "demo.gguf", path)
        case "bert":
            # The shape of all-MiniLM-L6.
            write_bert(
                path, quant="f16", n_layer=6, n_embd=384, n_head=12, n_ff=1536, n_vocab=30522
            )
        case _:
            write_preset(path, model)


def many_models(folder: Path, n_models: int) -> Path:
    """Return a folder of that many small models."""
    home = folder / f"many-{n_models}"
    if home.exists():
        return home
    partial = folder / "partial-many"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    first = write_llama(partial / "model-0.gguf")
    for index in range(1, n_models):
        shutil.copyfile(first, partial / f"model-{index}.gguf")
    partial.rename(home)
    return home
