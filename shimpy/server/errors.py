"""Errors as HTTP: the status of each, and the body that each dialect's clients expect.

    InvalidName, InvalidOption, ContextExceeded, Unsupported, other UserErrors   400
    Unauthorized                                                                 401
    Forbidden, Offline                                                           403
    NotFound                                                                     404
    BodyTooLarge                                                                 413
    Registry, Gguf: a model whose file is broken                                 422
    QueueFull, HeldBack, Stopping                              503 with Retry-After
    DoesNotFit, other CapacityErrors                                             507
    Load, WorkerDied, Protocol, other ShimpyErrors                               500
    Remote: a hub or another server failed or refused                            502
    anything else: a bug, logged with its traceback under the request's id       500

507 (insufficient storage) sets a model that this machine cannot hold apart from a failure, and
422 one whose file cannot be used: trying again does not help. Anthropic's clients know 503 as
529. An unknown path is a text 404 and a wrong method a text 405, as Ollama's clients know them.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec

from shimpy.errors import (
    ERROR_CODE_HEADER,
    CapacityError,
    ContextExceededError,
    DoesNotFitError,
    HeldBackError,
    InvalidNameError,
    InvalidOptionError,
    LoadError,
    NotFoundError,
    OfflineError,
    QueueFullError,
    RegistryError,
    RemoteError,
    ShimpyError,
    StoppingError,
    UnsupportedError,
    UserError,
)

_UNAVAILABLE = 503
# Not in HTTP: Anthropic's "overloaded".
_OVERLOADED = 529
# Those of llama.cpp's server whose names are no other dialect's.
_LLAMACPP_PATHS = frozenset(
    {
        "/completion",
        "/completions",
        "/infill",
        "/embedding",
        "/embeddings",
        "/tokenize",
        "/detokenize",
        "/apply-template",
        "/props",
        "/slots",
        "/rerank",
        "/reranking",
        "/v1/rerank",
        "/v1/reranking",
    }
)


class UnauthorizedError(UserError):
    """The request needs an API key, and has none that is known."""

    code = "unauthorized"


class ForbiddenError(UserError):
    """The request may not be made: a foreign Host or Origin, or a key for other things."""

    code = "forbidden"


class BodyTimeoutError(UserError):
    """The request's body has stopped coming."""

    code = "body_timeout"


class BodyTooLargeError(UserError):
    """The request's body is over the configured limit."""

    code = "body_too_large"


class InternalError(ShimpyError):
    """A bug; what happened is in the log under the request's id."""

    code = "internal"

    def __init__(self, request_id: str) -> None:
        super().__init__(f"internal error; the daemon's log has it under request {request_id}")


_STATUS: dict[type[ShimpyError], int] = {
    UnauthorizedError: 401,
    ForbiddenError: 403,
    BodyTimeoutError: 408,
    BodyTooLargeError: 413,
    UserError: 400,
    NotFoundError: 404,
    QueueFullError: 503,
    StoppingError: 503,
    HeldBackError: 503,
    CapacityError: 507,
    RegistryError: 422,
    OfflineError: 403,
    RemoteError: 502,
    ShimpyError: 500,
}


def status_of(error: ShimpyError) -> int:
    """Return the HTTP status of an error, by its nearest class in the table above."""
    return next(_STATUS[cls] for cls in type(error).__mro__ if cls in _STATUS)


def status_at(path: str, error: ShimpyError) -> int:
    """Return the HTTP status of an error in the dialect that the request's path belongs to."""
    status = status_of(error)
    return _OVERLOADED if status == _UNAVAILABLE and is_anthropic(path) else status


def headers_of(error: ShimpyError) -> dict[str, str]:
    """Return the headers that an error's answer carries."""
    if isinstance(error, QueueFullError | HeldBackError | StoppingError):
        return {"Retry-After": str(max(1, math.ceil(error.retry_after_s)))}
    if isinstance(error, UnauthorizedError):
        return {"WWW-Authenticate": "Bearer"}
    if isinstance(error, DoesNotFitError | LoadError):
        # OpenAI's and Anthropic's SDKs would ask again at any 5xx, and load again.
        return {"X-Should-Retry": "false"}
    if isinstance(error, InvalidNameError | InvalidOptionError):
        # Ollama's form has no place for it, and a mistake is told apart from a failure by it.
        return {ERROR_CODE_HEADER: error.code}
    return {}


def error_body(path: str, error: ShimpyError) -> bytes:
    """Return the JSON of an error in the dialect that the request's path belongs to."""
    return msgspec.json.encode(_dialect(path)(error))


def is_anthropic(path: str) -> bool:
    """Whether a path is one of Anthropic's dialect."""
    return path == "/v1/messages" or path.startswith("/v1/messages/")


def _dialect(path: str) -> Any:
    if is_anthropic(path):
        return anthropic_error
    if path in _LLAMACPP_PATHS:
        return llamacpp_error
    if path.startswith("/v1/"):
        return openai_error
    return ollama_error


def ollama_error(error: ShimpyError) -> dict[str, Any]:
    """Return `{"error": text}`, the form of Ollama and of shimpy's own routes."""
    return {"error": error.message}


def openai_error(error: ShimpyError) -> dict[str, Any]:
    """Return OpenAI's error object; `code` is "context_length_exceeded" where theirs is."""
    status = status_of(error)
    known = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
    kind = known.get(
        status,
        "invalid_request_error" if status < 500 else "server_error",  # noqa: PLR2004
    )
    code = "context_length_exceeded" if isinstance(error, ContextExceededError) else error.code
    param = getattr(error, "option", "") or None
    return {"error": {"message": error.message, "type": kind, "param": param, "code": code}}


def llamacpp_error(error: ShimpyError) -> dict[str, Any]:
    """Return the error object of llama.cpp's server."""
    status = status_of(error)
    kinds = {
        400: "invalid_request_error",
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        408: "invalid_request_error",
        413: "invalid_request_error",
        422: "invalid_request_error",
        503: "unavailable_error",
    }
    shown: dict[str, Any] = {
        "code": status,
        "message": error.message,
        "type": kinds.get(status, "server_error"),
    }
    if isinstance(error, ContextExceededError):
        shown["type"] = "exceed_context_size_error"
        shown |= {"n_prompt_tokens": error.n_prompt, "n_ctx": error.n_ctx}
    elif isinstance(error, UnsupportedError):
        shown["type"] = "not_supported_error"
    return {"error": shown}


def anthropic_error(error: ShimpyError) -> dict[str, Any]:
    """Return Anthropic's error object."""
    kinds = {
        400: "invalid_request_error",
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        408: "invalid_request_error",
        413: "request_too_large",
        422: "invalid_request_error",
        503: "overloaded_error",
    }
    kind = kinds.get(status_of(error), "api_error")
    message = error.message
    if isinstance(error, ContextExceededError) and error.n_prompt:
        # By these words Claude Code knows that it has to shorten the conversation.
        limit = f"{error.n_prompt} tokens > {error.n_ctx} maximum"
        message = f"prompt is too long: {limit}; {message}"
    return {"type": "error", "error": {"type": kind, "message": message}}
