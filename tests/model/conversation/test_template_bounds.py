"""Chat templates of strangers end: those that would run or grow without end are refused, the others render as ever."""

# Templates are easier to read in one line.
# ruff: noqa: E501

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from topkapi.model.conversation.chat_template import ChatTemplate
from topkapi.model.conversation.template_environment import template_environment
from topkapi.model.errors import CheckpointError, InvalidRequest, TopkapiError

SIXTY = "{% for i in range(60) %}"
DOUBLED = (
    "{% set ns = namespace(s=[1], t=[1]) %}" + SIXTY + "{% set ns.s = [ns.s, ns.s] %}{% set ns.t = [ns.t, ns.t] %}"
)
LONG = "{% set s = 'a' * 8000000 %}{% set t = s[1:] + 'a' %}"

ENDLESS = {
    "rounds": "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
    "rounds of an iterator": "{% for a in range(99999)|map('string') %}{% for b in range(99999)|map('string') %}{% endfor %}{% endfor %}",
    "rounds of a recursive loop": "{% for a in range(1000) recursive %}{{ loop(range(1000)) if loop.depth < 4 }}{% endfor %}",
    "rounds in a filter": "{% set s = [1] * 1000000 %}" + SIXTY + "{{ s|select('odd')|list|length }}{% endfor %}",
    "rounds in a block": "{% filter upper %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{% endfilter %}",
    "calls": "{% macro f(n) %}{% if n < 60 %}{{ f(n + 1) }}{{ f(n + 1) }}{% endif %}{% endmacro %}{{ f(0) }}",
    "blocks that are called": "{% macro f() %}{% for i in range(99999) %}{{ caller() }}{% endfor %}{% endmacro %}"
    "{% call f() %}{% for i in range(99999) %}{% endfor %}{% endcall %}",
    "a long text": "{{ 'a' * 10 ** 10 }}",
    "a long text that is not shown": "{% set x = 'a' * 10 ** 10 %}",
    "a text in a constant": "{{ 'a'|center(10000000000) }}",
    "a long list": "{{ ([1] * 10 ** 9)|length }}",
    "a large number": "{{ 7 ** (7 ** 20) }}",
    "a precision": "{{ 5|round(-1000000000) }}",
    "a number of many digits": "{{ ('1' * 4000000)|int(0, 2) % 7 }}",
    "a sum that doubles": "{% set ns = namespace(s='a') %}" + SIXTY + "{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "a text that doubles": "{% set ns = namespace(s='a') %}" + SIXTY + "{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "lists in lists, shown": DOUBLED + "{% endfor %}{{ ns.s }}",
    "lists in lists, as JSON": DOUBLED + "{% endfor %}{{ ns.s|tojson }}",
    "lists in lists, compared": DOUBLED + "{% endfor %}{{ ns.s == ns.t }}",
    "lists in lists, tested": DOUBLED + "{% endfor %}{{ ns.s is eq ns.t }}",
    "lists in lists, searched": DOUBLED + "{% endfor %}{{ [ns.s].index(ns.t) }}",
    "lists in lists, formatted": DOUBLED + "{% endfor %}{{ '%s' % (ns.s,) }}",
    "tuples in tuples": "{% set ns = namespace(s=(1,)) %}" + SIXTY + "{% set ns.s = (ns.s, ns.s) %}{% endfor %}{{ {}[ns.s] }}",
    "a text stripped of itself": "{{ ('a' * 4000000).strip('b' * 4000000 ~ 'a')|length }}",
    "a text trimmed of itself": "{{ ('a' * 4000000)|trim('b' * 4000000 ~ 'a')|length }}",
    "a width behind brackets": "{{ ('%(a(b))1500000000d' % {'a(b)': 1})|length }}",
    "another case": "{{ ('ß' * 4000000).upper()|length }}",
    "another case by a filter": "{{ ('İ' * 4000000)|lower|length }}",
    "titles": "{{ ('a' * 4000000).title()|length }}",
    "a search from behind": "{{ ('a' * 4000000).rfind('ab' ~ 'a' * 2000000) }}",
    "a cut from behind": "{{ ('a' * 4000000).rsplit(sep='ab' ~ 'a' * 2000000) }}",
    "many pieces": "{{ ('a' * 4000000).split(maxsplit=-1, sep='a')|length }}",
    "escapes by %": "{{ ('%a' % ('𐐀' * 4000000))|length }}",
    "escapes by format": "{{ '{!a}'.format('𐐀' * 4000000)|length }}",
    "escapes of JSON": "{{ ('𐐀' * 4000000)|tojson(true)|length }}{{ ('𐐀' * 4000000)|tojson(ensure_ascii=true) }}",
    "lists without end": "{% set ns = namespace(s=[1]) %}{% for i in range(99999) %}{% set ns.s = [ns.s] %}{% endfor %}{{ ns.s }}",
    "padding": "{{ 'a'.ljust(10000000000) }}",
    "a width": "{{ '%999999999d' % 1 }}",
    "a width of its own": "{{ '{:{w}}'.format(1, w=999999999) }}",
    "a replacement": LONG + "{{ s.replace('a', s) }}",
    "a joint": LONG + "{{ (range(100000)|list)|join(s) }}",
    "an indentation": "{% set s = '\n' * 1000000 %}{{ s|indent(1000) }}",
    "JSON's separators": LONG + "{{ [1, 2]|tojson(separators=(s, s)) }}",
    "many names of one text": LONG + "{{ ([s] * 1000000)|string }}",
    "many comparisons": LONG + "{{ t in [s] * 1000000 }}",
    "copies": LONG + "{% for i in range(99999) %}{% set x = s[1:] %}{% endfor %}",
    "a sum of lists": "{{ ([[1] * 10000] * 10000)|sum(start=[])|length }}",
    "an encoding": "{{ ('ü' * 1000000).encode('punycode') }}",
    "output": "{% for i in range(99999) %}" + "x" * 10000 + "{% endfor %}",
    "output in a macro": "{% macro f() %}{% for i in range(99999) %}" + "x" * 10000 + "{% endfor %}{% endmacro %}{{ f()|length }}",
    "escapes": "{% set s = ('<' * 1000000)|escape %}{{ s * 100 }}",
    "brackets": "{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}",
    "blocks in blocks": "{% for a in [1] %}" * 50 + "{% endfor %}" * 50,
    "signs": "{{ " + "-" * 50000 + "1 }}",
    "statements": "{{a}}" * 12000,
    "characters": "a" * 100_000,
    "another template": "{% include 'x' %}",
    "digits": "{{ " + "9" * 5000 + " }}",
}  # fmt: skip


@pytest.mark.parametrize("source", ENDLESS.values(), ids=ENDLESS)
def test_what_would_not_end_is_refused_when_it_is_loaded(source, tiny_tokenizer, monkeypatch) -> None:
    monkeypatch.setattr("topkapi.model.conversation.template_bounds.MOST_ROUNDS", 1 << 16)
    with pytest.raises(CheckpointError, match="the chat template"):
        ChatTemplate(source).turn_end(tiny_tokenizer)


def test_what_does_not_end_for_certain_messages_is_refused_for_those(tiny_tokenizer) -> None:
    chat = ChatTemplate(
        "{% for a in range(99999) if messages|length > 2 %}{% for b in range(99999) %}{% endfor %}{% endfor %}fine"
    )
    assert chat.turn_end(tiny_tokenizer) == (tiny_tokenizer.end_token_id,)
    message = {"role": "user", "content": "Hello"}
    assert chat.render([message] * 2) == "fine"
    with pytest.raises(InvalidRequest, match="rounds of loops and calls") as refused:
        chat.render([message] * 3)
    assert refused.value.field == "messages"
    assert chat.render([message] * 2) == "fine"


TEMPLATES = [
    "{% for message in messages %}<{{ message.role }}>{{ message['content']|trim }}{{ '|' if not loop.last }}{% endfor %}",
    "{%- set ns = namespace(found=false, list=[]) -%}{%- for m in messages[::-1] -%}{%- if m.role == 'user' and not ns.found -%}"
    "{%- set ns.found = true -%}{%- set ns.list = ns.list + [m.content] -%}{%- endif -%}{%- endfor -%}{{ ns.list|tojson }}",
    "{% macro show(m, deep=1) %}{{ '%s=%-5d' % (m.role, deep) }}{% if deep < 3 %}{{ show(m, deep=deep + 1) }}{% endif %}{% endmacro %}"
    "{% for m in messages %}{{ show(m) }}{% endfor %}",
    "{{ messages|map(attribute='content')|join(', ') }} {{ messages|selectattr('role', 'equalto', 'user')|list|length }}",
    "{% for group in messages|groupby('role') %}{{ group.grouper }}: {{ group.list|length }};{% endfor %}",
    "{% for m in messages recursive %}{{ loop.depth }}{{ m.role or m }}{% if m.role %}{{ loop([1, 2]) }}{% endif %}{% endfor %}",
    "{% for m in messages if m.role != 'system' %}{{ loop.index }}/{{ loop.length }}{{ loop.cycle('a', 'b') }}{{ loop.nextitem.role if not loop.last }}{% endfor %}",
    "{% for m in messages|rejectattr('role', 'in', ['system', 'tool']) %}{{ loop.revindex }}{{ loop.changed(m.role) }}{% endfor %}",
    "{% for key, value in messages[0].items() %}{{ key ~ ':' ~ value ~ 1 ~ none ~ [1, {'a': 2}] }}{% endfor %}{{ messages[0]|items|list }}",
    "{{ messages[0].content.split(' ')[-1].upper()|indent(2) }}{{ '{:>5} {a}'.format(1, a=messages[0]['role']) }}{{ undefined }}",
    "{% for m in messages %}{% if loop.index0 == 2 %}{% break %}{% endif %}{{ m.content[:3] }}{% continue %}x{% endfor %}",
    "{{ messages|tojson(indent=4) }}{{ messages[0]|dictsort }}{{ (7 // 2, 7 % 4, 2 ** 10, -3, 7 / 2, 1 - 4) }}{{ 5.55|round(1) }}",
    "{% set x %}a{{ messages|length }}{% endset %}{{ x * 3 }}{{ [x] * 2 }}{{ x in ['a3'] and 'role' in messages[0] }}{{ 3 is divisibleby 3 }}",
    "{% call(a) wrap() %}{{ a }}!{% endcall %}{% macro wrap() %}[{{ caller(varargs|length) }}]{% endmacro %}{{ kwargs }}",
    "{% set c = cycler('a', 'b') %}{% set j = joiner(',') %}{% for m in messages %}{{ j() }}{{ c.next() }}{% endfor %}",
    "{{ messages|map(attribute='role')|unique|list }}{{ [3, 1, 2]|sort|reverse|list }}{{ [1, 2, 3]|batch(2)|list }}{{ [1, 2]|sum }}",
    "{{ 'a<b'|replace('<', '&') }}{{ ' x '|trim|capitalize }}{{ none|default('d', true) }}{{ '12'|int + 1 }}{{ dict(a=1).a }}",
]  # fmt: skip


@pytest.mark.parametrize("source", TEMPLATES)
def test_everything_else_renders_as_transformers_renders_it(source) -> None:
    messages = [
        {"role": "system", "content": "Be brief. "},
        {"role": "user", "content": "What is\nthis?"},
        {"role": "assistant", "content": " A test"},
    ]
    if "wrap" in source:
        source = source[source.index("{% macro") : source.index("{{ kwargs")] + source[: source.index("{% macro")]
    theirs, _ = render_jinja_template([messages], chat_template=source, add_generation_prompt=True)
    assert ChatTemplate(source).render(messages) == theirs[0]


def test_a_long_conversation_is_within_the_bounds() -> None:
    source = (
        "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '</>' }}"
        "{% if loop.index0 > messages|length - 3 %}{% for other in messages %}{{ other.role[0] }}{% endfor %}{% endif %}{% endfor %}"
    )
    messages = [{"role": "user", "content": "word " * 1000}] * 1000
    assert len(ChatTemplate(source).render(messages)) == 1000 * 5009 + 2 * 1000


ATOMS = st.sampled_from([
    "1", "7", "100000", "9999999999", "'a'", "'ab '", "''", "[]", "[1]", "{'a': 1}", "(1, 2)", "x", "y", "ns.s", "messages", "range(100000)",
    "range(1000)", "none", "1.5", "messages[0].content", "'%s%9d'", "'{:9}'", "loop", "varargs", "kwargs", "f",
])  # fmt: skip
FILTERS = st.sampled_from(sorted(set(template_environment().filters) - {"random"}))
METHODS = st.sampled_from([
    "ljust", "center", "zfill", "replace", "join", "split", "format", "encode", "upper", "index", "count", "get", "items", "copy", "title",
    "splitlines", "expandtabs", "translate", "to_bytes", "fromkeys", "partition", "casefold", "bit_length", "hex", "find",
])  # fmt: skip


def _composed(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    operators = st.sampled_from(
        ["*", "**", "+", "%", "~", "//", "-", "/", "==", "in", "<", "and", "is in", "is divisibleby"]
    )
    return st.one_of(
        st.tuples(inner, operators, inner).map(lambda parts: "({} {} ({}))".format(*parts)),
        st.tuples(inner, FILTERS).map(lambda parts: "({})|{}".format(*parts)),
        st.tuples(inner, FILTERS, inner).map(lambda parts: "({})|{}({})".format(*parts)),
        st.tuples(inner, METHODS, inner).map(lambda parts: "({}).{}({})".format(*parts)),
        st.tuples(inner, inner).map(lambda parts: "[{0}, {1}, {0}]".format(*parts)),
        st.tuples(inner, inner).map(lambda parts: "({0}, {1}, {0})".format(*parts)),
        st.tuples(inner, inner).map(lambda parts: "({})[{}:]".format(*parts)),
        st.tuples(inner, inner).map(lambda parts: "f({}, a={})".format(*parts)),
    )


EXPRESSIONS = st.recursive(ATOMS, _composed, max_leaves=8)


def _statements(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        st.tuples(EXPRESSIONS, inner).map(lambda parts: "{{% for x in {} %}}{}{{% endfor %}}".format(*parts)),
        st.tuples(EXPRESSIONS, inner).map(
            lambda parts: "{{% for x in {} recursive %}}{}{{{{ loop(x) }}}}{{% endfor %}}".format(*parts)
        ),
        st.tuples(inner, inner).map("".join),
        inner.map("{{% set y %}}{}{{% endset %}}{{{{ y }}}}".format),
    )


STATEMENTS = st.recursive(
    st.one_of(
        EXPRESSIONS.map("{{{{ {} }}}}".format),
        EXPRESSIONS.map("{{% set ns.s = {} %}}".format),
        EXPRESSIONS.map("{{% set ns.s = ns.s ~ ns.s ~ {} %}}".format),
        EXPRESSIONS.map("{{% set ns.s = [ns.s, ns.s, {}] %}}".format),
        EXPRESSIONS.map("{{% set y = {} %}}".format),
    ),
    _statements,
    max_leaves=6,
)


def ends(statements: str) -> None:
    """It is rendered or refused; did it not end, the test would not either."""
    source = (
        "{% set ns = namespace(s='ab') %}{% set x = 3 %}{% set y = [1, 2] %}"
        "{% macro f(n) %}{{ varargs }}{{ kwargs }}{{ n }}{{ f(n) if n is string }}{% endmacro %}" + statements
    )
    try:
        text = ChatTemplate(source).render([{"role": "user", "content": "Hello"}])
    except TopkapiError:
        return
    assert len(text) <= 1 << 24


RELAXED = list(HealthCheck)
pytestmark = pytest.mark.filterwarnings("ignore::SyntaxWarning")


@settings(max_examples=40, suppress_health_check=RELAXED)
@given(STATEMENTS)
def test_whatever_a_template_does_it_ends(statements) -> None:
    ends(statements)


@pytest.mark.slow
@pytest.mark.timeout(900)
@settings(max_examples=800, suppress_health_check=RELAXED)
@given(STATEMENTS)
def test_whatever_a_template_does_it_ends_many_times(statements) -> None:
    ends(statements)
