"""Models as Anthropic lists them, on the path that OpenAI's clients ask too."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from shimpy.registry.model import Model

# By it their clients can be told from OpenAI's.
VERSION_HEADER = "anthropic-version"


def models_page(models: Sequence[Model]) -> dict[str, Any]:
    """Return all models as one page."""
    entries = [anthropic_entry(model) for model in models]
    return {
        "data": entries,
        "has_more": False,
        "first_id": entries[0]["id"] if entries else None,
        "last_id": entries[-1]["id"] if entries else None,
    }


def anthropic_entry(model: Model) -> dict[str, Any]:
    """Return one model."""
    created = datetime.fromtimestamp(int(model.modified_s), UTC)
    return {
        "type": "model",
        "id": str(model.name),
        "display_name": str(model.name) if model.shape is None else model.shape.title,
        "created_at": created.strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
