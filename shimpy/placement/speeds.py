"""Reads the speeds that `shimpy bench` has measured on this machine.

    <state_dir>/speeds/<key>.json    one file per model shape and machine

A machine is its cards, its processor and the version of llama.cpp's bindings: after an upgrade
of any, nothing is known. A file that can't be read counts as not there.
"""

from __future__ import annotations

import hashlib
import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

import msgspec

from shimpy.gguf.arch import ModelShape
from shimpy.logs import get_logger
from shimpy.placement.hardware import Hardware
from shimpy.placement.measured import Planner, Speed, plan_measured, shape_key
from shimpy.placement.placement import Plan, PlanOptions

FOLDER: Final = "speeds"
VERSION: Final = 1
# What no file of ours comes near.
_MAX_BYTES: Final = 1 << 20
MAX_FILES: Final = 256

_log = get_logger("speeds")


class SpeedFile(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured of one shape of model on one machine."""

    version: int
    # For people: the model that was measured last.
    model: str
    shape: str
    machine: str
    # Seconds since the epoch, of the last measurement.
    measured_s: float
    # The latest first; no two of the same placement.
    speeds: tuple[Speed, ...]


class Speeds:
    """The measured speeds in a folder; `refresh` blocks, the rest answers from memory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen_ns: int | None = None
        self._known: dict[tuple[str, str], tuple[Speed, ...]] = {}

    def refresh(self) -> None:
        """Read the files again when any was written since."""
        try:
            # Files are replaced, never written to: each change is the folder's too.
            changed_ns = self._folder.stat().st_mtime_ns
        except OSError:
            self._known, self._seen_ns = {}, None
            return
        if changed_ns == self._seen_ns:
            return
        files = [read_speed_file(path) for path in sorted(self._folder.glob("*.json"))[:MAX_FILES]]
        self._known = {(file.shape, file.machine): file.speeds for file in files if file}
        self._seen_ns = changed_ns

    def of(self, shape: ModelShape, hardware: Hardware) -> tuple[Speed, ...]:
        """Return what is known of a model on a machine."""
        if not self._known:
            return ()
        return self._known.get((shape_key(shape), machine_name(hardware)), ())

    def plan(
        self, planner: Planner, shape: ModelShape, hardware: Hardware, options: PlanOptions
    ) -> Plan:
        """Plan with what is known; errors as `plan_measured`."""
        return plan_measured(planner, shape, hardware, options, self.of(shape, hardware))


def speed_path(folder: Path, shape: str, machine: str) -> Path:
    """Return where the speeds of a shape on a machine are kept."""
    name = hashlib.sha256(f"{shape}\n{machine}".encode()).hexdigest()[:32]
    return folder / f"{name}.json"


def read_speed_file(path: Path) -> SpeedFile | None:
    """Return a file's content; None: there is none that can be used."""
    try:
        with path.open("rb") as file:
            found = msgspec.json.decode(file.read(_MAX_BYTES), type=SpeedFile)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        _log.warning("speeds_unreadable", path=str(path), reason=str(error))
        return None
    return found if found.version == VERSION and _is_sound(found) else None


def _is_sound(file: SpeedFile) -> bool:
    return all(
        speed.prefill_per_s > 0 and speed.decode_per_s > 0 and speed.noise >= 0
        for speed in file.speeds
    )


def machine_name(hardware: Hardware) -> str:
    """Return what of a machine decides how fast placements are, in words."""
    cards = ", ".join(f"{gpu.description} ({gpu.backend})" for gpu in hardware.gpus)
    parts = [cards or "no GPU", f"{hardware.host.n_cores} cores of {_processor()}", _library()]
    return "; ".join(parts)


@cache
def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


@cache
def _library() -> str:
    try:
        return f"llama-cpp-python {version('llama-cpp-python')}"
    except PackageNotFoundError:
        return "llama-cpp-python of unknown version"
