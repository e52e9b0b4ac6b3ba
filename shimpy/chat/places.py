"""Where in a JSON schema a compiler is, so that errors can say it; and its simple parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from shimpy.errors import UserError

Schema = Mapping[str, Any]


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where in the schema we are."""

    pointer: str = "#"
    depth: int = 0
    # The references that led here without a step into an object or array.
    followed: tuple[str, ...] = ()

    def inside(self, *keys: str | int) -> Place:
        """Return the place of a part that describes a part of the document."""
        return Place(pointer=self._to(keys), depth=self.depth + 1)

    def beside(self, *keys: str | int) -> Place:
        """Return the place of a part that describes the same document."""
        return Place(pointer=self._to(keys), depth=self.depth + 1, followed=self.followed)

    def _to(self, keys: Sequence[str | int]) -> str:
        parts = (str(key).replace("~", "~0").replace("/", "~1") for key in keys)
        return "/".join([self.pointer, *parts])

    def error(self, why: str) -> UserError:
        """Return the error of this part."""
        return UserError(f"the JSON schema can't be used at {self.pointer}: {why}")


def list_of(value: object, place: Place) -> list[Any]:
    """Return a part that must be a list.

    Raises:
        UserError: it is none.
    """
    if not isinstance(value, list):
        raise place.error("it is a list")
    return value


def counts(schema: Schema, low_key: str, high_key: str, place: Place) -> tuple[int, int | None]:
    """Return a lower and an upper count; 0 and None where they aren't given.

    Raises:
        UserError: one is no whole number, or the upper one is below the lower.
    """
    for key in (low_key, high_key):
        value = schema.get(key)
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        if value is not None and (isinstance(value, bool) or not whole or value < 0):
            raise place.beside(key).error("it is a whole number from 0 on")
    low, high = int(schema.get(low_key) or 0), schema.get(high_key)
    if high is not None and high < low:
        raise place.beside(high_key).error(f"it is below {low_key}, which is {low}")
    return low, None if high is None else int(high)
