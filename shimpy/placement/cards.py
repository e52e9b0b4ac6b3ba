"""Reads which graphics cards are in the machine and what memory is free on them.

NVML tells it of NVIDIA cards, the amdgpu driver of AMD's, both in well under a millisecond and
without taking memory on the card. Of others only their presence is known.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from shimpy.units import GIB

Vendor = Literal["nvidia", "amd", "intel", "apple"]

_VENDORS: Final[dict[str, Vendor]] = {"0x10de": "nvidia", "0x1002": "amd", "0x8086": "intel"}
# PCI class of display controllers.
_DISPLAY: Final = "0x03"
# An integrated GPU has a small carve-out of the RAM as its VRAM; it is no card to point out.
_LEAST_CARD_BYTES: Final = 2 * GIB
_INTEL_INTEGRATED: Final = "0000:00:02.0"
_PCI: Final = re.compile(
    r"(?:([0-9a-f]{4,8}):)?([0-9a-f]{2}):([0-9a-f]{2})(?:\.([0-9a-f]))?", re.IGNORECASE
)


class Card(msgspec.Struct, frozen=True, kw_only=True):
    """A card in the machine, whether or not llama.cpp can use it."""

    vendor: Vendor
    description: str
    # As normalized by `pci_id`; empty where there is none.
    device_id: str = ""
    uuid: str = ""
    # Bytes; None: unknown.
    free_bytes: int | None = None
    total_bytes: int = 0
    # The driver's version.
    driver: str = ""


def _import_nvml() -> Any:
    import pynvml

    pynvml.nvmlInit()
    return pynvml


class CardSources(msgspec.Struct, frozen=True, kw_only=True):
    """Where cards are looked for; tests put their own in place."""

    sys: Path = Path("/sys")
    # Returns the initialized pynvml, or raises where there is no NVIDIA driver.
    nvml: Callable[[], Any] = _import_nvml
    environ: Mapping[str, str] = msgspec.field(default_factory=lambda: os.environ)
    # platform.system() and platform.machine().
    system: tuple[str, str] = msgspec.field(
        default_factory=lambda: (platform.system(), platform.machine())
    )


def probe_cards(sources: CardSources) -> tuple[Card, ...]:
    """Return the cards of the machine: NVIDIA's by NVML, the rest as the kernel lists them."""
    nvidia = tuple(_nvidia_cards(sources))
    seen = {card.device_id for card in nvidia}
    others = tuple(card for card in _listed_cards(sources) if card.device_id not in seen)
    if sources.system == ("Darwin", "arm64"):
        others += (Card(vendor="apple", description="Apple GPU"),)
    return nvidia + others


def pci_id(text: str) -> str:
    """Return a PCI address as "0000:01:00.0", however it was written; empty: it is none."""
    match = _PCI.fullmatch(text.strip())
    if match is None:
        return ""
    domain, bus, device, function = match.groups()
    return (
        f"{int(domain or '0', 16):04x}:{bus.lower()}:{device.lower()}.{(function or '0').lower()}"
    )


def visible_nvidia(cards: tuple[Card, ...], environ: Mapping[str, str]) -> tuple[Card, ...]:
    """Return the NVIDIA cards that CUDA_VISIBLE_DEVICES leaves, in its order; all without it.

    It names cards by index or by a UUID or its beginning, and ends at the first it can't find.
    An index counts CUDA's own order, which is NVML's where CUDA_DEVICE_ORDER is PCI_BUS_ID.
    """
    nvidia = tuple(card for card in cards if card.vendor == "nvidia")
    wanted = environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        return nvidia
    found: list[Card] = []
    for part in wanted.split(","):
        name = part.strip()
        if name.isdigit() and int(name) < len(nvidia):
            found.append(nvidia[int(name)])
            continue
        matches = [card for card in nvidia if name and card.uuid.startswith(name)]
        if len(matches) != 1:
            break
        found.append(matches[0])
    return tuple(found)


def _nvidia_cards(sources: CardSources) -> Iterator[Card]:
    # NVML raises an error of its own for each thing that may be missing: the library, the
    # driver, the permission, a card that fell off the bus.
    try:
        nvml = sources.nvml()
        count = nvml.nvmlDeviceGetCount()
    except Exception:  # noqa: BLE001 -- no NVML, no NVIDIA card
        return
    driver = ""
    with contextlib.suppress(nvml.NVMLError):
        driver = _text(nvml.nvmlSystemGetDriverVersion())
    for index in range(count):
        with contextlib.suppress(nvml.NVMLError):
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
            yield Card(
                vendor="nvidia",
                description=_text(nvml.nvmlDeviceGetName(handle)),
                device_id=pci_id(_text(nvml.nvmlDeviceGetPciInfo(handle).busId)),
                uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
                free_bytes=int(memory.free),
                total_bytes=int(memory.total),
                driver=driver,
            )


def _listed_cards(sources: CardSources) -> Iterator[Card]:
    """Yield the cards under /sys/class/drm, once each; integrated ones are left out."""
    found = set()
    for folder in sorted(sources.sys.glob("class/drm/card*/device")):
        vendor = _VENDORS.get(_read(folder / "vendor"))
        device_id = pci_id(folder.resolve().name)
        if vendor is None or device_id in found or not _read(folder / "class").startswith(_DISPLAY):
            continue
        found.add(device_id)
        total, used = (_read(folder / f"mem_info_vram_{part}") for part in ("total", "used"))
        if _is_integrated(vendor, device_id, total):
            continue
        has_memory = total.isdigit() and used.isdigit()
        yield Card(
            vendor=vendor,
            description=f"{vendor.upper() if vendor == 'amd' else vendor.capitalize()} GPU at "
            f"{device_id or folder.parent.name}",
            device_id=device_id,
            free_bytes=max(0, int(total) - int(used)) if has_memory else None,
            total_bytes=int(total) if total.isdigit() else 0,
        )


def _is_integrated(vendor: Vendor, device_id: str, vram: str) -> bool:
    if vendor == "intel":
        return device_id == _INTEL_INTEGRATED
    return vendor == "amd" and vram.isdigit() and int(vram) < _LEAST_CARD_BYTES


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value
