"""The OpenAPI description of the routes, drawn from what answers them.

Paths, methods and summaries come from the routes and their handlers' docstrings, bodies from
the msgspec structs that the handlers read: nothing is written twice, so nothing can be out of
date.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import msgspec
from aiohttp import hdrs, web

import shimpy
from shimpy.server.bodies import read_body
from shimpy.server.gate import scope_of

_REF = "#/components/schemas/{name}"
_SUMMARY = re.compile(r"[A-Z ,]+ /\S*?(?:: |, |\.\s|\.$)\s*")
_VARIABLE = re.compile(r"\{(\w+)\}")

Route = tuple[str, str, Any]


def routes_of(app: web.Application) -> tuple[Route, ...]:
    """Return method, path and handler of every route; HEAD goes without saying."""
    return tuple(
        (route.method, route.resource.canonical, route.handler)
        for route in app.router.routes()
        if route.resource is not None and route.method != hdrs.METH_HEAD
    )


@lru_cache(maxsize=1)
def describe(routes: tuple[Route, ...]) -> dict[str, Any]:
    """Return the description of routes as OpenAPI 3.1; takes some tens of milliseconds."""
    bodies = {handler: body_of(handler) for _, _, handler in routes}
    structs = sorted({body for body in bodies.values() if body is not None}, key=repr)
    schemas, components = msgspec.json.schema_components(structs, ref_template=_REF)
    schema_of = dict(zip(structs, schemas, strict=True))
    paths: dict[str, Any] = {}
    for method, path, handler in routes:
        body = bodies[handler]
        schema = None if body is None else schema_of[body]
        paths.setdefault(path, {})[method.lower()] = _operation(method, path, handler, schema)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "shimpy",
            "version": shimpy.__version__,
            "description": "Ollama's, OpenAI's, Anthropic's and llama.cpp's dialects, and "
            "shimpy's own. Unknown fields are ignored; null is the same as leaving one out.",
        },
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


def body_of(handler: Any) -> type | None:
    """Return the struct that a handler reads from its request's body; None: it reads none."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(handler)))
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        match call:
            case ast.Call(func=ast.Name(id=read_body.__name__), args=[_, ast.Name(id=name)]):
                body = inspect.unwrap(handler).__globals__[name]
                assert isinstance(body, type), "read_body takes a type"
                return body
            case _:
                continue
    return None


def _operation(method: str, path: str, handler: Any, schema: Any) -> dict[str, Any]:
    doc = inspect.getdoc(handler) or ""
    first = " ".join(doc.partition("\n\n")[0].split())
    operation: dict[str, Any] = {
        "summary": _SUMMARY.sub("", first, count=1) or first,
        "responses": {
            "200": {"description": "The answer, in the dialect's own form"},
            "default": {"description": "An error, in the dialect's own form; docs/api.md"},
        },
    }
    scope = scope_of(method, path)
    if scope is not None:
        operation["security"] = [{}, {"bearer": []}, {"key": []}]
        operation["x-scope"] = scope
    names: Iterable[str] = _VARIABLE.findall(path)
    if names:
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in names
        ]
    if schema is not None:
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": schema}},
        }
    return operation
