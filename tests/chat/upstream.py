"""Chat templates rendered as Hugging Face's transformers does, for comparison."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

from jinja2.sandbox import ImmutableSandboxedEnvironment


def render_upstream(source: str, now: datetime, **variables: Any) -> str:
    """The text that transformers' apply_chat_template would make of these variables."""

    def raise_exception(message: str) -> None:
        raise ValueError(message)

    def tojson(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = now.strftime
    return environment.from_string(source).render(documents=None, **variables)
