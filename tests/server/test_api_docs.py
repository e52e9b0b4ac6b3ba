"""docs/api.md names every route of the app, and no other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import msgspec
import tomli

from shimpy.scheduler.states import EventKind
from shimpy.server.app import all_routes

PAGE = Path(__file__).parents[2] / "docs" / "api.md"

PROJECT = PAGE.parents[1] / "pyproject.toml"
PACKAGE = Path(__file__).parents[1] / "clients" / "js" / "package.json"

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


def test_the_clients_are_listed_at_the_versions_that_are_tested() -> None:
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line[:2] == "| "]
    extras = tomli.loads(PROJECT.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    tested = dict(pin.split("==") for pin in extras["clients"])
    tested |= msgspec.json.decode(PACKAGE.read_bytes())["dependencies"]
    # A validator that the others are used with.
    del tested["zod"]
    for name, version in tested.items():
        # llama-index's two packages share a row and the beginning of their names.
        short = name.removeprefix("llama-index")
        assert any(short in row and version in row for row in rows), f"{name} {version}"


def test_every_route_is_documented() -> None:
    assert served() - documented() == set()


def test_no_route_is_documented_that_does_not_exist() -> None:
    known = served()
    known |= {("HEAD", path) for method, path in known if method == "GET"}
    assert documented() - known == set()


def test_every_kind_of_event_is_documented() -> None:
    text = PAGE.read_text(encoding="utf-8")
    listed = text.partition("`kind` is one of")[2].partition("```")[0]
    assert set(re.findall(r"`(\w+)`", listed)) == set(get_args(EventKind))
