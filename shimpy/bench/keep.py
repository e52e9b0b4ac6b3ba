"""Keeps what was measured, so that the next plan of such a model can use it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

import msgspec

from shimpy.bench.results import Measurement
from shimpy.placement.hardware import Hardware
from shimpy.placement.measured import Speed, shape_key
from shimpy.placement.speeds import (
    MAX_FILES,
    VERSION,
    SpeedFile,
    machine_name,
    read_speed_file,
    speed_path,
)
from shimpy.registry.disk import write_file
from shimpy.registry.model import Model

# Placements that are remembered of one model.
MAX_SPEEDS: Final = 128


def keep_speeds(
    folder: Path, model: Model, hardware: Hardware, measurements: Sequence[Measurement]
) -> int:
    """Write the speeds of what the daemon might run, and return how many; blocking.

    What was measured before of other placements is kept, the oldest going first.

    Raises:
        DiskFullError, RegistryError: they can't be written; what was there before still is.
    """
    new = [found.speed for found in measurements if found.candidate.is_usual]
    if not new:
        return 0
    assert model.shape is not None, "it has been measured"
    shape, machine = shape_key(model.shape), machine_name(hardware)
    path = speed_path(folder, shape, machine)
    old = read_speed_file(path)
    file = SpeedFile(
        version=VERSION,
        model=str(model.name),
        shape=shape,
        machine=machine,
        measured_s=time.time(),
        speeds=merge_speeds(new, old.speeds if old else ()),
    )
    write_file(path, msgspec.json.format(msgspec.json.encode(file)))
    _prune(folder)
    return len(new)


def merge_speeds(new: Iterable[Speed], old: Iterable[Speed]) -> tuple[Speed, ...]:
    """Return the new speeds and those of the old that they don't replace, at most MAX_SPEEDS."""
    merged = {speed.spot: speed for speed in new}
    for speed in old:
        merged.setdefault(speed.spot, speed)
    return tuple(merged.values())[:MAX_SPEEDS]


def _prune(folder: Path) -> None:
    """Remove the files that were written longest ago, where there are too many."""
    files = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    for path in files[:-MAX_FILES]:
        with contextlib.suppress(OSError):
            path.unlink()
