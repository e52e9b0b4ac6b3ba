"""Jinja for templates from untrusted files: sandboxed, and bounded in time and memory.

Jinja's own sandbox keeps a template from reaching Python's internals, but not from running
for hours or filling the memory. So a template is rewritten before it is compiled: every loop,
every printed value and every concatenation passes through a filter that charges a Budget, and
calls, operators and filters charge it too. What can grow faster than its input (a repeated
string, a power, a padded number) is estimated before it is done. The lists that a template
builds are weighed, since one nested in itself forty times over costs nothing to build and for
ever to print or to compare.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from string import Formatter
from typing import Any

from jinja2 import TemplateError, Undefined, nodes, pass_context
from jinja2.environment import Environment, Template
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from shimpy.chat.budget import Budget, TemplateFault
from shimpy.chat.instrument import Generation, inspected_literals, instrument, possible_keys

MAX_TEMPLATE_CHARS = 256 * 1024
MAX_INT_BITS = 4096
MAX_PADDING = 1024
MAX_INDENT = 16

_BUDGET = "shimpy budget"  # no identifier, so that no template can name it

_STR_METHODS = frozenset(
    """
    capitalize count endswith find format index isalnum isalpha isdecimal isdigit islower isnumeric
    isspace istitle isupper join lower lstrip partition removeprefix removesuffix replace rfind
    rindex rpartition rsplit rstrip split splitlines startswith strip swapcase title upper
    """.split()  # noqa: SIM905 - easier to read
)
_FILTERS = frozenset(
    """
    abs attr batch capitalize count d default dictsort escape e first float groupby indent int
    items join last length list lower map max min reject rejectattr replace reverse round safe
    select selectattr slice sort string sum title trim tojson unique upper wordcount
    """.split()  # noqa: SIM905 - easier to read
)


def compile_template(source: str) -> CompiledTemplate:
    """Return a template that can be rendered any number of times, from any thread.

    Raises:
        TemplateFault: the source is too long, not Jinja, or uses what isn't there.
    """
    if len(source) > MAX_TEMPLATE_CHARS:
        raise TemplateFault(
            f"the template has {len(source)} characters; the limit is {MAX_TEMPLATE_CHARS}"
        )
    environment = _Sandbox()
    try:
        tree = environment.parse(source)
        literals = frozenset(inspected_literals(tree))
        names = frozenset(node.name for node in tree.find_all(nodes.Name))
        keys = frozenset(possible_keys(tree))
        code = environment.compile(instrument(tree))
        template = Template.from_code(environment, code, environment.make_globals(None))
    except TemplateError as error:
        line = getattr(error, "lineno", None)
        where = f" in line {line}" if line else ""
        raise TemplateFault(f"the template is not valid Jinja{where}: {error}") from error
    except (RecursionError, MemoryError, SyntaxError, ValueError, TypeError) as error:
        raise TemplateFault(f"the template can't be compiled: {error}") from error
    return CompiledTemplate(template, literals, names, keys)


class CompiledTemplate:
    """A Jinja template; `literals` are the strings that it compares or splits text with."""

    def __init__(
        self,
        template: Template,
        literals: frozenset[str],
        names: frozenset[str],
        keys: frozenset[str],
    ) -> None:
        self._template = template
        self.literals = literals
        # The variables that it mentions, and what may be a key: attributes and strings.
        self.names = names
        self.keys = keys

    def render(
        self, variables: Mapping[str, Any], *, n_input_chars: int, n_messages: int = 0
    ) -> str:
        """Return the text.

        Raises:
            TemplateFault: the template raised, failed, or ran over its budget.
        """
        budget = Budget(n_input_chars, n_messages=n_messages)
        try:
            return "".join(self._template.generate({**variables, _BUDGET: budget}))
        except TemplateFault:
            raise
        except RecursionError as error:
            raise TemplateFault("the template recurses too deeply") from error
        except MemoryError as error:
            raise TemplateFault("the template needs too much memory") from error
        except Exception as error:  # a template's code can fail in any way that Python can
            raise TemplateFault(f"the template failed: {type(error).__name__}: {error}") from error


# --- the environment --------------------------------------------------------------------------


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            extensions=["jinja2.ext.loopcontrols", "jinja2.ext.do", Generation],
        )
        self.globals = {
            "range": self.globals["range"],
            "dict": dict,
            "namespace": self.globals["namespace"],
            "raise_exception": _raise_exception,
        }
        # The originals, for the wrappers to call.
        self._plain = Environment()
        self._plain.filters |= {"tojson": _tojson, "safe": str, "escape": _escape, "e": _escape}
        self.filters = {name: self._charged(name) for name in _FILTERS}
        self.filters |= {
            "_out": _out,
            "_each": _each,
            "_concat": _concat,
            "_weigh": _weigh,
            "_sized": _sized,
        }

    def _charged(self, name: str) -> Callable[..., Any]:
        """Return the filter `name` with its input and output charged."""
        before = _FILTER_CHECKS.get(name)

        @pass_context
        def charged(context: Context, value: Any = "", *args: Any, **kwargs: Any) -> Any:
            budget = _budget(context)
            budget.spend_value(value)
            if before is not None:
                before(budget, value, *args, **kwargs)
            result = self._plain.call_filter(name, value, args, kwargs, context=context)
            if not isinstance(result, (str, list, tuple, dict, int, float, type(None), Undefined)):
                # The generators of map, select and their like: run here, where they are charged.
                result = _bounded_list(budget, result) if isinstance(result, Iterable) else result
            budget.spend_value(result)
            return result

        return charged

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and attr not in _STR_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        budget = _budget(context)
        budget.spend_steps(1)
        if isinstance(obj, (LoopContext, Macro)):
            for arg in args:
                budget.spend_value(arg)
        _check_method(budget, obj, args, kwargs)
        result = super().call(context, obj, *args, **kwargs)
        if isinstance(result, dict):
            budget.weigh(result)
        else:
            budget.spend_value(result)
        return result

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = _budget(context)
        _check_binop(budget, operator, left, right)
        result = self.binop_table[operator](left, right)
        budget.spend_value(result)
        return result


def _budget(context: Context) -> Budget:
    budget: Budget = context.parent[_BUDGET]
    return budget


def _check_binop(budget: Budget, operator: str, left: Any, right: Any) -> None:
    """Charge what an operator is about to make, where that can outgrow its operands."""
    if operator == "+":
        for side in (left, right):
            if isinstance(side, (str, list, tuple)):
                budget.spend_value(side)
    elif operator == "%" and isinstance(left, str):
        _check_printf(left)
        budget.weigh(right)
    elif operator == "*":
        for some, times in ((left, right), (right, left)):
            if isinstance(some, (str, list, tuple)) and isinstance(times, int):
                budget.spend_chars(len(some) * max(0, times))
        if isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() + right.bit_length())
    elif operator == "**" and isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() * max(0, right))


def _check_bits(n_bits: int) -> None:
    if n_bits > MAX_INT_BITS:
        raise TemplateFault(f"the template computes a number of {n_bits} bits")


def _check_printf(text: str) -> None:
    widths = re.findall(r"%[^a-zA-Z%]*", text)
    if any("*" in part or _too_wide(part) for part in widths):
        raise TemplateFault(f"the template formats with a width over {MAX_PADDING}")


def _too_wide(text: str) -> bool:
    return any(int(run[:9]) > MAX_PADDING for run in re.findall(r"\d+", text))


def _check_method(budget: Budget, method: Any, args: Any, kwargs: Any) -> None:
    """Charge a string's method that can make more than it was given."""
    name = getattr(method, "__name__", "")
    # jinja2 wraps str.format; functools.wraps leaves the method under __wrapped__.
    method = getattr(method, "__wrapped__", method)
    owner = getattr(method, "__self__", None)
    if isinstance(owner, (str, list, tuple)):
        budget.spend_value(owner)
    if not isinstance(owner, str):
        return
    if name == "replace":
        _check_replace(budget, owner, *args, **kwargs)
    elif name == "join" and args:
        _check_join(budget, args[0], owner)
    elif name == "format":
        fields = [field for field in Formatter().parse(owner) if field[1] is not None]
        if any("{" in (spec or "") or _too_wide(spec or "") for _, _, spec, _ in fields):
            raise TemplateFault(f"the template formats with a width over {MAX_PADDING}")
        budget.weigh([*args, *kwargs.values()] * max(1, len(fields)))


