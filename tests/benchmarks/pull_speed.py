"""How fast a pull is, beside a bare huggingface_hub download of the same file.

    python -m tests.benchmarks.pull_speed --size 2GB --rounds 3

A synthetic model of that size is served from this machine by a process of its own. By turns it is
downloaded by `hf_hub_download` (without Xet, in a process of its own) and pulled through a daemon,
its sha256 checked. What is printed is the best of each and their ratio; the project promises at
least 0.8. The files lie in a temporary folder and are removed.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
from aiohttp import web

from shimpy.units import MIB, parse_bytes
from tests.daemon import running_daemon
from tests.hub_server import COMMIT
from tests.synthetic import PRESETS, write_decoder

_REPO = "test/speed-GGUF"
_FILE = "speed-Q8_0.gguf"
_PATIENCE_S = 600.0
_BARE = """
import sys, time
from huggingface_hub import hf_hub_download
started = time.monotonic()
hf_hub_download(sys.argv[1], sys.argv[2], cache_dir=sys.argv[3])
print(time.monotonic() - started)
"""


def main() -> None:
    """Parse the command line, measure and print."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.pull_speed")
    parser.add_argument("--size", type=parse_bytes, default=parse_bytes("1GB"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve is not None:
        asyncio.run(_serve(arguments.serve))
        return
    with tempfile.TemporaryDirectory(prefix="shimpy-pull-speed-") as folder:
        _measure(Path(folder), arguments.size, arguments.rounds)


def _measure(folder: Path, wanted: int, rounds: int) -> None:
    path = _write_model(folder / _FILE, wanted)
    size = path.stat().st_size
    bare, ours = [], []
    with _serving(path) as url:
        env = {"HF_ENDPOINT": url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(folder / "hf")}
        for _ in range(rounds):
            bare.append(size / MIB / _time_bare(folder / "bare", env))
            ours.append(size / MIB / _time_pull(folder / "home", env))
            _print(f"hf_hub_download {bare[-1]:7.0f} MiB/s   shimpy pull {ours[-1]:7.0f} MiB/s")
    _print(
        f"{size / MIB:.0f} MiB, best of {rounds}: hf_hub_download {max(bare):.0f} MiB/s, shimpy "
        f"pull with sha256 {max(ours):.0f} MiB/s, ratio {max(ours) / max(bare):.2f}"
    )


def _write_model(path: Path, wanted: int) -> Path:
    """Write a model of about so many bytes, its weights a hole in the file."""
    shape = replace(PRESETS["dense-200m"], quant="q8_0", header_only=True, n_layer=1)
    one = write_decoder(path, shape).stat().st_size
    two = write_decoder(path, replace(shape, n_layer=2)).stat().st_size
    n_layer = max(1, 1 + math.ceil((wanted - one) / (two - one)))
    return write_decoder(path, replace(shape, n_layer=n_layer))


def _time_bare(cache: Path, env: dict[str, str]) -> float:
    """Return the seconds of a huggingface_hub download."""
    argv = [sys.executable, "-c", _BARE, _REPO, _FILE, str(cache)]
    try:
        done = subprocess.run(
            argv, env={**os.environ, **env}, check=True, capture_output=True, text=True
        )
        return float(done.stdout.split()[-1])
    finally:
        shutil.rmtree(cache, ignore_errors=True)


def _time_pull(home: Path, env: dict[str, str]) -> float:
    """Return the seconds of a pull by a daemon, from the request to its success."""
    models = home.parent / "models"
    models.mkdir(exist_ok=True)
    try:
        with running_daemon(home, models, environ=env) as daemon:
            started = time.monotonic()
            body = {"model": f"hf.co/{_REPO}", "force": True}
            with httpx.stream(
                "POST", f"{daemon.url}/api/pull", json=body, timeout=_PATIENCE_S
            ) as lines:
                last = json.loads(list(lines.iter_lines())[-1])
            assert last.get("status") == "success", last
            return time.monotonic() - started
    finally:
        shutil.rmtree(home, ignore_errors=True)


@contextmanager
def _serving(path: Path) -> Iterator[str]:
    argv = [sys.executable, "-m", "tests.benchmarks.pull_speed", "--serve", str(path)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            yield server.stdout.readline().strip()
        finally:
            server.terminate()


async def _serve(path: Path) -> None:
    """Serve one file as the hub does, from the disk by sendfile, and print the address."""
    size, sha256 = await asyncio.to_thread(_describe, path)
    lfs = {"sha256": sha256, "size": size, "pointerSize": 134}

    async def info(_: web.Request) -> web.Response:
        sibling = {"rfilename": path.name, "size": size, "blobId": "0" * 40, "lfs": lfs}
        known = {"id": _REPO, "sha": COMMIT, "private": False, "gated": False, "tags": []}
        return web.json_response({**known, "siblings": [sibling], "downloads": 0, "likes": 0})

    async def resolve(request: web.Request) -> web.Response:
        headers = {
            "X-Repo-Commit": COMMIT,
            "X-Linked-Size": str(size),
            "X-Linked-Etag": f'"{sha256}"',
            "ETag": f'"{sha256}"',
            # Another host, as it is for the real hub.
            "Location": f"http://localhost:{request.url.port}/storage",
        }
        return web.Response(status=302, headers=headers)

    async def storage(_: web.Request) -> web.FileResponse:
        return web.FileResponse(path)

    app = web.Application()
    app.add_routes(
        [
            web.get("/api/models/{org}/{repo}", info),
            web.get("/{org}/{repo}/resolve/{revision}/{path:.*}", resolve),
            web.get("/storage", storage),
        ]
    )
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    _print(f"http://127.0.0.1:{runner.addresses[0][1]}")
    await asyncio.Event().wait()


def _describe(path: Path) -> tuple[int, str]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(MIB):
            digest.update(data)
    return path.stat().st_size, digest.hexdigest()


def _print(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
