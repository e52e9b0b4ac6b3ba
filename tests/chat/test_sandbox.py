"""Templates come from untrusted files: they can neither reach Python nor run away."""

# ruff: noqa: E501 - one bomb a line

from __future__ import annotations

import time
from datetime import UTC, datetime

import pytest

from shimpy.chat.budget import TemplateFault
from shimpy.chat.sandbox import MAX_TEMPLATE_CHARS, CompiledTemplate, compile_template, strftime_now


def render(source: str, **variables: object) -> str:
    return compile_template(source).render(variables, n_input_chars=100)


BOMBS = {
    "nested ranges": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "filtered loop": "{% for a in range(9999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
    "while by recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "recursive loop": "{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "wide recursive loop": "{% for a in [1] recursive %}{{ loop(range(99999)) }}{% endfor %}",
    "mutual recursion": "{% macro f() %}{{ g() }}{{ g() }}{% endmacro %}{% macro g() %}{{ f() }}{% endmacro %}{{ f() }}",
    "repeated string": "{{ 'a' * 999999999 }}",
    "repeated list": "{{ ([1] * 999999999) | length }}",
    "doubled by +": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "doubled by ~": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "doubled by a block": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}{% endfor %}",
    "doubled by a macro": "{% macro f(x) %}{{ x }}{{ x }}{% endmacro %}{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = f(n.x) %}{% endfor %}",
    "doubled list": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "doubled by join": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = [n.x, n.x] | join %}{% endfor %}",
    "doubled by str.join": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x.join(['b', 'c', 'd']) %}{% endfor %}",
    "doubled by replace": "{% set n = namespace(x='aa') %}{% for i in range(60) %}{% set n.x = n.x.replace('a', 'aa') %}{% endfor %}",
    "doubled by the filter": "{% set n = namespace(x='aa') %}{% for i in range(60) %}{% set n.x = n.x | replace('a', 'aa') %}{% endfor %}",
    "doubled by format": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = '{0}{0}'.format(n.x) %}{% endfor %}",
    "doubled by %": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = '%s%s' % (n.x, n.x) %}{% endfor %}",
    "nested in itself, printed": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "nested in itself, compared": "{% set n = namespace(x=(1,), y=(1,)) %}{% for i in range(60) %}{% set n.x = (n.x, n.x) %}{% set n.y = (n.y, n.y) %}{% endfor %}{{ n.x == n.y }}",
    "nested in itself, as a key": "{% set n = namespace(x=(1,)) %}{% for i in range(60) %}{% set n.x = (n.x, n.x) %}{% endfor %}{{ {n.x: 1} | length }}",
    "nested by dict()": "{% set n = namespace(x=1) %}{% for i in range(60) %}{% set n.x = dict(a=n.x, b=n.x) %}{% endfor %}{{ n.x | tojson }}",
    "power": "{{ 10 ** 999999999 }}",
    "power by steps": "{% set n = namespace(x=10) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "padded": "{{ '%999999999d' % 1 }}",
    "padded by a star": "{{ '%*d' % (999999999, 1) }}",
    "padded by format": "{{ '{:999999999}'.format(1) }}",
    "padded by a nested format": "{{ '{:{}}'.format(1, 999999999) }}",
    "padded by a method": "{{ 'a'.center(999999999) }}",
    "indented": "{{ 'a\nb' | indent(999999999) }}",
    "indented JSON": "{{ [1] | tojson(indent=999999999) }}",
    "batched": "{{ [1] | batch(999999999, 1) | list }}",
    "sliced": "{{ [1] | slice(999999999) | list }}",
    "mapped in a loop": "{% for a in range(9999) %}{{ range(99999) | map('string') | list | length }}{% endfor %}",
    "searched in a loop": "{% for i in range(99999) %}{{ 'zz' in big }}{% endfor %}",
    "searched by a test": "{% for i in range(99999) %}{{ 'zz' is in big }}{% endfor %}",
    "searched by a filter": "{% for i in range(99999) %}{{ range(999) | map('string') | select('in', big) | list }}{% endfor %}",
    "compared in a loop": "{% for i in range(99999) %}{{ big == big[:] }}{% endfor %}",
    "sliced in a loop": "{% for i in range(99999) %}{% set x = big[1:] %}{% endfor %}",
    "listed in a loop": "{% set l = range(99999) | list %}{% for i in l %}{{ l.index(99998) }}{% endfor %}",
    "written in a loop": "{% for i in range(99999) %}{% set x = {'a': big} | tojson %}{% endfor %}",
    "deeply nested": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deeply nested blocks": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_template_that_would_run_away_is_stopped(name: str) -> None:
    """Quickly, too: the budget is charged before the work is done."""
    start = time.process_time()
    with pytest.raises(TemplateFault):
        render(BOMBS[name], big="a" * 1_000_000)
    assert time.process_time() - start < 10


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ x.__init__.__globals__ }}",
        "{{ ''['__class__'].mro() }}",
        "{{ ('' | attr('__class__')).mro() }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ x.append(1) }}",
        "{{ raise_exception.__globals__.x }}",
        "{% include 'x' %}",
        "{% import 'x' as y %}",
        "{{ lipsum(n=5) }}",
        "{{ 'a' | random }}",
        "{{ cycler('a') }}",
        "{{ 'a'.encode() }}",
    ],
)
def test_python_is_out_of_reach(source: str) -> None:
    with pytest.raises(TemplateFault):
        render(source, x=[1])


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ {'a': ['é', 1, none]} | tojson }}", '{"a": ["é", 1, null]}'),
        ("{{ {'a': '<&>'} | tojson }}", '{"a": "<&>"}'),
        ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
        ("{{ {'b': 1, 'a': 2} | tojson(sort_keys=true, separators=(',', ':')) }}", '{"a":2,"b":1}'),
        ("{{ 'a' ~ 1 ~ none }}", "a1None"),
        ("{% for a in [1, 2, 3] %}{{ loop.index }}{{ ',' if not loop.last }}{% endfor %}", "1,2,3"),
        ("{% for a in [1, 2, 3] %}{% if a == 2 %}{% break %}{% endif %}{{ a }}{% endfor %}", "1"),
        ("{% for a in [1, 2] %}{% if a == 1 %}{% continue %}{% endif %}{{ a }}{% endfor %}", "2"),
        ("{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}", "a1"),
        ("{% for k in {'a': 1} %}{{ k }}{% endfor %}", "a"),
        ("{% for a in missing %}x{% else %}none{% endfor %}", "none"),
        (
            "{% for a in [[1], [2]] recursive %}{{ a if a is number else loop(a) }}{% endfor %}",
            "12",
        ),
        ("{% macro f(a, b=2) %}{{ a }}{{ b }}{% endmacro %}{{ f(1) }}{{ f(1, b=3) }}", "1213"),
        ("{% set ns = namespace(a=1) %}{% set ns.a = ns.a + 1 %}{{ ns.a }}", "2"),
        ("{% generation %}x{{ 1 }}{% endgeneration %}y", "x1y"),
        (
            "{{ [{'r': 'u', 'n': 1}, {'r': 'a'}] | selectattr('r', 'equalto', 'u') | list | length }}",
            "1",
        ),
        ("{{ [3, 1] | sort | join(',') }}", "1,3"),
        ("{{ 'a' | upper }}{{ 'A'.lower() }}{{ 'ab' | length }}", "Aa2"),
        ("{{ missing is defined }}{{ x is string }}", "FalseTrue"),
        ("{{ missing | default('d') }}{{ '' | default('e', true) }}", "de"),
        ("{{ 'a,b'.split(',')[-1] }}{{ ' a '.strip() }}", "ba"),
        ("{{ '%s-%d' % ('a', 3) }}{{ '{}{:>3}'.format('a', 'b') }}", "a-3a  b"),
        ("{% if true %}\n  a\n  {%- endif %}\nb", "  ab"),
        ("{{ '<' | e }}{{ '<b>' | safe }}", "&lt;<b>"),
        ("{{ x[1:] ~ x[:1] ~ x[::-1] }}", "bcacba"),
        ("{{ dict(a=1).a }}{{ {'a': 1}.get('b', 2) }}", "12"),
        ("{% set x %}a{{ 1 }}{% endset %}{{ x }}", "a1"),
        ("{{ [1, 2] | map('string') | join('+') }}", "1+2"),
        ("{% do [1] %}x", "x"),
    ],
)
def test_what_templates_use_works(source: str, expected: str) -> None:
    assert render(source, x="abc") == expected


