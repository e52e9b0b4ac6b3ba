"""`shimpy` on a machine with so much RAM and no GPU: `RAM_BYTES=... python -m ... serve`.

The budget is exact whatever else runs here: the scheduler's own books tell what is in use.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from shimpy.cli.main import main
from shimpy.config import Config
from shimpy.placement.hardware import Hardware, suppose
from shimpy.server import daemon

RAM_BYTES = "RAM_BYTES"


def _make_probe(_config: Config) -> Callable[[], Hardware]:
    hardware = suppose(None, vram_bytes=[], ram_bytes=int(os.environ[RAM_BYTES]))
    return lambda: hardware


if __name__ == "__main__":
    daemon.make_probe = _make_probe
    main()
