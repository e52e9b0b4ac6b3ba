"""Structured logging, set up once per process.

Events, not prose: a short fixed name with key-values. On a terminal the lines are for
people; elsewhere (systemd, files, pipes) each is one JSON object. Everything goes to
stderr, so that stdout holds data alone.
"""

from __future__ import annotations

import logging
import sys
from typing import Any, Literal

import structlog


def setup_logging(
    level: Literal["debug", "info", "warning", "error"],
    log_format: Literal["auto", "console", "json"],
) -> None:
    """Send this process's log lines to stderr in the given form."""
    as_json = log_format == "json" or (log_format == "auto" and not sys.stderr.isatty())
    renderer: Any = (
        structlog.processors.JSONRenderer(ensure_ascii=False)
        if as_json
        else structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(),
            # The pretty ones print local variables: prompts have no place in a log.
            exception_formatter=structlog.dev.plain_traceback,
        )
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=as_json),
            *([structlog.processors.format_exc_info] if as_json else []),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(
            logging.getLevelNamesMapping()[level.upper()]
        ),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )


def get_logger(name: str) -> structlog.typing.FilteringBoundLogger:
    """Return the logger of one part of the program; its lines carry `part=name`."""
    logger: structlog.typing.FilteringBoundLogger = structlog.get_logger(part=name)
    return logger
