"""Request bodies: JSON whatever the Content-Type says, into typed structs, with clear errors.

Unknown fields are ignored and null is the same as leaving a field out: both are what real
clients send. Everything else that does not fit is a 400 that names the field.
"""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any, TypeVar

import msgspec
from aiohttp import web

from shimpy.errors import InvalidOptionError, UserError
from shimpy.server.errors import BodyTimeoutError, BodyTooLargeError
from shimpy.server.services import services_of
from shimpy.units import format_bytes

# A client that sends nothing for this long holds its connection for nothing.
READ_TIMEOUT_S = 60.0

T = TypeVar("T")

_EXPECTED = re.compile(r"Expected `(?P<wanted>[^`]*)`(?:, got `(?P<got>[^`]*)`)?")
_MISSING = re.compile(r"Object missing required field `(?P<field>[^`]*)`")
_PATH = re.compile(r" - at `\$\.?(?P<path>[^`]*)`$")
_WORDS = {
    "str": "a string",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "array": "a list",
    "object": "an object",
    "null": "null",
    "bytes": "a base64 string",
}
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


async def read_body(request: web.Request, wanted: type[T], *, may_be_empty: bool = False) -> T:
    """Return the request's JSON body as a `wanted` struct.

    No body at all is an empty object where it `may_be_empty`.

    Raises:
        UserError: no body, no JSON, or a field of a wrong type (the message names it).
        BodyTooLargeError: over the limit of `max_body`.
        BodyTimeoutError: it has stopped coming.
    """
    body = await _read(request)
    return parse_body(body or b"{}" if may_be_empty else body, wanted)


async def _read(request: web.Request) -> bytearray:
    """Return the body, decompressed; a declared length that is too large is not read at all."""
    limit = services_of(request).config.max_body
    declared = request.content_length or 0
    body = bytearray()
    while max(declared, len(body)) <= limit:
        chunk = await read_chunk(request)
        if not chunk:
            return body
        body += chunk
    raise BodyTooLargeError(
        f"the request's body is larger than {format_bytes(limit)}; raise max_body to allow more"
    )


async def read_chunk(request: web.Request) -> bytes:
    """Return what has come of a body, at least one byte; b"" at its end.

    Raises:
        BodyTimeoutError: nothing came for READ_TIMEOUT_S.
    """
    try:
        if request.content.is_eof():
            # All of it is here: there is nothing to wait for.
            return request.content.read_nowait()
        async with asyncio.timeout(READ_TIMEOUT_S):
            return await request.content.readany()
    except TimeoutError:
        raise BodyTimeoutError(
            f"nothing came of the request's body for {READ_TIMEOUT_S:.0f} s"
        ) from None
    except web.RequestPayloadError as error:
        raise UserError(f"the request's body is broken: {error}") from None


def parse_body(data: bytes | bytearray, wanted: type[T]) -> T:
    """Return JSON bytes as a `wanted` struct; errors as `read_body`."""
    if not data.strip():
        raise UserError("missing request body")
    try:
        return msgspec.json.decode(data, type=wanted)
    except msgspec.ValidationError as error:
        raise _field_error(str(error)) from None
    except RecursionError:
        raise UserError("the request's body is nested too deeply") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        reason = str(error).removeprefix("JSON is malformed: ")
        return _parse_lenient(data, wanted, reason)


def _parse_lenient(data: bytes | bytearray, wanted: type[T], reason: str) -> T:
    """Read what JavaScript and Go take but msgspec does not: a lone surrogate, a BOM."""
    try:
        value = json.loads(data.decode("utf-8-sig"), parse_constant=_refuse_constant)
        return msgspec.convert(_without_surrogates(value), wanted)
    except msgspec.ValidationError as error:
        raise _field_error(str(error)) from None
    except RecursionError:
        raise UserError("the request's body is nested too deeply") from None
    except ValueError:
        raise UserError(f"the request's body is not valid JSON: {reason}") from None


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _without_surrogates(value: Any) -> Any:
    match value:
        case str():
            return _LONE_SURROGATE.sub("\ufffd", value)
        case list():
            return [_without_surrogates(item) for item in value]
        case dict():
            return {
                _without_surrogates(key): _without_surrogates(item) for key, item in value.items()
            }
        case _:
            return value


def _field_error(message: str) -> InvalidOptionError:
    """Return msgspec's complaint in words of the wire: field first, JSON's own type names."""
    found = _PATH.search(message)
    path = found["path"] if found else ""
    missing = _MISSING.match(message)
    if missing is not None:
        field = f"{path}.{missing['field']}" if path else missing["field"]
        return InvalidOptionError(f'"{field}" is required', option=field)
    where = f'"{path}"' if path else "the request's body"
    expected = _EXPECTED.match(message)
    if expected is not None and expected["wanted"]:
        wanted = " or ".join(
            _WORDS.get(word, word) for word in expected["wanted"].split(" | ") if word != "null"
        )
        got = f", not {_WORDS.get(expected['got'], expected['got'])}" if expected["got"] else ""
        return InvalidOptionError(f"{where} must be {wanted}{got}", option=path)
    detail = _PATH.sub("", message)
    return InvalidOptionError(f"{where}: {detail[:1].lower()}{detail[1:]}", option=path)
