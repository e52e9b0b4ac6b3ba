"""Grammars let through what the schema allows and nothing else, in llama.cpp's own engine."""

from __future__ import annotations

import json
import re
from decimal import Decimal
from fractions import Fraction
from typing import Any

import fastjsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shimpy.chat.gbnf import JSON_GRAMMAR, MAX_REPEAT, Rules
from shimpy.chat.patterns import pattern_piece
from shimpy.chat.ranges import Bounds, integer_rule, number_rule
from shimpy.chat.schema import schema_grammar
from shimpy.errors import UserError
from tests.chat.real_grammar import Grammar, Vocabulary


def accepts(vocabulary: Vocabulary, grammar: str, text: str) -> bool:
    with Grammar(vocabulary, grammar) as made:
        assert made.ok, grammar
        return made.accepts(text)


PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name"],
}
LIST = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"type": "integer"},
                "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
            },
            "required": ["value", "next"],
        }
    },
    "$ref": "#/$defs/node",
}
# Schema, documents that it allows, documents that it does not.
CASES: dict[str, tuple[Any, list[str], list[str]]] = {
    "anything": ({}, ["1", '"a"', "[]", '{"a": [null, true]}'], ["", "a", "[1", "01"]),
    "true": (True, ["null"], ["nul"]),
    "string": (
        {"type": "string"},
        ['""', '"é\\n\\u00e9日"'],
        ['"\n"', "'a'", '"\\x"', '"\\ud800"'],
    ),
    "integer": ({"type": "integer"}, ["0", "-17"], ["1.5", "01", "-", "+1", "1e3"]),
    "number": ({"type": "number"}, ["0", "-1.5e-3", "2E+10"], [".5", "1.", "1e999", "NaN"]),
    "boolean": ({"type": "boolean"}, ["true", "false"], ["True", "1"]),
    "null": ({"type": "null"}, ["null"], ["None", ""]),
    "types": ({"type": ["integer", "null"]}, ["1", "null"], ["true", '"1"']),
    "nullable": ({"type": "string", "nullable": True}, ['"a"', "null"], ["1"]),
    "object": (
        PERSON,
        ['{"name": "Ann", "age": 3}', '{"name":"Ann"}', '{ "name":\n"Ann" }'],
        ["{}", '{"age": 3}', '{"name": 1}', '{"name": "a", "x": 1}', '{"name": "a",}'],
    ),
    "optional properties": (
        {"type": "object", "properties": {k: {"type": "null"} for k in "abc"}},
        ["{}", '{"a":null}', '{"b":null}', '{"a":null,"c":null}', '{"a":null,"b":null,"c":null}'],
        ['{,"a":null}', '{"a":null,}', '{"c":null,"a":null}', '{"a":null "b":null}'],
    ),
    "required last": (
        {"type": "object", "properties": {"a": {}, "b": {}}, "required": ["b"]},
        ['{"b":1}', '{"a":1,"b":1}'],
        ["{}", '{"a":1}'],
    ),
    "required without a schema": ({"type": "object", "required": ["x"]}, ['{"x": [1]}'], ["{}"]),
    "odd names": (
        {"properties": {'a"b\\c\n': {"type": "null"}, "": {"type": "null"}}, "required": [""]},
        [json.dumps({'a"b\\c\n': None, "": None}), '{"":null}'],
        ["{}"],
    ),
    "map": (
        {"type": "object", "additionalProperties": {"type": "integer"}},
        ["{}", '{"a": 1, "b": 2}'],
        ['{"a": "x"}'],
    ),
    "map of counted size": (
        {
            "type": "object",
            "additionalProperties": {"type": "null"},
            "minProperties": 1,
            "maxProperties": 2,
        },
        ['{"a":null}', '{"a":null,"b":null}'],
        ["{}", '{"a":null,"b":null,"c":null}'],
    ),
    "map with named keys": (
        {"additionalProperties": {"type": "null"}, "propertyNames": {"enum": ["a", "b"]}},
        ['{"a":null}', "{}"],
        ['{"c":null}'],
    ),
    "no properties": ({"type": "object", "properties": {}}, ["{}", "{ }"], ['{"a": 1}']),
    "other properties": (
        {
            "type": "object",
            "properties": {"a": {"type": "null"}, "abc": {"type": "null"}},
            "required": ["a"],
            "additionalProperties": {"type": "integer"},
        },
        [
            '{"a":null}',
            '{"a":null,"b":1}',
            '{"a":null,"ab":1,"abcd":2,"":3}',
            '{"a":null,"abc":null}',
        ],
        ['{"a":null,"abc":1}', '{"b":1}', '{"a":null,"a":1}', '{"a":null,"b":"x"}'],
    ),
    "only other properties": (
        {"properties": {"a": {"type": "null"}}, "additionalProperties": True},
        ["{}", '{"b":1}', '{"b":1,"c":2}', '{"a":null,"b":[]}'],
        ['{"a":1}', '{"b":1,}'],
    ),
    "array": ({"type": "array", "items": {"type": "integer"}}, ["[]", "[1]", "[1, 2,3]"], ["[1,]"]),
    "array of counted size": (
        {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 3},
        ["[1,2]", "[1,2,3]"],
        ["[]", "[1]", "[1,2,3,4]"],
    ),
    "one item at most": ({"items": {"type": "integer"}, "maxItems": 1}, ["[]", "[1]"], ["[1,2]"]),
    "empty array": ({"type": "array", "maxItems": 0}, ["[]"], ["[1]"]),
    "tuple": (
        {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}], "items": False},
        ['[1,"a"]'],
        ["[1]", '["a",1]', '[1,"a",2]'],
    ),
    "tuple with a rest": (
        {"prefixItems": [{"type": "null"}], "items": {"type": "integer"}, "minItems": 2},
        ["[null,1]", "[null,1,2]"],
        ["[null]", "[1]"],
    ),
    "old tuple": (
        {"type": "array", "items": [{"type": "integer"}], "additionalItems": False},
        ["[1]"],
        ["[1,2]", '["a"]'],
    ),
    "enum": (
        {"enum": ["a", 'b"\\', 1, None, [1]]},
        ['"a"', '"b\\"\\\\"', "1", "null", "[1]"],
        ['"c"', "2"],
    ),
    "enum of a type": ({"type": "string", "enum": ["a", 1]}, ['"a"'], ["1"]),
    "const": ({"const": {"a": [1, "é"]}}, ['{"a": [1, "é"]}'], ["{}", "1"]),
    "any of": ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, ["1", "null"], ["true"]),
    "any of beside a type": (
        {
            "type": "object",
            "properties": {"a": {}, "b": {}},
            "anyOf": [{"required": ["a"]}, {"required": ["b"]}],
        },
        ['{"a":1}', '{"b":1}', '{"a":1,"b":2}'],
        ["{}"],
    ),
    "any of, one impossible": (
        {"type": "string", "anyOf": [{"type": "integer"}, {"maxLength": 1}]},
        ['"a"'],
        ["1", '"ab"'],
    ),
    "one of": ({"oneOf": [{"const": 1}, {"const": 2}]}, ["1", "2"], ["3"]),
    "all of": (
        {
            "allOf": [
                {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
                {"properties": {"b": {"type": "null"}, "a": {"maximum": 5}}, "required": ["b"]},
            ]
        },
        ['{"a":5,"b":null}'],
        ['{"a":6,"b":null}', '{"a":1}', '{"b":null}'],
    ),
    "all of both kinds of number": (
        {"allOf": [{"type": "number"}, {"type": ["integer", "string"]}]},
        ["1"],
        ["1.5", '"a"'],
    ),
    "all of two choices": (
        {"allOf": [{"enum": ["a", "b"]}, {"enum": ["b", "c"]}]},
        ['"b"'],
        ['"a"', '"c"'],
    ),
    "all of, one closed": (
        {
            "allOf": [
                {"properties": {"a": {"type": "null"}}, "additionalProperties": False},
                {"properties": {"b": {"type": "null"}}},
            ]
        },
        ["{}", '{"a":null}'],
        ['{"b":null}'],
    ),
    "reference": (
        {"$defs": {"s": {"type": "string"}}, "type": "array", "items": {"$ref": "#/$defs/s"}},
        ['["a"]'],
        ["[1]"],
    ),
    "reference with something beside it": (
        {"$defs": {"s": {"type": "string"}}, "$ref": "#/$defs/s", "maxLength": 1, "title": "x"},
        ['"a"'],
        ['"ab"', "1"],
    ),
    "odd reference": (
        {"definitions": {"a/b c~": {"const": 1}}, "$ref": "#/definitions/a~1b%20c~0"},
        ["1"],
        ["2"],
    ),
    "recursion": (
        LIST,
        ['{"value":1,"next":null}', '{"value":1,"next":{"value":2,"next":null}}'],
        ['{"value":1}', '{"value":1,"next":{}}'],
    ),
    "recursion to the root": (
        {"type": "object", "properties": {"a": {"$ref": "#"}}},
        ["{}", '{"a":{"a":{}}}'],
        ['{"a":1}'],
    ),
    "length": (
        {"type": "string", "minLength": 1, "maxLength": 3},
        ['"a"', '"日\\n🙂"'],
        ['""', '"abcd"'],
    ),
    "minimal length": ({"minLength": 2}, ['"ab"', '"abc"'], ['"a"']),
    "great length": (
        {"type": "string", "minLength": 2000, "maxLength": 2500},
        [f'"{"a" * n}"' for n in (2000, 2001, 2099, 2100, 2499, 2500)],
        [f'"{"a" * n}"' for n in (1999, 2501, 2600)],
    ),
    "great odd length": (
        {"type": "string", "maxLength": 2345},
        [f'"{"a" * n}"' for n in (0, 1, 99, 100, 2299, 2300, 2344, 2345)],
        [f'"{"a" * n}"' for n in (2346, 2399, 2400)],
    ),
    "pattern": ({"type": "string", "pattern": "^[a-c]{2}-\\d+$"}, ['"ab-12"'], ['"ad-1"', '"ab-"']),
    "open pattern": ({"pattern": "b"}, ['"b"', '"abc"'], ['"ac"', '""']),
    "pattern and length": ({"pattern": "^a{2,3}$", "maxLength": 3}, ['"aa"'], ['"aaaa"']),
    "date": (
        {"type": "string", "format": "date"},
        ['"2024-02-28"', '"1999-12-31"'],
        ['"2024-13-01"', '"2024-02-30"', '"2024-04-31"', '"24-01-01"'],
    ),
    "time": (
        {"format": "time"},
        ['"23:59:59Z"', '"00:00:00.5+01:00"'],
        ['"24:00:00Z"', '"1:00:00Z"'],
    ),
    "date-time": (
        {"type": "string", "format": "date-time"},
        ['"2024-02-28T12:00:00Z"'],
        ['"2024-02-28"', '"2024-02-28 12:00:00Z"'],
    ),
    "uuid": (
        {"type": "string", "format": "uuid"},
        ['"dbfe8f2c-1a4e-4d0e-9c5b-d8c0a6d9e0ff"'],
        ['"dbfe8f2c"', '"gbfe8f2c-1a4e-4d0e-9c5b-d8c0a6d9e0ff"'],
    ),
    "unknown format": ({"type": "string", "format": "email"}, ['"a@b"'], ["1"]),
    "integer bounds": (
        {"type": "integer", "minimum": -17, "exclusiveMaximum": 1234},
        ["-17", "-1", "0", "9", "1233"],
        ["-18", "1234", "1.5", "-0", "00"],
    ),
    "old exclusive bound": (
        {"type": "integer", "minimum": 3, "exclusiveMinimum": True, "maximum": 5},
        ["4", "5"],
        ["3", "6"],
    ),
    "number bounds": (
        {"type": "number", "minimum": -1.5, "exclusiveMaximum": 2.25},
        ["-1.5", "-1.499", "-0.5", "0", "1.99", "2", "2.2", "2.249"],
        ["-1.51", "-2", "2.25", "2.26", "3", "1e1"],
    ),
    "positive": (
        {"type": "number", "exclusiveMinimum": 0},
        ["0.001", "1", "99.5"],
        ["0", "0.0", "-1"],
    ),
    "null for nothing": (
        {"properties": None, "required": None, "const": None, "$ref": None},
        ["null"],
        ["{}"],
    ),
    "null for no properties": ({"type": "object", "properties": None}, ["{}", '{"a":1}'], ["null"]),
    "annotations": (
        {"title": "x", "description": "y", "default": 1, "$schema": "z", "unknown-word": 1},
        ["[]"],
        ["x"],
    ),
    "a set": ({"type": "array", "items": {"enum": [1]}, "uniqueItems": True}, ["[1]"], ["[2]"]),
    "whole multiple": ({"type": "integer", "multipleOf": 1}, ["3"], ["3.5"]),
}


