"""Structured logging, set up once per process.

Events, not prose: a short fixed name with key-values. On a terminal the lines are for
people; elsewhere (systemd, files, pipes) each is one JSON object. Everything goes to
stderr, so that stdout holds data alone; a log file takes stderr's place.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any, Literal

import structlog

from shimpy.units import MIB

Level = Literal["debug", "info", "warning", "error"]

# A log file that has grown to this becomes the old one: at most twice this is kept.
MAX_FILE_BYTES = 16 * MIB
_STDOUT, _STDERR = 1, 2
_LEVELS = logging.getLevelNamesMapping()


def setup_logging(
    level: Level,
    log_format: Literal["auto", "console", "json"],
    file: Path | None = None,
) -> None:
    """Send this process's log lines to stderr in the given form, or to a file in its place.

    Raises:
        OSError: the file can't be written.
    """
    sink = _Sink(file)
    as_json = log_format == "json" or (log_format == "auto" and not sys.stderr.isatty())
    renderer: Any = (
        structlog.processors.JSONRenderer(ensure_ascii=False)
        if as_json
        else structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty() and not os.environ.get("NO_COLOR"),
            # The pretty ones print local variables: prompts have no place in a log.
            exception_formatter=structlog.dev.plain_traceback,
        )
    )
    set_level(level)
    structlog.configure(
        processors=[
            _THRESHOLD,
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=as_json),
            *([structlog.processors.format_exc_info] if as_json else []),
            renderer,
        ],
        # Every level gets as far as the threshold, which may move under loggers that are kept.
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG),
        logger_factory=structlog.WriteLoggerFactory(sink),  # type: ignore[arg-type]
    )


def set_level(level: Level) -> None:
    """Log what is at least this important from now on."""
    _THRESHOLD.level = _LEVELS[level.upper()]


def get_logger(name: str) -> structlog.typing.FilteringBoundLogger:
    """Return the logger of one part of the program; its lines carry `part=name`."""
    logger: structlog.typing.FilteringBoundLogger = structlog.get_logger(part=name)
    return logger


class _Threshold:
    """The first processor: drops what is not important enough."""

    def __init__(self) -> None:
        self.level = logging.INFO

    def __call__(
        self, _logger: Any, method: str, event: MutableMapping[str, Any]
    ) -> MutableMapping[str, Any]:
        if _LEVELS[method.upper()] < self.level:
            raise structlog.DropEvent
        return event


# structlog's configuration is the process's own, and so is this.
_THRESHOLD = _Threshold()


class _Sink:
    """What lines are written to; a full disk or a reader that has gone costs them alone.

    A file is put in the place of stdout and stderr, so that it also gets what libraries and
    the interpreter say.
    """

    def __init__(self, file: Path | None) -> None:
        self._file = file
        if file is not None:
            self._take_place(file)

    def write(self, text: str) -> None:
        """Write a line; called under structlog's lock."""
        with contextlib.suppress(OSError):
            sys.stderr.write(text)

    def flush(self) -> None:
        """Let the line out, and begin a new file where this one has grown large."""
        with contextlib.suppress(OSError):
            sys.stderr.flush()
            if self._file is not None and os.fstat(_STDERR).st_size >= MAX_FILE_BYTES:
                self._file.replace(self._file.with_name(f"{self._file.name}.1"))
                self._take_place(self._file)

    @staticmethod
    def _take_place(file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("ab") as opened:
            os.dup2(opened.fileno(), _STDOUT)
            os.dup2(opened.fileno(), _STDERR)
