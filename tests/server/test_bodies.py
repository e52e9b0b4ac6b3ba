from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shimpy.errors import UserError
from shimpy.server.bodies import parse_body
from shimpy.server.ollama.wire import ChatBody, GenerateBody

# The machine may be busy with other tests.
busy = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def test_unknown_fields_and_nulls_are_fine() -> None:
    body = parse_body(b'{"model":"m","stream":null,"stop":[],"_private":{"x":[1]}}', GenerateBody)
    assert body.model == "m"
    assert body.stream is None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "missing request body"),
        (b"  \n", "missing request body"),
        (b"[]", "the request's body must be an object, not a list"),
        (b'{"model":1}', '"model" must be a string, not a whole number'),
        (b'{"stream":"yes"}', '"stream" must be true or false, not a string'),
        (b'{"context":[1,"a"]}', '"context[1]" must be a whole number, not a string'),
        (b'{"options":[]}', '"options" must be an object, not a list'),
        (b'{"messages":[{"content":"x"}]}', '"messages[0].role" is required'),
        (b'{"messages":[{"role":"u","content":[]}]}', '"messages[0].content" must be a string'),
    ],
)
def test_a_wrong_type_names_the_field(data: bytes, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_body(data, GenerateBody)
    assert message in caught.value.message


@pytest.mark.parametrize(
    "data",
    [
        b"{",
        b"{]",
        b'{"model":"m"} trailing',
        b'{"model":NaN}',
        b'{"model":"\xff"}',
        b"model=m&prompt=x",
        b'{"options":' + b"[" * 100_000,
        b'{"options":{"a":' + b"[" * 3_000 + b"]" * 3_000 + b"}}",
        b'{"prompt":"\\ud800","options":{"a":' + b"[" * 3_000 + b"]" * 3_000 + b"}}",
        b'{"top_k":' + b"9" * 6000 + b"}",
        b'{"prompt":"\\ud800","top_k":' + b"9" * 6000 + b"}",
    ],
)
def test_what_is_no_json_is_a_user_error(data: bytes) -> None:
    with pytest.raises(UserError):
        parse_body(data, GenerateBody)


def test_half_an_emoji_becomes_the_replacement_character() -> None:
    """JavaScript cuts strings between surrogates and JSON.stringify sends such halves."""
    body = parse_body(b'{"prompt":"a\\ud83d","options":{"stop":["\\udc00"]}}', GenerateBody)
    assert body.prompt == "a\ufffd"
    assert body.options == {"stop": ["\ufffd"]}


def test_a_byte_order_mark_is_skipped() -> None:
    assert parse_body(b'\xef\xbb\xbf{"model":"m"}', ChatBody).model == "m"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
names = st.sampled_from([*GenerateBody.__struct_fields__, "role"])


@busy
@given(st.dictionaries(names, json_values) | json_values)
def test_any_json_gives_a_body_or_a_user_error(value: object) -> None:
    with contextlib.suppress(UserError):
        parse_body(json.dumps(value).encode(), GenerateBody)


@busy
@given(st.binary())
def test_any_bytes_give_a_body_or_a_user_error(data: bytes) -> None:
    with contextlib.suppress(UserError):
        parse_body(data, ChatBody)
