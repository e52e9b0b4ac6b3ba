"""Commands that run in the tests' own process leave its logging as it was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import structlog

from shimpy import logs


@pytest.fixture(autouse=True)
def _same_logging(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before, is_set = structlog.get_config(), structlog.is_configured()
    monkeypatch.setattr(logs._THRESHOLD, "level", logs._THRESHOLD.level)
    yield
    structlog.configure(**before) if is_set else structlog.reset_defaults()
