"""The one path of embeddings, in no dialect: texts in, one vector each out."""

from __future__ import annotations

import asyncio
import math
import sys
import time
from array import array
from collections.abc import Iterable, Sequence
from typing import Any, Final

import msgspec

from shimpy.errors import InvalidOptionError, UnsupportedError, UserError
from shimpy.protocol.messages import Embedded, Text, Tokens
from shimpy.server.generation import acquire, find_model
from shimpy.server.options import Options
from shimpy.server.record import Record
from shimpy.server.services import Services
from shimpy.server.streaming import encode_json

# Numbers in all vectors of an answer: OpenAI's 2048 inputs for the longest vectors that there are.
MAX_NUMBERS: Final = 16 * 1024 * 1024


class EmbeddingRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What a client wants embedded."""

    model: str
    # Texts, or what a client tokenized itself.
    inputs: tuple[str | tuple[int, ...], ...]
    options: Options = msgspec.field(default_factory=Options)
    keep_alive_s: float | None = None
    # A text over the context is cut; else it is an error.
    truncate: bool = True
    # Vectors of length 1.
    normalize: bool = True
    # Keep only so many numbers of each vector, as Matryoshka models allow.
    n_dimensions: int | None = None


class Embeddings(msgspec.Struct, frozen=True, kw_only=True):
    """One vector for each input, in order; times in seconds."""

    vectors: tuple[array[float], ...]
    n_tokens: int
    load_s: float
    total_s: float


async def run_embedding(
    services: Services, request: EmbeddingRequest, record: Record
) -> Embeddings:
    """Return the vectors of a request's inputs; without inputs the model is only loaded.

    Raises:
        UserError: a text is too long and not to be cut, there are not so many dimensions, or too
            many inputs.
        ShimpyError: as for a generation.
    """
    arrived_s = time.monotonic()
    model = await find_model(services, request.model, record)
    if model.shape is not None and model.shape.is_reranker:
        raise UnsupportedError(f'"{model.name}" does not support embed: it ranks documents')
    async with acquire(services, model, request.options, request.keep_alive_s, record) as lease:
        check_size(len(request.inputs), lease.ready.n_embd)
        answer = Embedded(request=0, n_embd=0, data=b"", n_tokens=0)
        if request.inputs:
            answer = await lease.embed(
                [[_part(given)] for given in request.inputs],
                truncate=request.truncate,
                normalize=request.normalize,
            )
        load_s = lease.load_s
    record.n_prompt, record.outcome = answer.n_tokens, "stop"
    return Embeddings(
        vectors=await asyncio.to_thread(_vectors, answer, request),
        n_tokens=answer.n_tokens,
        load_s=load_s,
        total_s=time.monotonic() - arrived_s,
    )


def check_size(n_inputs: int, n_embd: int) -> None:
    """Refuse what would be too large an answer.

    Raises:
        UserError: over MAX_NUMBERS numbers; says how many inputs are not too many.
    """
    n_most = MAX_NUMBERS // max(1, n_embd)
    if n_inputs > n_most:
        raise UserError(
            f"{n_inputs} inputs are too many for one request: this model's vectors have {n_embd} "
            f"numbers; send at most {n_most} inputs at a time"
        )


async def encode_each(items: Iterable[Any]) -> list[msgspec.Raw]:
    """Return each item as JSON, with other requests' turns in between.

    A thousand vectors of four thousand numbers take a second.
    """
    encoded = []
    for item in items:
        encoded.append(msgspec.Raw(encode_json(item)))
        await asyncio.sleep(0)
    return encoded


def _part(given: str | tuple[int, ...]) -> Text | Tokens:
    return Text(given) if isinstance(given, str) else Tokens(list(given))


def _vectors(answer: Embedded, request: EmbeddingRequest) -> tuple[array[float], ...]:
    return tuple(_shortened(vector, request) for vector in split_vectors(answer))


def split_vectors(answer: Embedded) -> Sequence[array[float]]:
    """Return the vectors in a worker's answer."""
    numbers = array("f")
    numbers.frombytes(answer.data)
    if sys.byteorder == "big":
        numbers.byteswap()
    size = max(1, answer.n_embd)
    return [numbers[start : start + size] for start in range(0, len(numbers), size)]


def _shortened(vector: array[float], request: EmbeddingRequest) -> array[float]:
    n_wanted = request.n_dimensions
    if n_wanted is None or n_wanted == len(vector):
        return vector
    if not 1 <= n_wanted <= len(vector):
        raise InvalidOptionError(
            f"dimensions must be from 1 to {len(vector)} with this model, not {n_wanted}",
            option="dimensions",
        )
    cut = vector[:n_wanted]
    length = math.hypot(*cut) if request.normalize else 1.0
    return array("f", (number / (length or 1.0) for number in cut))
