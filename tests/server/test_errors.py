"""Errors in each dialect's own form."""

from __future__ import annotations

import json

import pytest

from shimpy.errors import (
    ContextExceededError,
    DoesNotFitError,
    HeldBackError,
    InvalidNameError,
    InvalidOptionError,
    LoadError,
    NotFoundError,
    QueueFullError,
    ShimpyError,
    UnsupportedError,
    WorkerDiedError,
)
from shimpy.server.errors import error_body, headers_of, status_at

FULL = QueueFullError("full", retry_after_s=2.5)
LONG = ContextExceededError("too long", n_prompt=5000, n_ctx=4096)


@pytest.mark.parametrize(
    ("error", "status", "anthropics"),
    [
        (UnsupportedError("x"), 400, "invalid_request_error"),
        (NotFoundError("x"), 404, "not_found_error"),
        (FULL, 503, "overloaded_error"),
        (HeldBackError("x"), 503, "overloaded_error"),
        (DoesNotFitError("x"), 507, "api_error"),
        (WorkerDiedError("x"), 500, "api_error"),
    ],
)
def test_statuses_are_the_same_but_for_anthropics_own(
    error: ShimpyError, status: int, anthropics: str
) -> None:
    for path in ("/api/chat", "/v1/chat/completions", "/completion"):
        assert status_at(path, error) == status
    for path in ("/v1/messages", "/v1/messages/count_tokens"):
        assert status_at(path, error) == (529 if status == 503 else status)
        assert json.loads(error_body(path, error))["error"]["type"] == anthropics


@pytest.mark.parametrize("path", ["/completion", "/infill", "/v1/rerank", "/slots"])
def test_llamacpps_server_says_its_code(path: str) -> None:
    assert json.loads(error_body(path, FULL)) == {
        "error": {"code": 503, "message": "full", "type": "unavailable_error"}
    }
    error = json.loads(error_body(path, LONG))["error"]
    assert error["type"] == "exceed_context_size_error"
    assert (error["n_prompt_tokens"], error["n_ctx"]) == (5000, 4096)


def test_a_long_prompt_is_told_in_the_words_that_agents_look_for() -> None:
    error = json.loads(error_body("/v1/messages", LONG))["error"]
    assert error["message"].startswith("prompt is too long: 5000 tokens > 4096 maximum; too long")
    error = json.loads(error_body("/v1/chat/completions", LONG))["error"]
    assert error["code"] == "context_length_exceeded"


def test_clients_are_told_whether_to_ask_again() -> None:
    assert headers_of(FULL) == {"Retry-After": "3"}
    assert headers_of(DoesNotFitError("x")) == {"X-Should-Retry": "false"}
    assert headers_of(LoadError("x")) == {"X-Should-Retry": "false"}
    assert headers_of(WorkerDiedError("x")) == {}


def test_mistakes_are_told_apart_from_failures() -> None:
    """Ollama's form of an error has no place for it."""
    assert headers_of(InvalidOptionError("x")) == {"X-Error-Code": "invalid_option"}
    assert headers_of(InvalidNameError("x")) == {"X-Error-Code": "invalid_name"}
    assert headers_of(UnsupportedError("x")) == {}
