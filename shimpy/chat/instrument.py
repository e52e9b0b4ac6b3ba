"""Rewrites a template's syntax tree so that its work is charged, and reads what it looks for.

The filters that are put in begin with an underscore; shimpy.chat.sandbox defines them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.visitor import NodeTransformer

# Tests that look at the whole of a value.
_COMPARING = frozenset(["in", "eq", "equalto", "==", "ne", "!=", "lt", "gt", "le", "ge"])


def instrument(tree: nodes.Template) -> nodes.Template:
    """Put the charging filters into a syntax tree; return it."""
    return cast("nodes.Template", _Instrument().visit(tree))


class _Instrument(NodeTransformer):
    """Puts the charging filters into a syntax tree."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 - NodeTransformer's names
        self.generic_visit(node)
        node.iter = _filter(node.iter, "_each")
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        for i, child in enumerate(node.nodes):
            if isinstance(child, nodes.Expr) and not isinstance(child, nodes.TemplateData):
                node.nodes[i] = _filter(child, "_out")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes, lineno=node.lineno), "_concat")

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filter(node, "_sized") if isinstance(node.arg, nodes.Slice) else node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        for operand in node.ops:
            # Against a literal it can't take long, but for a search (in, not in).
            if not isinstance(operand.expr, nodes.Const) and (
                operand.op.endswith("in") or not isinstance(node.expr, nodes.Const)
            ):
                operand.expr = _filter(operand.expr, "_sized")
        return node

    def visit_Test(self, node: nodes.Test) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        if node.name in _COMPARING:
            node.args = [_filter(arg, "_sized") for arg in node.args]
        return node

    def visit_List(self, node: nodes.List) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        if all(isinstance(item, nodes.Const) for item in node.items):
            return node
        return _filter(node, "_weigh")

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filter(node, "_weigh")

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        if node.ctx != "load" or all(isinstance(item, nodes.Const) for item in node.items):
            return node
        return _filter(node, "_weigh")


def _filter(node: nodes.Node, name: str) -> nodes.Filter:
    return nodes.Filter(cast("nodes.Expr", node), name, [], [], None, None, lineno=node.lineno)


class Generation(Extension):
    """`{% generation %}`: marks what training learns; it renders as its body."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return the statements up to the end."""
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


def inspected_literals(node: nodes.Node) -> Iterable[str]:
    """Yield the strings that the template may look for in a text; not those that it prints."""
    if isinstance(node, nodes.Const):
        if isinstance(node.value, str):
            yield node.value
        return
    printing = isinstance(node, (nodes.Output, nodes.Add, nodes.Concat))
    for child in node.iter_child_nodes():
        if not (printing and isinstance(child, nodes.Const)):
            yield from inspected_literals(child)


def possible_keys(tree: nodes.Node) -> Iterable[str]:
    """Yield all that may be a key of a message: attributes and strings."""
    for node in tree.find_all((nodes.Getattr, nodes.Const)):
        if isinstance(node, nodes.Getattr):
            yield node.attr
        elif isinstance(node, nodes.Const) and isinstance(node.value, str):
            yield node.value