@pytest.mark.parametrize("name", CASES)
def test_a_grammar_allows_what_its_schema_allows(vocabulary: Vocabulary, name: str) -> None:
    schema, allowed, _ = CASES[name]
    grammar = schema_grammar(schema)
    for text in allowed:
        assert accepts(vocabulary, grammar, text), (text, grammar)


@pytest.mark.parametrize("name", CASES)
def test_a_grammar_refuses_what_its_schema_refuses(vocabulary: Vocabulary, name: str) -> None:
    schema, _, refused = CASES[name]
    grammar = schema_grammar(schema)
    for text in refused:
        assert not accepts(vocabulary, grammar, text), (text, grammar)


@pytest.mark.parametrize(
    "name", ["object", "other properties", "recursion", "array of counted size"]
)
@pytest.mark.parametrize("seed", range(5))
def test_what_a_random_model_writes_is_valid(vocabulary: Vocabulary, name: str, seed: int) -> None:
    schema = CASES[name][0]
    with Grammar(vocabulary, schema_grammar(schema)) as grammar:
        text = grammar.random_text(seed)
    assert text is not None
    fastjsonschema.compile(schema)(json.loads(text))


@pytest.mark.parametrize("seed", range(5))
def test_what_a_random_model_writes_as_json_is_json(vocabulary: Vocabulary, seed: int) -> None:
    with Grammar(vocabulary, JSON_GRAMMAR) as grammar:
        text = grammar.random_text(seed)
    assert text is not None
    assert isinstance(json.loads(text), dict)


