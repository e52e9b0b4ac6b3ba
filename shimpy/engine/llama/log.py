"""llama.cpp's log: kept for error messages and figures, and passed on to stderr.

The reason of a failure is nowhere but in the log. Steady decoding writes none, so a Python
callback costs nothing there. The callback is llama.cpp's for the life of the process.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections import deque

import msgspec

from shimpy.engine.llama.library import LL

# ggml.h, enum ggml_log_level (the table in llama_cpp/_logger.py is wrong).
_DEBUG, _INFO, _WARN, _ERROR, _CONT = 1, 2, 3, 4, 5
_MAX_LINES = 200
_STDERR = 2

_OVERRIDDEN = " buffer type overridden to "
_BUFFER = re.compile(r"(\S+)\s+(model|KV|RS|compute) buffer size =\s*([\d.]+) MiB")


class BufferLine(msgspec.Struct, frozen=True):
    """A buffer that llama.cpp said it allocated."""

    buffer_type: str
    kind: str
    mib: float


class NativeLog:
    """Takes llama.cpp's log lines; one object for the process, see `LOG`."""

    def __init__(self) -> None:
        self._errors: deque[str] = deque(maxlen=_MAX_LINES)
        self._partial = b""
        self._level = _INFO
        self.buffers: deque[BufferLine] = deque(maxlen=_MAX_LINES)
        self.n_overridden = 0

    def clear(self) -> None:
        """Forget what was said: a new model is loaded."""
        self._errors.clear()
        self.buffers.clear()
        self.n_overridden = 0

    def errors(self, n_last: int = 4) -> list[str]:
        """Return the last error lines, oldest first."""
        return list(self._errors)[-n_last:]

    def take(self, level: int, text: bytes) -> None:
        """Take what llama.cpp logs: a line, a part of one, or several."""
        if level != _CONT:
            self._level = level
        *lines, self._partial = (self._partial + text).split(b"\n")
        for line in lines:
            self._take_line(self._level, line)

    def _take_line(self, level: int, raw: bytes) -> None:
        line = raw.decode(errors="replace").strip()
        is_override = level == _DEBUG and _OVERRIDDEN in line
        self.n_overridden += is_override
        if level >= _INFO or is_override:
            os.write(_STDERR, raw + b"\n")
        if level == _ERROR and line:
            self._errors.append(line)
        if level == _INFO and (match := _BUFFER.search(line)):
            self.buffers.append(BufferLine(match[1], match[2], float(match[3])))


LOG = NativeLog()
"""The process's own: llama_log_set knows no more than one callback."""


@LL.llama_log_callback  # type: ignore[untyped-decorator]
def _callback(level: int, text: bytes, _user_data: ctypes.c_void_p) -> None:
    LOG.take(level, text)


def install_log() -> None:
    """Send llama.cpp's log to LOG; may be called again."""
    LL.llama_log_set(_callback, None)
