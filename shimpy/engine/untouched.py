"""How much of the RAM that a worker was given takes none yet.

The kernel counts such memory as free, and so would whoever plans on it.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Final

from shimpy.units import MIB

_STATM: Final = Path("/proc/self/statm")
# Smaller changes are no news.
_STEP_BYTES: Final = 16 * MIB


class Untouched:
    """What is left of `n_bytes` that nothing had touched as it was made."""

    def __init__(self, n_bytes: int) -> None:
        self._n_bytes = n_bytes
        self._before = _anonymous_bytes() if n_bytes else 0

    @property
    def n_bytes(self) -> int:
        """Bytes that are still to be taken, in steps; all that the process took counts as used."""
        if not self._n_bytes:
            return 0
        taken = _anonymous_bytes() - self._before
        left = min(self._n_bytes, max(0, self._n_bytes - taken))
        return -(-left // _STEP_BYTES) * _STEP_BYTES


def _anonymous_bytes() -> int:
    """Return the RAM of a process that is no file's; proc(5): pages resident and shared."""
    _, resident, shared, *_ = _STATM.read_text(encoding="ascii").split()
    return (int(resident) - int(shared)) * mmap.PAGESIZE