def _check_replace(
    budget: Budget, text: Any, old: Any = "", new: Any = "", *_: Any, **__: Any
) -> None:
    n_found = str(text).count(str(old))
    budget.spend_chars(len(str(text)) + n_found * len(str(new)))


def _check_join(budget: Budget, items: Any, d: Any = "", *_: Any, **__: Any) -> None:
    if isinstance(items, (list, tuple, dict)):
        budget.weigh(list(items))
        budget.spend_chars(len(items) * len(str(d)))


def _check_indent(budget: Budget, text: Any, width: Any = 4, *_: Any, **__: Any) -> None:
    n_width = width if isinstance(width, int) else len(str(width))
    if n_width > MAX_PADDING:
        raise TemplateFault(f"the template indents by {n_width}; the limit is {MAX_PADDING}")
    budget.spend_chars(str(text).count("\n") * max(0, n_width))


def _check_string(budget: Budget, value: Any, *_: Any, **__: Any) -> None:
    budget.weigh(value)


def _check_batch(budget: Budget, _value: Any, n: Any = 1, *_: Any, **__: Any) -> None:
    if isinstance(n, int):
        budget.spend_steps(max(0, n))


def _check_select(budget: Budget, items: Any, *args: Any, **_: Any) -> None:
    """Charge a comparison of each item with each argument."""
    if isinstance(items, (str, list, tuple, dict)):
        n_chars = sum(len(arg) for arg in args if isinstance(arg, (str, list, tuple, dict)))
        budget.spend_chars(len(items) * n_chars)


