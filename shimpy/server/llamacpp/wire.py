"""The bodies and answers of llama.cpp's server as typed structs.

Source: llama.cpp, tools/server/README.md and server-task.cpp (to_json_non_oaicompat). What its
server takes and has no meaning here (id_slot, cache_prompt, lora, n_discard, dry_multiplier,
t_max_prompt_ms) is ignored.
"""

from __future__ import annotations

from typing import Any

import msgspec

from shimpy.server.options import Sampled

# --- requests ---------------------------------------------------------------------------------


class CompletionBody(Sampled, frozen=True):
    """POST /completion; the last two fields are shimpy's own."""

    model: str | None = None
    # A text, a list of tokens and texts, or a list of such prompts.
    prompt: Any = None
    n_predict: int | None = None
    max_tokens: int | None = None
    n_cmpl: int | None = None
    n: int | None = None
    # Which take part; only "infill" is looked for, the others take part by their values.
    samplers: list[str] | str | None = None
    # {id or text: amount or false}, or a list of such pairs.
    logit_bias: dict[str, Any] | list[Any] | None = None
    stop: str | list[str] | None = None
    json_schema: dict[str, Any] | bool | None = None
    grammar: str | None = None
    stream: bool | None = None
    n_probs: int | None = None
    post_sampling_probs: bool | None = None
    return_tokens: bool | None = None
    timings_per_token: bool | None = None
    # Spaces and tabs that each new line has to begin with.
    n_indent: int | None = None
    # After the first new line, no more than so long since the prompt was read.
    t_max_predict_ms: float | None = None
    # Only these fields of the answer; "a/b" is the field b of the field a.
    response_fields: list[str] | None = None
    keep_alive: Any = None
    # Ollama's options.
    options: dict[str, Any] | None = None


class ExtraBody(msgspec.Struct):
    """A piece of another file."""

    text: str
    filename: str | None = None


class InfillBody(CompletionBody, frozen=True):
    """POST /infill; `prompt` is what the middle begins with."""

    input_prefix: str | None = None
    input_suffix: str | None = None
    input_extra: list[ExtraBody] | None = None


class EmbeddingBody(msgspec.Struct):
    """POST /embedding."""

    model: str | None = None
    content: str | list[Any] | None = None
    input: str | list[Any] | None = None
    # -1: as the model gives it; 2: of length 1.
    embd_normalize: int | None = None
    keep_alive: Any = None
    options: dict[str, Any] | None = None


class TokenizeBody(msgspec.Struct):
    """POST /tokenize."""

    model: str | None = None
    content: str | list[Any] | None = None
    add_special: bool | None = None
    parse_special: bool | None = None
    with_pieces: bool | None = None


class DetokenizeBody(msgspec.Struct):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[int] | None = None


class RerankBody(msgspec.Struct):
    """POST /v1/rerank: Jina's form with `documents`, TEI's with `texts`."""

    model: str | None = None
    query: str | None = None
    documents: list[str | dict[str, Any]] | None = None
    texts: list[str] | None = None
    top_n: int | None = None
    return_text: bool | None = None
    return_documents: bool | None = None
    keep_alive: Any = None
    options: dict[str, Any] | None = None


# --- answers ----------------------------------------------------------------------------------


class Rival(msgspec.Struct, kw_only=True):
    """A token that might have been."""

    id: int
    token: str
    bytes: list[int]
    logprob: float


class Probability(msgspec.Struct, kw_only=True):
    """A token with the logarithm of its probability, and its rivals."""

    id: int
    token: str
    bytes: list[int]
    logprob: float
    top_logprobs: list[Rival]


class Timings(msgspec.Struct, kw_only=True):
    """How many tokens, and how fast; 0 where there were none."""

    cache_n: int
    prompt_n: int
    prompt_ms: float
    prompt_per_token_ms: float
    prompt_per_second: float
    predicted_n: int
    predicted_ms: float
    predicted_per_token_ms: float
    predicted_per_second: float


class Piece(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A chunk of a streamed completion."""

    index: int
    content: str
    tokens: list[int]
    stop: bool
    id_slot: int
    tokens_predicted: int
    tokens_evaluated: int
    completion_probabilities: list[Probability] | msgspec.UnsetType = msgspec.UNSET
    timings: Timings | msgspec.UnsetType = msgspec.UNSET


class Completion(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A whole completion, or the last chunk of a streamed one."""

    index: int
    content: str
    tokens: list[int]
    id_slot: int
    stop: bool
    model: str
    tokens_predicted: int
    tokens_evaluated: int
    generation_settings: dict[str, Any]
    prompt: str
    has_new_line: bool
    truncated: bool
    stop_type: str
    stopping_word: str
    tokens_cached: int
    timings: Timings
    completion_probabilities: list[Probability] | msgspec.UnsetType = msgspec.UNSET