def _schemas() -> st.SearchStrategy[Any]:
    """Schemas of any shape that draft 7 knows, so that a validator can judge the outcome."""
    small = st.integers(-30, 30)
    leaf = st.one_of(
        st.sampled_from([{"type": kind} for kind in ("null", "boolean", "integer")]),
        st.lists(st.one_of(small, st.text(max_size=3), st.none()), min_size=1, max_size=3).map(
            lambda values: {"enum": values}
        ),
        st.tuples(small, small).map(
            lambda ends: {"type": "integer", "minimum": min(ends), "maximum": max(ends)}
        ),
        st.integers(0, 4).map(lambda n: {"type": "string", "minLength": n, "maxLength": n + 2}),
    )

    def wider(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        names = st.sampled_from(["a", "b", "ab", 'q"', "é"])
        objects = st.tuples(
            st.dictionaries(names, inner, min_size=1, max_size=3), st.sets(names, max_size=2), inner
        )
        return st.one_of(
            objects.map(
                lambda parts: {
                    "type": "object",
                    "properties": parts[0],
                    "required": sorted(parts[1] & parts[0].keys()),
                    "additionalProperties": parts[2],
                }
            ),
            objects.map(lambda parts: {"type": "object", "properties": parts[0]}),
            st.tuples(inner, st.integers(0, 2)).map(
                lambda p: {"type": "array", "items": p[0], "minItems": p[1], "maxItems": p[1] + 1}
            ),
            st.lists(inner, min_size=1, max_size=3).map(lambda options: {"anyOf": options}),
        )

    return st.recursive(leaf, wider, max_leaves=6)


@given(schema=_schemas(), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_whatever_a_grammar_lets_through_is_valid(
    vocabulary: Vocabulary, schema: Any, seed: int
) -> None:
    with Grammar(vocabulary, schema_grammar(schema)) as grammar:
        assert grammar.ok
        text = grammar.random_text(seed, max_tokens=150)
    if text is not None:
        fastjsonschema.compile(schema)(json.loads(text))


@pytest.mark.parametrize(
    ("schema", "pointer", "words"),
    [
        ({"type": "foo"}, "#/type", "'foo'"),
        ({"type": []}, "#/type", "a name"),
        ({"properties": {"a": {"not": {}}}}, "#/properties/a/not", "not supported"),
        ({"items": {"patternProperties": {}}}, "#/items/patternProperties", "not supported"),
        ({"if": {}, "then": {}}, "#/if", "not supported"),
        ({"type": "number", "multipleOf": 0.1}, "#/multipleOf", "not supported"),
        (
            {"properties": {"a/b~": {"pattern": "(?=x)"}}},
            "#/properties/a~1b~0/pattern",
            "look-around",
        ),
        ({"pattern": 5}, "#/pattern", "string"),
        ({"pattern": "a$", "maxLength": 3}, "#/pattern", "say the length"),
        ({"$ref": "#/$defs/x"}, "#/$ref", "there is no"),
        ({"$ref": "http://x/y"}, "#/$ref", "within the schema"),
        ({"$ref": "#"}, "#", "without end"),
        ({"anyOf": [{"type": "null"}, {"$ref": "#"}]}, "#/anyOf/1/$ref", "without end"),
        ({"allOf": [{"$ref": "#"}]}, "#", "without end"),
        ({"allOf": [{"type": "string"}, {"type": "null"}]}, "#/allOf/1", "nothing is of type"),
        ({"allOf": [{"const": 1}, {"enum": [2]}]}, "#/allOf/1", "no value"),
        ({"allOf": [{"pattern": "a"}, {"pattern": "b"}]}, "#/allOf/1", "pattern"),
        ({"properties": {"a": False}}, "#/properties/a", "no document"),
        ({"properties": {"a": 5}}, "#/properties/a", "an object, not 5"),
        ({"properties": 5}, "#/properties", "object of schemas"),
        ({"type": "object", "required": "a"}, "#/required", "a list"),
        ({"type": "object", "required": [1]}, "#/required", "names"),
        ({"required": ["a"], "additionalProperties": False}, "#/required", "'a'"),
        ({"properties": {"a": {}}, "minProperties": 1}, "#/minProperties", "required"),
        ({"properties": {"a": {}, "b": {}}, "maxProperties": 1}, "#/maxProperties", "named"),
        ({"properties": {"a": {}}, "propertyNames": {}}, "#/propertyNames", "not supported"),
        ({"type": "integer", "minimum": 5, "maximum": 4}, "#", "no integer"),
        ({"type": "number", "minimum": 5, "maximum": 4}, "#", "no number"),
        ({"type": "integer", "minimum": "5"}, "#/minimum", "a number"),
        ({"type": "integer", "minimum": 10**30}, "#", "digits"),
        ({"type": "string", "maxLength": -1}, "#/maxLength", "whole number"),
        ({"type": "string", "minLength": 3, "maxLength": 2}, "#/maxLength", "below minLength"),
        ({"type": "string", "maxLength": MAX_REPEAT + 1}, "#", str(MAX_REPEAT)),
        ({"type": "array", "minItems": 1.5}, "#/minItems", "whole number"),
        ({"prefixItems": [{}], "items": False, "minItems": 2}, "#/minItems", "only 1"),
        ({"enum": []}, "#/enum", "none of its values"),
        ({"enum": 5}, "#/enum", "a list"),
        ({"type": "null", "enum": [1]}, "#/enum", "none of its values"),
        ({"enum": list(range(6000))}, "#/enum", "6000"),
        ({"anyOf": []}, "#/anyOf", ""),
        ("x", "#", "an object"),
        (None, "#", "an object"),
        (False, "#", "no document"),
    ],
)
def test_what_can_not_be_compiled_is_named(schema: Any, pointer: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        schema_grammar(schema)
    assert re.search(re.escape(pointer) + "(:|/)", caught.value.message), caught.value.message
    assert words in caught.value.message


def test_schemas_are_bounded() -> None:
    deep: Any = {"type": "null"}
    for _ in range(100):
        deep = {"type": "array", "items": deep}
    with pytest.raises(UserError, match="64 levels"):
        schema_grammar(deep)
    deep = {"type": "null"}
    for _ in range(5000):
        deep = {"allOf": [deep]}
    with pytest.raises(UserError, match="64 levels"):
        schema_grammar(deep)
    wide = {"properties": {f"p{i}": {"anyOf": [{"type": "null"}] * 300} for i in range(300)}}
    with pytest.raises(UserError, match="more than"):
        schema_grammar(wide)
    doubling: Any = {"$defs": {"d0": {"type": "null"}}, "$ref": "#/$defs/d20"}
    for i in range(20):
        both = [{"$ref": f"#/$defs/d{i}"}, {"$ref": f"#/$defs/d{i}"}]
        doubling["$defs"][f"d{i + 1}"] = {"type": "array", "prefixItems": both}
    assert len(schema_grammar(doubling)) < 20_000
    exploding: Any = {"allOf": [{"anyOf": [{"minLength": i} for i in range(10)]}] * 8}
    assert schema_grammar(exploding)
    different = {"allOf": [{"anyOf": [{"minLength": i * j} for i in range(10)]} for j in range(8)]}
    with pytest.raises(UserError):
        schema_grammar(different)
    with pytest.raises(UserError, match="characters"):
        schema_grammar({"enum": ["x" * 500 + str(i) for i in range(4000)]})


@given(
    low=st.one_of(st.none(), st.integers(-2000, 2000)),
    high=st.one_of(st.none(), st.integers(-2000, 2000)),
    opened=st.tuples(st.booleans(), st.booleans()),
    values=st.lists(st.integers(-2100, 2100), min_size=5, max_size=20),
)
@settings(deadline=None, max_examples=60)
def test_integers_are_within_their_bounds(
    vocabulary: Vocabulary,
    low: int | None,
    high: int | None,
    opened: tuple[bool, bool],
    values: list[int],
) -> None:
    bounds = Bounds(
        low=None if low is None else Fraction(low),
        high=None if high is None else Fraction(high),
        low_open=opened[0],
        high_open=opened[1],
    )

    def inside(value: int) -> bool:
        above = low is None or value > low or (value == low and not opened[0])
        return above and (high is None or value < high or (value == high and not opened[1]))

    rules = Rules()
    try:
        rules.set_root(integer_rule(rules, bounds))
    except ValueError:
        assert not any(inside(value) for value in range(-2100, 2101))
        return
    ends = [end + d for end in (low, high) if end is not None for d in (-1, 0, 1)]
    for value in [*values, *ends]:
        assert accepts(vocabulary, rules.text(), str(value)) == inside(value)


decimals = st.decimals(-40, 40, places=2)


@given(
    low=st.one_of(st.none(), decimals),
    high=st.one_of(st.none(), decimals),
    opened=st.tuples(st.booleans(), st.booleans()),
    values=st.lists(st.decimals(-42, 42, places=3), min_size=5, max_size=15),
)
@settings(deadline=None, max_examples=60)
def test_numbers_are_within_their_bounds(
    vocabulary: Vocabulary,
    low: Decimal | None,
    high: Decimal | None,
    opened: tuple[bool, bool],
    values: list[Decimal],
) -> None:
    def inside(value: Decimal) -> bool:
        above = low is None or value > low or (value == low and not opened[0])
        return above and (high is None or value < high or (value == high and not opened[1]))

    rules = Rules()
    bounds = Bounds(
        low=None if low is None else Fraction(low),
        high=None if high is None else Fraction(high),
        low_open=opened[0],
        high_open=opened[1],
    )
    try:
        rules.set_root(number_rule(rules, bounds))
    except ValueError:
        assert not any(inside(Decimal(n) / 1000) for n in range(-42_000, 42_001, 5))
        return
    ends = [end + d for end in (low, high) if end is not None for d in (Decimal("-0.001"), 0, 1)]
    for value in [*values, *ends]:
        # As few digits as the number has: more zeros at a closed end are let go.
        text = f"{value:f}".rstrip("0").rstrip(".") if "." in f"{value:f}" else f"{value:f}"
        text = "0" if text in ("-0", "") else text
        assert accepts(vocabulary, rules.text(), text) == inside(value), (text, rules.text())


@pytest.mark.parametrize(
    ("pattern", "good", "bad"),
    [
        ("^abc$", ["abc"], ["ab", "abcd", "xabc"]),
        ("^(a|bc)*$", ["", "abca"], ["b"]),
        ("^a?b+$", ["b", "abb"], ["a", "aab"]),
        ("^[^a-c]$", ["d", "é", "-"], ["a", "b", ""]),
        ("^\\d{2}\\.\\w\\s$", ["12.a "], ["1.a ", "12xa "]),
        ("^\\D\\W$", ["a-"], ["1-", "ab"]),
        ("^.$", ["x", "日"], ["\n", ""]),
        ("^(?:x){2}(?<n>y)$", ["xxy"], ["xy"]),
        ("^[\\w.-]+@[a-z]+$", ["a.b-c@d"], ["@d"]),
        ("^\\u0041\\x42$", ["AB"], ["ab"]),
        ('^"\\\\\\n$', ['"\\\n'], ['"\n']),
        ('^["\\\\]$', ['"', "\\"], ["a"]),
        ("^[]a]$", ["]", "a"], ["b"]),
        ("^a{3,}$", ["aaa", "aaaaa"], ["aa"]),
        ("^a{0}b$", ["b"], ["ab"]),
        ("b$", ["b", "ab"], ["ba"]),
        ("^a", ["a", "ab"], ["ba"]),
        ("^a|b$", ["ax", "xb"], ["xa"]),
        ("", ["", "x"], []),
        ("^-{1,2}[+*]$", ["-+", "--*"], ["---+"]),
    ],
)
def test_patterns_mean_what_they_mean_elsewhere(
    vocabulary: Vocabulary, pattern: str, good: list[str], bad: list[str]
) -> None:
    rules = Rules()
    rules.set_root(f'"\\"" {pattern_piece(rules, pattern).text} "\\""')
    for text in good:
        assert re.search(pattern.replace("?<", "?P<"), text), "the case itself is wrong"
        assert accepts(vocabulary, rules.text(), json.dumps(text, ensure_ascii=False)), rules.text()
    for text in bad:
        assert not accepts(vocabulary, rules.text(), json.dumps(text, ensure_ascii=False))


@pytest.mark.parametrize(
    "pattern",
    [
        "(", ")", "a)", "[a", "[b-a]", "a**?", "a*?", "a++", "(?i)a", "(?!a)", "\\1", "\\b",
        "\\p{L}", "a^b", "a$b", "*", "a{3,2}", "a{200000}", "(" * 40 + ")" * 40, "a" * 3000,
        "[\\x00-\\x01]", "\\u12",
    ],
)  # fmt: skip
def test_patterns_that_are_not_understood_are_refused(pattern: str) -> None:
    with pytest.raises(UserError, match="#/pattern"):
        schema_grammar({"pattern": pattern})
