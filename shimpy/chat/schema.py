"""JSON schemas as grammars: whatever the grammar lets through is valid against the schema.

The reverse need not hold: properties come in the schema's order, other properties than those
named only where `additionalProperties` allows them by word, and numbers have at most 16 digits.
What can't be made sure of is refused by its JSON pointer; only `uniqueItems` and formats other
than dates, times and UUIDs are let pass, as clients' libraries put them everywhere.

Source: https://json-schema.org/draft/2020-12/json-schema-validation
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import unquote

from shimpy.chat.gbnf import Rules, literal
from shimpy.chat.members import key_except, members
from shimpy.chat.merging import Conflict, merge_schemas
from shimpy.chat.places import Place, Schema, counts, list_of
from shimpy.chat.scalars import number_or_integer_rule, repeat, string_rule
from shimpy.errors import UserError

MAX_DEPTH = 64
MAX_NODES = 20_000
MAX_ENUM = 5_000
_UNSUPPORTED = (
    "not",
    "if",
    "patternProperties",
    "contains",
    "dependentRequired",
    "dependentSchemas",
    "dependencies",
    "multipleOf",
    "$dynamicRef",
    "$recursiveRef",
)
# What says of which type a document is, where `type` doesn't.
_TELLING = {
    "object": ("properties", "required", "additionalProperties", "propertyNames", "minProperties"),
    "array": ("items", "prefixItems", "minItems", "maxItems"),
    "string": ("minLength", "maxLength", "pattern", "format"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
}
_TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
_APART = ("$ref", "allOf", "anyOf", "oneOf", "enum", "const", "type", "nullable")
_CONSTRAINING = frozenset(_APART).union(*_TELLING.values(), ("maxProperties", *_UNSUPPORTED))


def schema_grammar(schema: object) -> str:
    """Return the GBNF for the JSON documents that a schema allows.

    Raises:
        UserError: a part can't be compiled; the message names it by its JSON pointer.
    """
    rules = Rules()
    rules.set_root(add_schema(rules, schema))
    return rules.text()


def add_schema(rules: Rules, schema: object, *, root: object = None) -> str:
    """Add the rules of a schema to a grammar; return the rule for its documents.

    `root` is the schema that references point into; None: the schema itself.

    Raises:
        UserError: as schema_grammar.
    """
    return _Compiler(rules, schema if root is None else root).compile(schema, Place())


class _Compiler:
    def __init__(self, rules: Rules, root: object) -> None:
        self._rules = rules
        self._root = root
        self._of_ref: dict[str, str] = {}
        self._n_nodes = 0

    def compile(self, schema: object, place: Place) -> str:
        """Return the rule for the documents of a schema."""
        self._n_nodes += 1
        if self._n_nodes > MAX_NODES:
            raise place.error(f"there are more than {MAX_NODES} schemas by here")
        if place.depth > MAX_DEPTH:
            raise place.error(f"it is nested over {MAX_DEPTH} levels deep")
        if schema is True:
            return "value"
        if schema is False:
            raise place.error("false allows no document at all")
        if not isinstance(schema, Mapping):
            raise place.error(f"a schema is an object, not {json.dumps(schema, default=str)[:80]}")
        return self._compile_object(schema, place)

    def _compile_object(self, schema: Schema, place: Place) -> str:
        # Some clients write null for what they leave out.
        schema = {k: v for k, v in schema.items() if v is not None or k == "const"}
        for key in _UNSUPPORTED:
            if key in schema and not _is_harmless(key, schema):
                raise place.beside(key).error(f"{key} is not supported")
        constraints = {key for key in schema if key in _CONSTRAINING}
        if not constraints:
            return "value"
        if constraints == {"$ref"}:
            return self._reference(schema["$ref"], place)
        if "$ref" in schema or "allOf" in schema:
            return self.compile(self._flattened(schema, place), place)
        for key in ("anyOf", "oneOf"):
            if key in schema:
                return self._any_of(schema, key, place)
        if "const" in schema or "enum" in schema:
            return self._enum(schema, place)
        return self._by_type(schema, place)

    # --- references and combinations --------------------------------------------------------

    def _reference(self, ref: object, place: Place) -> str:
        place = place.beside("$ref")
        target = self._resolve(ref, place)
        ref = str(ref)
        if ref in place.followed:
            raise place.error(f"{ref} refers to itself without end")
        if ref not in self._of_ref:
            name = self._rules.reserve(ref.rpartition("/")[2] or "ref")
            self._of_ref[ref] = name
            at = Place(pointer=ref, depth=place.depth, followed=(*place.followed, ref))
            self._rules.fill(name, self.compile(target, at))
        return self._of_ref[ref]

    def _resolve(self, ref: object, place: Place) -> object:
        if not isinstance(ref, str) or not (ref == "#" or ref.startswith("#/")):
            raise place.error(f"{ref!r} is not a reference within the schema, like #/$defs/name")
        target: Any = self._root
        for part in unquote(ref[2:]).split("/") if len(ref) > 1 else ():
            key = part.replace("~1", "/").replace("~0", "~")
            if isinstance(target, Mapping) and key in target:
                target = target[key]
            elif isinstance(target, list) and key.isdecimal() and int(key) < len(target):
                target = target[int(key)]
            else:
                raise place.error(f"there is no {ref} in the schema")
        return target

    def _flattened(self, schema: Schema, place: Place) -> object:
        """Return a schema with its reference and its allOf merged into it."""
        if place.depth > MAX_DEPTH:
            raise place.error(f"it is nested over {MAX_DEPTH} levels deep")
        rest = {key: value for key, value in schema.items() if key not in ("$ref", "allOf")}
        parts: list[tuple[object, Place]] = []
        if "$ref" in schema:
            ref = schema["$ref"]
            target = self._resolve(ref, place.beside("$ref"))
            if ref in place.followed:
                raise place.error(f"{ref} refers to itself without end")
            at = Place(pointer=str(ref), depth=place.depth + 1, followed=(*place.followed, ref))
            parts.append((target, at))
        if "allOf" in schema:
            options = list_of(schema["allOf"], place.beside("allOf"))
            parts += [(part, place.beside("allOf", i)) for i, part in enumerate(options)]
        merged: object = rest
        for part, at in parts:
            if isinstance(part, Mapping) and ("$ref" in part or "allOf" in part):
                part = self._flattened(part, at)  # noqa: PLW2901 - the same part, made flat
            merged = self._merged(merged, part, at)
        return merged

    def _merged(self, first: object, second: object, place: Place) -> object:
        if second is True or first is True:
            return first if second is True else second
        if not isinstance(first, Mapping) or not isinstance(second, Mapping):
            raise place.error("it allows no document at all")
        try:
            return merge_schemas(first, second)
        except Conflict as conflict:
            raise place.error(str(conflict)) from conflict

    def _any_of(self, schema: Schema, key: str, place: Place) -> str:
        options = list_of(schema[key], place.beside(key))
        if not options:
            raise place.beside(key).error("it is empty, so that no document is allowed")
        rest = {name: value for name, value in schema.items() if name != key}
        alone = not any(name in _CONSTRAINING for name in rest)
        names: list[str] = []
        faults: list[UserError] = []
        for i, option in enumerate(options):
            at = place.beside(key, i)
            if not alone:
                if isinstance(option, Mapping) and ("$ref" in option or "allOf" in option):
                    option = self._flattened(option, at)  # noqa: PLW2901 - the same, made flat
                try:
                    option = self._merged(rest, option, at)  # noqa: PLW2901
                except UserError as fault:
                    # This one contradicts what is said beside it; another may not.
                    faults.append(fault)
                    continue
            names.append(self.compile(option, at))
        if not names:
            raise faults[0]
        return self._rules.add(key, " | ".join(dict.fromkeys(names)))

    # --- values and types -------------------------------------------------------------------

    def _enum(self, schema: Schema, place: Place) -> str:
        key = "const" if "const" in schema else "enum"
        values = [schema["const"]] if key == "const" else list_of(schema["enum"], place.beside(key))
        if len(values) > MAX_ENUM:
            raise place.beside(key).error(f"it has {len(values)} values; the limit is {MAX_ENUM}")
        types = self._types(schema, place) if "type" in schema else _TYPES
        texts = [
            json.dumps(value, ensure_ascii=False)
            for value in values
            if any(_is_of_type(value, kind) for kind in types)
        ]
        if not texts:
            raise place.beside(key).error("none of its values is of the type")
        return self._rules.add("enum", " | ".join(literal(text) for text in dict.fromkeys(texts)))

    def _by_type(self, schema: Schema, place: Place) -> str:
        names = [self._of_type(kind, schema, place) for kind in self._types(schema, place)]
        if len(names) == 1:
            return names[0]
        return self._rules.add("types", " | ".join(dict.fromkeys(names)))

    def _types(self, schema: Schema, place: Place) -> Sequence[str]:
        kinds = schema.get("type")
        if kinds is None:
            kinds = [kind for kind, keys in _TELLING.items() if any(k in schema for k in keys)]
        kinds = [kinds] if isinstance(kinds, str) else kinds
        if not isinstance(kinds, list) or not kinds:
            raise place.beside("type").error("a type is a name or a list of names")
        for kind in kinds:
            if kind not in _TYPES:
                raise place.beside("type").error(f"{kind!r} is none of {', '.join(_TYPES)}")
        if "number" in kinds:
            kinds = [kind for kind in kinds if kind != "integer"]
        return [*kinds, "null"] if schema.get("nullable") is True else kinds

    def _of_type(self, kind: str, schema: Schema, place: Place) -> str:
        match kind:
            case "object":
                return self._object(schema, place)
            case "array":
                return self._array(schema, place)
            case "string":
                return string_rule(self._rules, schema, place)
            case "integer" | "number":
                return number_or_integer_rule(self._rules, kind, schema, place)
            case _:
                return kind

    # --- arrays -----------------------------------------------------------------------------

    def _array(self, schema: Schema, place: Place) -> str:
        low, high = counts(schema, "minItems", "maxItems", place)
        items, prefix, prefix_key = (
            schema.get("items", True),
            schema.get("prefixItems"),
            "prefixItems",
        )
        if isinstance(items, list):
            # Drafts before 2020-12.
            items, prefix, prefix_key = schema.get("additionalItems", True), items, "items"
        if not prefix:
            if low == 0 and (high == 0 or items is False):
                return self._rules.add("empty", '"[" ws "]"')
            item = self.compile(items, place.inside("items"))
            return self._rules.add("list", f'"[" ws {self._listed(item, low, high, place)} "]"')
        parts = [
            self.compile(part, place.inside(prefix_key, i))
            for i, part in enumerate(list_of(prefix, place.beside(prefix_key))[:high])
        ]
        body = ' "," ws '.join(parts)
        wants_more = low > len(parts) or (items not in (True, False) and high != len(parts))
        if wants_more:
            if items is False:
                raise place.beside("minItems").error(f"only {len(parts)} items are allowed")
            item = self.compile(items, place.inside("items"))
            rest = None if high is None else high - len(parts)
            n_more = max(0, low - len(parts))
            body += " " + repeat(self._rules, f'("," ws {item})', n_more, rest, place)
        return self._rules.add("tuple", f'"[" ws {body} ws "]"')

    def _listed(self, item: str, low: int, high: int | None, place: Place) -> str:
        rest = None if high is None else high - 1
        more = repeat(self._rules, f'("," ws {item})', max(0, low - 1), rest, place)
        body = f"{item} {more} ws"
        return body if low else f"({body})?"

    # --- objects ----------------------------------------------------------------------------

    def _object(self, schema: Schema, place: Place) -> str:
        properties = schema.get("properties", {})
        if not isinstance(properties, Mapping):
            raise place.beside("properties").error("it is an object of schemas")
        required = list_of(schema.get("required", []), place.beside("required"))
        if not all(isinstance(name, str) for name in required):
            raise place.beside("required").error("it is a list of names")
        extra = schema.get("additionalProperties", "properties" not in schema)
        named = {name: properties.get(name, extra or True) for name in (*properties, *required)}
        low, high = counts(schema, "minProperties", "maxProperties", place)
        if not named:
            return self._map(schema, extra, (low, high), place)
        if extra is False and (missing := [n for n in required if n not in properties]):
            raise place.beside("required").error(f"{missing[0]!r} is not among the properties")
        if "propertyNames" in schema:
            raise place.beside("propertyNames").error("it is not supported beside properties")
        if low > len(required):
            raise place.beside("minProperties").error("it asks for more than the required ones")
        if high is not None and (high < len(named) or extra is not False):
            raise place.beside("maxProperties").error("it asks for fewer than the named ones")
        names = {
            name: self._pair(literal(json.dumps(name, ensure_ascii=False)), part, place, name)
            for name, part in named.items()
        }
        other = ""
        if extra is not False:
            try:
                key = key_except(self._rules, named)
            except ValueError as error:
                raise place.error(str(error)) from error
            other = self._pair(key, extra, place, "additionalProperties")
        body = members(self._rules, names, frozenset(required), other)
        return self._rules.add("obj", f'"{{" ws {body} ws "}}"')

    def _pair(self, key: str, schema: object, place: Place, name: str) -> str:
        where = (name,) if name == "additionalProperties" else ("properties", name)
        value = self.compile(schema, place.inside(*where))
        return self._rules.add(name, f'{key} ":" ws {value}')

    def _map(
        self, schema: Schema, extra: object, counts: tuple[int, int | None], place: Place
    ) -> str:
        low, high = counts
        if extra is False or high == 0:
            return self._rules.add("empty", '"{" ws "}"')
        key = "string"
        if "propertyNames" in schema:
            at = place.beside("propertyNames")
            key = self.compile(self._merged({"type": "string"}, schema["propertyNames"], at), at)
        if extra is True and key == "string" and not low and high is None:
            return "object"
        pair = self._pair(key, extra, place, "additionalProperties")
        return self._rules.add("map", f'"{{" ws {self._listed(pair, low, high, place)} "}}"')


def _is_harmless(key: str, schema: Schema) -> bool:
    return key == "multipleOf" and schema[key] == 1 and schema.get("type") == "integer"


def _is_of_type(value: object, kind: str) -> bool:
    match kind:
        case "object":
            return isinstance(value, Mapping)
        case "array":
            return isinstance(value, list)
        case "string":
            return isinstance(value, str)
        case "boolean":
            return isinstance(value, bool)
        case "null":
            return value is None
        case "integer":
            return not isinstance(value, bool) and (
                isinstance(value, int) or (isinstance(value, float) and value.is_integer())
            )
        case _:
            return isinstance(value, (int, float)) and not isinstance(value, bool)