def test_a_long_conversation_is_no_bomb() -> None:
    """The budget grows with the input."""
    source = "{% for m in messages %}{{ m.split('x')[0].strip() + m | trim }}{% endfor %}"
    messages = ["y" * 5000] * 2000
    text = compile_template(source).render({"messages": messages}, n_input_chars=10_000_000)
    assert len(text) == 20_000_000


def test_a_template_may_look_at_all_messages_for_each() -> None:
    """gpt-oss's does."""
    source = "{% for m in messages %}{% for n in messages[loop.index:] %}{% endfor %}{% endfor %}"
    compiled = compile_template(source)
    messages = ["x"] * 1500
    compiled.render({"messages": messages}, n_input_chars=1500, n_messages=1500)
    with pytest.raises(TemplateFault, match="too much work"):
        compiled.render({"messages": messages}, n_input_chars=1500)


def test_a_template_can_refuse() -> None:
    with pytest.raises(TemplateFault, match="only user") as caught:
        render("{{ raise_exception('only user messages') }}")
    assert caught.value.kind == "refused"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{% if %}", "line 1"),
        ("{{ 'a' | nofilter }}", "nofilter"),
        ("x" * (MAX_TEMPLATE_CHARS + 1), str(MAX_TEMPLATE_CHARS)),
        ("{% for %}", "not valid Jinja"),
    ],
)
def test_what_is_no_template_is_said_so(source: str, words: str) -> None:
    with pytest.raises(TemplateFault, match=words):
        compile_template(source)


