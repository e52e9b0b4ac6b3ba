"""Takes a snapshot of the machine: the devices that llama.cpp can use, other cards, the host.

Which devices there are is asked of a short-lived worker, once, since only llama.cpp's own
build can tell, and since asking takes memory on each card until the process ends; but not where
the build has no backend for any. Their free
memory is then read from the drivers at each snapshot; where no driver tells, the worker is
asked again.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Final

import msgspec
from msgspec.structs import replace

from shimpy.errors import WorkerError
from shimpy.placement.builds import cpu_build, installed_lib
from shimpy.placement.cards import (
    Card,
    CardSources,
    Vendor,
    pci_id,
    probe_cards,
    visible_nvidia,
)
from shimpy.placement.hardware import (
    CUDA_OVERHEAD_BYTES,
    CUDA_WORKSPACE_BYTES,
    Gpu,
    Hardware,
    UnusableGpu,
)
from shimpy.placement.host import HostSources, probe_host
from shimpy.protocol.messages import BuildInfo, DeviceInfo
from shimpy.units import MIB

DEVICES_ARGV: Final = (sys.executable, "-m", "shimpy.engine", "--devices")
# The first use of a driver after a boot can take a good while.
_TIMEOUT_S: Final = 60.0
# After a failure the worker is not asked again for this long.
_RETRY_S: Final = 60.0

# What a process takes on a card besides llama.cpp's buffers, by backend. CUDA's is measured, the
# others are guesses on the safe side.
_OVERHEAD_BYTES: Final = {"CUDA": CUDA_OVERHEAD_BYTES, "ROCm": 640 * MIB, "SYCL": 512 * MIB}
_OTHER_OVERHEAD_BYTES: Final = 320 * MIB
# Backends whose devices are the host's own memory.
_SHARED_BACKENDS: Final = frozenset(("Metal", "MTL"))
# Of one card that two backends offer, the faster is taken.
_PREFERENCE: Final = ("CUDA", "ROCm", "HIP", "MUSA", "SYCL", "Metal", "MTL")
# A driver's total that differs by more is of something else, such as a MIG slice's whole card.
_SAME_CARD: Final = 0.1

_BUILDS: Final[dict[Vendor, tuple[str, str]]] = {
    "nvidia": ("CUDA", "-DGGML_CUDA=on"),
    "amd": ("HIP (ROCm)", "-DGGML_HIP=on"),
    "intel": ("Vulkan", "-DGGML_VULKAN=on"),
    "apple": ("Metal", "-DGGML_METAL=on"),
}
_INSTALL: Final = (
    'CMAKE_ARGS="{}" pip install --force-reinstall --no-cache-dir '
    "--no-binary llama-cpp-python llama-cpp-python~=0.3.36"
)


def ask_worker(argv: Sequence[str] = DEVICES_ARGV, *, timeout_s: float = _TIMEOUT_S) -> BuildInfo:
    """Return what a short-lived worker says of this build of llama.cpp.

    Raises:
        WorkerError: it failed, or took too long; carries its last lines.
    """
    environ = {**os.environ, "GGML_NO_BACKTRACE": "1"}
    try:
        done = subprocess.run(  # noqa: S603 -- our own interpreter
            argv, capture_output=True, timeout=timeout_s, check=False, env=environ
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise WorkerError(f"llama.cpp could not be asked for its devices: {error}") from error
    if done.returncode != 0:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-3:]
        raise WorkerError(
            f"llama.cpp could not list its devices (exit status {done.returncode}): "
            f"{' / '.join(last) or 'it said nothing'}"
        )
    try:
        return msgspec.json.decode(done.stdout, type=BuildInfo)
    except msgspec.DecodeError as error:
        raise WorkerError(f"llama.cpp's list of devices can't be read: {error}") from error


def list_devices() -> BuildInfo:
    """Return what this build of llama.cpp can use; asks nobody where that is the CPU alone.

    Raises:
        WorkerError: as `ask_worker`.
    """
    return cpu_build(installed_lib()) or ask_worker()


class Sources(msgspec.Struct, frozen=True, kw_only=True):
    """All that a snapshot is taken from; tests put their own in place."""

    # Raises WorkerError where llama.cpp can't be asked.
    list_devices: Callable[[], BuildInfo] = list_devices
    cards: CardSources = msgspec.field(default_factory=CardSources)
    host: HostSources = msgspec.field(default_factory=HostSources)
    clock: Callable[[], float] = time.monotonic


def probe_hardware(*, reserve_vram: int = 0, reserve_ram: int = 0) -> Hardware:
    """Return what a new worker could use at this moment; blocking, callable from any thread.

    The reserves, in bytes per GPU and of the host, count as taken.
    """
    return _prober().probe(reserve_vram=reserve_vram, reserve_ram=reserve_ram)


@cache
def _prober() -> Prober:
    """Return the one prober of this process: devices don't change while it lives."""
    return Prober(Sources())