_FILTER_CHECKS: dict[str, Callable[..., None]] = {
    "replace": _check_replace,
    "join": _check_join,
    "indent": _check_indent,
    "string": _check_string,
    "safe": _check_string,
    "tojson": _check_string,
    "batch": _check_batch,
    "slice": _check_batch,
    **dict.fromkeys(("select", "reject", "selectattr", "rejectattr", "map"), _check_select),
}


def _bounded_list(budget: Budget, items: Iterable[Any]) -> list[Any]:
    result = []
    for item in items:
        budget.spend_steps(1)
        result.append(item)
    return result


# --- what templates call ----------------------------------------------------------------------


def _raise_exception(message: object = "") -> str:
    raise TemplateFault(str(message)[:500], kind="refused")


def _tojson(
    value: Any,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    *,
    ensure_ascii: bool = False,
    sort_keys: bool = False,
) -> str:
    """As in Hugging Face's chat templates: plain JSON, nothing escaped for HTML."""
    if isinstance(indent, int) and indent > MAX_INDENT:
        raise TemplateFault(f"the template indents JSON by {indent}; the limit is {MAX_INDENT}")
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _escape(value: object) -> str:
    text = str(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return text.replace("'", "&#39;").replace('"', "&#34;")


def strftime_now(now: datetime) -> Callable[[str], str]:
    """Return the function of that name for templates, at the time `now`."""

    def format_now(pattern: str) -> str:
        if not re.fullmatch(r"(?:%[-a-zA-Z%]{1,2}|[^%]){0,100}", str(pattern)):
            raise TemplateFault("the template formats the date in an unknown way")
        return now.strftime(str(pattern))

    return format_now


# --- the filters that the rewriting puts in ------------------------------------------------------


@pass_context
def _out(context: Context, value: Any) -> str:
    budget = _budget(context)
    if not isinstance(value, str):
        budget.weigh(value)
        value = str(value)
    budget.spend_chars(len(value))
    return str(value)


@pass_context
def _concat(context: Context, values: list[Any]) -> str:
    budget = _budget(context)
    budget.weigh(values)
    return "".join([str(value) for value in values])


@pass_context
def _each(context: Context, value: Any) -> list[Any]:
    budget = _budget(context)
    if isinstance(value, (str, list, tuple, dict, range)):
        budget.spend_steps(1 + len(value))
        return list(value)
    return _bounded_list(budget, value)


@pass_context
def _weigh(context: Context, value: Any) -> Any:
    _budget(context).weigh(value)
    return value


@pass_context
def _sized(context: Context, value: Any) -> Any:
    _budget(context).spend_value(value)
    return value