@pytest.mark.parametrize(
    "source", ["{{ missing.a.b }}", "{{ 1 + 'a' }}", "{{ x() }}", "{{ 1 / 0 }}"]
)
def test_a_template_that_fails_says_how(source: str) -> None:
    with pytest.raises(TemplateFault, match="failed"):
        render(source, x=1)


def test_the_date_is_the_one_that_was_given() -> None:
    now = strftime_now(datetime(2025, 3, 4, tzinfo=UTC))
    assert now("%d %b %Y") == "04 Mar 2025"
    assert render("{{ strftime_now('%Y') }}", strftime_now=now) == "2025"
    with pytest.raises(TemplateFault):
        now("%999999999Y")


def test_what_a_template_looks_for_and_what_it_reads_is_known() -> None:
    compiled = compile_template(
        "{{ '<|im_start|>' + m.role }}{% if '</think>' in m.content %}{{ think }}{% endif %}"
        "{% set end = '[END]' %}{{ m['x'] }}"
    )
    assert {"</think>", "[END]"} <= compiled.literals
    assert "<|im_start|>" not in compiled.literals
    assert {"m", "think"} <= compiled.names
    assert {"role", "content", "x"} <= compiled.keys


def test_one_template_renders_in_many_threads() -> None:
    """Each rendering has its own budget."""
    from concurrent.futures import ThreadPoolExecutor

    compiled: CompiledTemplate = compile_template("{% for i in range(n) %}{{ n }}{% endfor %}")
    with ThreadPoolExecutor(4) as pool:
        texts = list(pool.map(lambda n: compiled.render({"n": n}, n_input_chars=0), range(1, 40)))
    assert texts == [str(n) * n for n in range(1, 40)]