class Prober:
    """Takes snapshots; remembers what this build of llama.cpp can use."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        self._lock = threading.Lock()
        self._build: BuildInfo | None = None
        self._failure = ""
        self._failed_at: float | None = None

    def probe(self, *, reserve_vram: int = 0, reserve_ram: int = 0) -> Hardware:
        """Return a snapshot as of now."""
        with self._lock:
            cards = probe_cards(self._sources.cards)
            was_known = self._build is not None
            build = self._known_build()
            devices = _usable_devices(build.devices) if build else ()
            gpus = [_with_driver(_gpu(device), device, cards) for device in devices]
            if None in gpus:
                gpus = self._asked_again(devices) if was_known else [_gpu(d) for d in devices]
        return Hardware(
            gpus=tuple(
                replace(gpu, free_bytes=max(0, gpu.free_bytes - reserve_vram))
                for gpu in gpus
                if gpu is not None
            ),
            unusable=tuple(self._unusable(cards, devices, build)),
            host=probe_host(self._sources.host, reserve_bytes=reserve_ram),
            library=build.llama_cpp if build else "",
        )

    def _known_build(self) -> BuildInfo | None:
        """Return what llama.cpp can use; None: it can't be asked, and why is remembered."""
        if self._build is None and not self._failed_lately():
            self._ask()
        return self._build

    def _failed_lately(self) -> bool:
        now = self._sources.clock()
        return self._failed_at is not None and now - self._failed_at < _RETRY_S

    def _ask(self) -> BuildInfo | None:
        try:
            self._build = self._sources.list_devices()
        except WorkerError as error:
            self._failure, self._failed_at = error.message, self._sources.clock()
            return None
        self._failure, self._failed_at = "", None
        return self._build

    def _asked_again(self, devices: tuple[DeviceInfo, ...]) -> list[Gpu | None]:
        """Return the GPUs with the free memory that the worker tells now."""
        fresh = None if self._failed_lately() else self._ask()
        known = {device.name: device for device in (fresh.devices if fresh else devices)}
        return [_gpu(known[device.name]) for device in devices if device.name in known]

    def _unusable(
        self, cards: Iterable[Card], devices: tuple[DeviceInfo, ...], build: BuildInfo | None
    ) -> Iterable[UnusableGpu]:
        """Yield the cards that llama.cpp can't use, with what would help."""
        environ = self._sources.cards.environ
        cards = tuple(cards)
        hidden = {
            card.device_id
            for card in cards
            if card.vendor == "nvidia" and card not in visible_nvidia(cards, environ)
        }
        for card in cards:
            if card.device_id in hidden or _is_among(card, devices):
                continue
            name, flag = _BUILDS[card.vendor]
            reason = f"this build of llama.cpp has no {name}"
            if build is None:
                reason = self._failure
            elif any(device.backend in name for device in build.devices):
                reason = f"llama.cpp's {name} does not list it: is its driver too old?"
            yield UnusableGpu(
                description=card.description,
                total_bytes=card.total_bytes,
                reason=reason,
                remedy=_INSTALL.format(flag),
            )


def _usable_devices(devices: Iterable[DeviceInfo]) -> tuple[DeviceInfo, ...]:
    """Return the GPUs, each card once, in llama.cpp's order."""

    def rank(device: DeviceInfo) -> int:
        known = device.backend in _PREFERENCE
        return _PREFERENCE.index(device.backend) if known else len(_PREFERENCE)

    gpus = [device for device in devices if device.kind in ("gpu", "igpu")]
    best: dict[str, DeviceInfo] = {}
    for device in sorted(gpus, key=rank):
        best.setdefault(pci_id(device.device_id) or device.name, device)
    return tuple(device for device in gpus if device in best.values())


def _gpu(device: DeviceInfo) -> Gpu:
    is_shared = device.kind == "igpu" or device.backend in _SHARED_BACKENDS
    overhead = _OVERHEAD_BYTES.get(device.backend, _OTHER_OVERHEAD_BYTES)
    return Gpu(
        name=device.name,
        description=device.description,
        backend=device.backend,
        free_bytes=device.free_bytes,
        total_bytes=device.total_bytes,
        overhead_bytes=overhead,
        workspace_bytes=CUDA_WORKSPACE_BYTES if device.backend == "CUDA" else 0,
        is_shared=is_shared,
        device_id=pci_id(device.device_id) or device.device_id,
    )


def _with_driver(gpu: Gpu, device: DeviceInfo, cards: Iterable[Card]) -> Gpu | None:
    """Return the GPU with the free memory that its driver tells; None: none does."""
    for card in cards:
        same = card.device_id and card.device_id == gpu.device_id
        off = abs(card.total_bytes - device.total_bytes)
        if same and card.free_bytes is not None and off <= _SAME_CARD * card.total_bytes:
            free = min(card.free_bytes, gpu.total_bytes)
            return replace(gpu, free_bytes=free, driver=card.driver)
    return None


def _is_among(card: Card, devices: Iterable[DeviceInfo]) -> bool:
    """Whether llama.cpp lists a card, by its address or, where it tells none, by its name."""
    for device in devices:
        address = pci_id(device.device_id)
        if address and card.device_id:
            if address == card.device_id:
                return True
            continue
        is_named = bool(device.description) and device.description in card.description
        if is_named or (card.vendor != "nvidia" and device.backend != "CUDA"):
            return True
    return False
