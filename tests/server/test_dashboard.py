"""The Grafana dashboard asks for metrics and labels that exist."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from shimpy.config import Config
from shimpy.scheduler.scheduler import Scheduler
from shimpy.server.metrics import Metrics
from tests.server.harness import MACHINE

ROOT = Path(__file__).parents[2]
DASHBOARD = ROOT / "docs" / "grafana" / "shimpy.json"
# What Prometheus makes of a histogram, and of a counter.
_SUFFIX = re.compile(r"_(bucket|count|sum|total|created)$")


def expressions() -> list[str]:
    dashboard: dict[str, Any] = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def exported() -> set[str]:
    text = Metrics(Scheduler(Config(), lambda: MACHINE)).render().decode()
    names = re.findall(r"^# TYPE (\S+)", text, re.MULTILINE)
    return {_SUFFIX.sub("", name) for name in names}


async def test_every_metric_that_is_asked_for_exists() -> None:
    asked = {
        _SUFFIX.sub("", name)
        for expression in expressions()
        for name in re.findall(r"\b((?:shimpy|process)_\w+)", expression)
    }
    assert len(asked) > 10
    assert asked - exported() == set()


async def test_every_metric_is_documented() -> None:
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    documented = {_SUFFIX.sub("", name) for name in re.findall(r"`(shimpy_\w+)`", page)}
    own = {name for name in exported() if name.startswith("shimpy_")}
    assert documented == own
