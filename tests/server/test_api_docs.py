"""docs/api.md names every route of the app, and no other."""

from __future__ import annotations

import re
from pathlib import Path

from shimpy.server.app import all_routes

PAGE = Path(__file__).parents[2] / "docs" / "api.md"

# | `GET` `HEAD /api/tags` | ..., | `POST /v1/completions` | ...
_ROW = re.compile(r"^\| ((?:`[A-Z]+` )*`[A-Z]+ /[^`]*`)", re.MULTILINE)
_METHODS = re.compile(r"`([A-Z]+)")


def documented() -> set[tuple[str, str]]:
    found = set()
    for row in _ROW.findall(PAGE.read_text(encoding="utf-8")):
        path = row.rpartition(" ")[2].rstrip("`")
        found |= {(method, path) for method in _METHODS.findall(row)}
    return found


def served() -> set[tuple[str, str]]:
    """The routes; aiohttp answers HEAD wherever it answers GET."""
    found = set()
    for route in all_routes():
        # {model:.+} is documented as {model}.
        path = re.sub(r"\{(\w+):[^}]*\}", r"{\1}", route.path)
        found.add((route.method, path))
    return found


def test_every_route_is_documented() -> None:
    assert served() - documented() == set()


def test_no_route_is_documented_that_does_not_exist() -> None:
    known = served()
    known |= {("HEAD", path) for method, path in known if method == "GET"}
    assert documented() - known == set()
