"""What becomes of a loaded model as another program leaves and takes VRAM, on an NVIDIA card.

    python -m tests.benchmarks.moves MODEL [--left GIB]

With little VRAM left, a mixture-of-experts model is loaded with experts in RAM. Then the other
program ends: the model has to move up by itself. Then a program takes all that is left: the idle
model has to become smaller by itself. After each step it has to answer. Prints when what happened
and why; exit status 1 where it did not.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import httpx

from shimpy.names import name_from_stem
from shimpy.units import GIB, MIB
from tests.benchmarks.card import generate, home
from tests.benchmarks.vram import Hog, used_vram
from tests.daemon import Daemon, running_daemon

_PATIENCE_S = 150.0
_LOOK_S = 0.5
# Less than half of any margin, so that it has to be noticed.
_NOTHING_GIB = 16 * MIB / GIB


def wait_placed(daemon: Daemon, mode: str) -> bool:
    """Wait until the only model is loaded in such a placement; print how long that took."""
    started_s = time.monotonic()
    placement: dict[str, Any] = {}
    while placement.get("mode") != mode and time.monotonic() < started_s + _PATIENCE_S:
        time.sleep(_LOOK_S)
        models = httpx.get(f"{daemon.url}/api/ps", timeout=30).json()["models"]
        placement = next((m["placement"] for m in models if m["state"] == "ready"), {})
    is_so = placement.get("mode") == mode
    print(f"{mode}: {'' if is_so else 'NOT '}after {time.monotonic() - started_s:.1f} s")
    return is_so


def use(daemon: Daemon, model: str) -> bool:
    """Have it answer, and print where it is then."""
    answer = generate(daemon, model)
    (resident,) = httpx.get(f"{daemon.url}/api/ps", timeout=30).json()["models"]
    placement = resident["placement"]
    print(
        f"  {placement['mode']}, experts of {placement['n_cpu_moe']} layers in RAM, "
        f"{sum(used_vram()) / GIB:.2f} GiB used on the card, "
        f"{answer.get('eval_count', 0)} tokens {answer.get('error', '')}"
    )
    return "error" not in answer


def main() -> int:
    """Take and leave VRAM, and print what the daemon made of it."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.moves", description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--left", type=float, default=8.0, metavar="GIB")
    arguments = parser.parse_args()
    path = arguments.model.absolute()
    model = str(name_from_stem(path.stem))
    with home() as state, running_daemon(state, path.parent) as daemon:
        with Hog() as hog:
            hog.leave(arguments.left)
            results = [use(daemon, model), wait_placed(daemon, "experts-in-ram")]
        print("the other program has left")
        results += [wait_placed(daemon, "gpu"), use(daemon, model)]
        with Hog() as hog:
            hog.leave(_NOTHING_GIB)
            print(f"another one has all but {_NOTHING_GIB * GIB / MIB:.0f} MiB")
            results += [wait_placed(daemon, "experts-in-ram"), use(daemon, model)]
        query = {"follow": "false", "since": "1h"}
        print(httpx.get(f"{daemon.url}/api/events", params=query, timeout=30).text)
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
