"""Ollama's `options` object, which every dialect takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shimpy.parameters import read_parameters
from shimpy.server.options import Options


def parse_options(given: Mapping[str, Any] | None) -> Options:
    """Return Ollama's `options` as Options; keys that are not known are ignored.

    Raises:
        InvalidOptionError: a value of a wrong type or out of range; `option` names it.
    """
    return Options(**read_parameters(given or {}))
