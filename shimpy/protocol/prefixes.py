"""Where a model's saved prefixes lie: known to the workers that write them and to the daemon."""

from __future__ import annotations

from typing import Final

# Hexadecimal digits of a model's digest that make the name of its folder.
FOLDER_DIGITS: Final = 32


def folder_name(digest: str) -> str:
    """Return the name of the folder of a model's saved prefixes."""
    return digest[:FOLDER_DIGITS]
