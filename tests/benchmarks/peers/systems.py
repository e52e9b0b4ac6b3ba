"""What is measured of whole programs: their start, their memory, swaps, long lists."""

from __future__ import annotations

import asyncio
import compileall
import contextlib
import json
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

import shimpy
from shimpy.names import name_from_stem
from shimpy.units import MIB
from tests.benchmarks.peers.contenders import Server, start
from tests.benchmarks.peers.models import many_models, setup_of
from tests.benchmarks.peers.scenarios import Metrics, warm_up
from tests.benchmarks.peers.targets import Target, at_most
from tests.daemon import running_daemon

_N_MODELS = 1000
_PATIENCE_S = 60


@dataclass(frozen=True, slots=True)
class Place:
    """Where models are and what runs the peers."""

    folder: Path
    peers_python: str
    n_threads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """One measurement; `run` takes a contender's name."""

    name: str
    contenders: tuple[str, ...]
    headline: tuple[str, ...]
    run: Callable[[str, Place], Metrics]
    is_quick: bool = False
    targets: tuple[Target, ...] = ()


def cold_start(name: str, place: Place) -> Metrics:
    """From exec to an answer: any answer, and the first token of a 200M model."""
    setup = setup_of("dense-200m", place.folder, place.n_threads)
    # As pip leaves an installed package, also where a checkout keeps no bytecode.
    compileall.compile_dir(str(Path(shimpy.__file__).parent), quiet=1)
    started_s = time.perf_counter()
    with start(name, setup, place.peers_python) as server:
        assert isinstance(server, Server)
        path = "/api/version" if name == "shimpy" else "/v1/models"
        urllib.request.urlopen(server.url + path, timeout=_PATIENCE_S).read()  # noqa: S310
        answered_s = time.perf_counter() - started_s
        _complete(server, server.model)
        return {
            "first_answer_ms": 1000 * answered_s,
            "first_token_ms": 1000 * (time.perf_counter() - started_s),
        }


def footprint(name: str, place: Place) -> Metrics:
    """Return the resident memory of an idle daemon, and of the idle processes beside a model.

    Beside: without the pages of the model's file, which the page cache holds anyway, and with
    the smallest context.
    """
    setup = replace(setup_of("demo", place.folder, 1), n_ctx=512, n_slots=1)
    with start(name, setup, place.peers_python) as server:
        assert isinstance(server, Server)
        metrics = {}
        if name == "shimpy":
            metrics["daemon_mib"] = server.process.memory_info().rss / MIB
        asyncio.run(warm_up(server, setup))
        processes = server.process.children(recursive=True) or [server.process]
        worker = max(processes, key=lambda process: process.memory_info().rss)
        metrics["worker_mib"] = (worker.memory_info().rss - _mapped(worker, setup.path)) / MIB
        return metrics


def swap(name: str, place: Place) -> Metrics:
    """One of two models is loaded: the time to a token of the other one."""
    first = setup_of("dense-200m", place.folder, place.n_threads)
    second = setup_of("moe-300m", place.folder, place.n_threads)
    with _serving_two(name, place, first.path, second.path) as url:
        server = Server(name=name, url=url, model="", process=psutil.Process())
        times = []
        for model in [first.model, second.model] * 2:
            times.append(_complete(server, model))
            if name == "shimpy":
                # What the daemon does by itself where both do not fit.
                _post(f"{url}/api/generate", {"model": model, "keep_alive": 0})
        return {"swap_ms": 1000 * sum(times[2:]) / 2}


def long_list(_: str, place: Place) -> Metrics:
    """A thousand models: the first list that a new daemon gives, and the next one."""
    models = many_models(place.folder, _N_MODELS)
    with tempfile.TemporaryDirectory(prefix="shimpy-list-") as home:
        times = []
        for _ in range(2):
            with running_daemon(Path(home), models) as daemon:
                for _ in range(2):
                    started_s = time.perf_counter()
                    with urllib.request.urlopen(  # noqa: S310 - a URL of our own
                        f"{daemon.url}/api/tags", timeout=_PATIENCE_S
                    ) as answer:
                        n_models = len(json.load(answer)["models"])
                    times.append(1000 * (time.perf_counter() - started_s))
                    assert n_models >= _N_MODELS, n_models
    return {"never_seen_ms": times[0], "restarted_ms": times[2], "list_ms": times[3]}


SYSTEMS = [
    System(
        name="cold start",
        contenders=("shimpy", "xllamacpp", "llama_cpp.server"),
        headline=("first_answer_ms", "first_token_ms"),
        run=cold_start,
        is_quick=True,
        targets=(at_most("first_answer_ms", 600),),
    ),
    System(
        name="idle footprint",
        contenders=("shimpy", "xllamacpp", "llama_cpp.server"),
        headline=("daemon_mib", "worker_mib"),
        run=footprint,
        is_quick=True,
        targets=(at_most("daemon_mib", 80e6 / MIB), at_most("worker_mib", 70e6 / MIB)),
    ),
    System(
        name="hot swap, 200M and 300M",
        contenders=("shimpy", "llama_cpp.server"),
        headline=("swap_ms",),
        run=swap,
    ),
    System(
        name=f"list of {_N_MODELS} models",
        contenders=("shimpy",),
        headline=("list_ms", "restarted_ms", "never_seen_ms"),
        run=long_list,
        targets=(at_most("list_ms", 300), at_most("restarted_ms", 300)),
    ),
]


@contextlib.contextmanager
def _serving_two(name: str, place: Place, *paths: Path) -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="shimpy-swap-") as home:
        if name == "shimpy":
            models = Path(home) / "models"
            models.mkdir()
            for path in paths:
                (models / path.name).symlink_to(path)
            with running_daemon(
                Path(home), models, "--n-ctx", "4096", threads=place.n_threads
            ) as daemon:
                yield daemon.url
            return
        from tests.benchmarks.peers.contenders import llama_cpp_url

        settings = [
            {
                "model": str(path),
                "model_alias": str(name_from_stem(path.stem)),
                "n_ctx": 4096,
                "n_threads": place.n_threads,
                "n_threads_batch": place.n_threads,
                "n_gpu_layers": 0,
                "verbose": False,
            }
            for path in paths
        ]
        with llama_cpp_url(place.peers_python, Path(home), settings) as url:
            yield url


def _complete(server: Server, model: str) -> float:
    prompt = "Once upon a time"
    body = {"model": model, "prompt": prompt, "max_tokens": 1, "temperature": 0}
    return _post(f"{server.url}/v1/completions", body)


def _post(url: str, body: dict[str, Any]) -> float:
    request = urllib.request.Request(  # noqa: S310 - a URL of our own
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    started_s = time.perf_counter()
    with urllib.request.urlopen(request, timeout=_PATIENCE_S) as answer:  # noqa: S310
        answer.read()
    return time.perf_counter() - started_s


def _mapped(process: psutil.Process, path: Path) -> int:
    """Return the resident bytes that a process maps of a file; 0 where the system does not tell."""
    if not hasattr(process, "memory_maps"):
        return 0
    maps = process.memory_maps(grouped=True)
    return sum(one.rss for one in maps if Path(one.path).name == path.name)
