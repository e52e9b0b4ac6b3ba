"""Imports of the daemon's libraries, without what they load for others.

Without this they take two thirds more instructions, between `shimpy serve` and its first answer.
"""

from __future__ import annotations

import gc
import ssl
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quick_imports() -> Iterator[None]:
    """Let modules be imported meanwhile; no other thread may import anything.

    aiohttp's client reads the system's certificates, twice, as it is imported: the daemon is no
    client of aiohttp's, and without certificates that client trusts nobody. structlog imports
    rich for tracebacks with local variables, which are never logged. And what is imported stays:
    to look for garbage among it takes a tenth of the instructions.
    """
    gc.disable()
    load_certificates = ssl.SSLContext.set_default_verify_paths
    has_rich = "rich" in sys.modules
    ssl.SSLContext.set_default_verify_paths = lambda self: None  # type: ignore[method-assign]  # noqa: ARG005 - its own name
    if not has_rich:
        # An import of it fails until it is taken away again.
        sys.modules["rich"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        ssl.SSLContext.set_default_verify_paths = load_certificates  # type: ignore[method-assign]
        if not has_rich:
            del sys.modules["rich"]
