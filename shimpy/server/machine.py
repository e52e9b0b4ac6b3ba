"""The machine that models are placed on: probed when it matters, remembered for reports."""

from __future__ import annotations

from collections.abc import Callable

from shimpy.logs import get_logger
from shimpy.placement.hardware import Hardware, UnusableGpu
from shimpy.scheduler.overheads import Overheads
from shimpy.units import format_bytes

_log = get_logger("machine")


class Machine:
    """The hardware as the last probe saw it."""

    def __init__(self, probe: Callable[[], Hardware], overheads: Overheads | None = None) -> None:
        """`overheads` know what workers take on the cards beside their buffers."""
        self._probe = probe
        self._overheads = overheads or Overheads(None)
        self._last: Hardware | None = None

    def use(self, probe: Callable[[], Hardware]) -> None:
        """Probe in another way from now on."""
        self._probe = probe

    def probe(self) -> Hardware:
        """Return a fresh snapshot; blocking, so for a thread."""
        self._last = self._overheads.applied(self._probe())
        return self._last

    @property
    def unusable_gpus(self) -> tuple[UnusableGpu, ...]:
        """Cards that this build of llama.cpp can't use, as far as was seen."""
        return self._last.unusable if self._last is not None else ()


def report_hardware(hardware: Hardware) -> None:
    """Log what models can be placed on, and each card that lies idle with what would help."""
    for gpu in hardware.gpus:
        _log.info(
            "gpu",
            name=gpu.name,
            description=gpu.description,
            free=format_bytes(gpu.free_bytes),
            total=format_bytes(gpu.total_bytes),
        )
    for card in hardware.unusable:
        _log.warning(
            "gpu_unusable", description=card.description, reason=card.reason, remedy=card.remedy
        )
    _log.info("host", available=format_bytes(hardware.host.available_bytes))
