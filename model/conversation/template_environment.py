"""The Jinja environment chat templates are written for: the sandbox and the additions of transformers.

Templates come with checkpoints from anywhere, so they run in Jinja's immutable sandbox, and within bounds: see
`model.conversation.template_bounds`. Nothing is computed while a template is compiled.
"""

import functools
import json
from collections.abc import Callable
from datetime import datetime
from types import BuiltinMethodType
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils
import jinja2.visitor

from topkapi.model.conversation import template_bounds as bounds

SPAN_MARKS = "topkapi_span_marks"
"""Name of the template variable that holds the two characters put around each `{% generation %}` block."""

_LONGEST_SOURCE = 1 << 16
"""Characters of a template. The longest that models come with have about 30,000."""
_MOST_NODES = 10_000
"""Nodes of its tree, which take Python's compiler a tenth of a second."""

_LEFT_OUT = ("pprint", "striptags", "urlize", "wordcount", "wordwrap", "xmlattr")
"""Filters for web pages, which take long on long texts."""

_ROUNDS, _COMPARED, _JOINED, _STEP = "topkapi_rounds", "topkapi_compared", "topkapi_joined", "topkapi_step"
_COMPARING = (
    "!=", "<", "<=", "==", ">", ">=", "eq", "equalto", "ge", "greaterthan", "gt", "in", "le", "lessthan", "lt", "ne",
)  # fmt: skip


class GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}`: what the assistant says, its end token included."""

    tags = {"generation"}  # noqa: RUF012 (declared so by Jinja)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """A call of `_marked` around the block's body."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_marked", [jinja2.nodes.ContextReference()])
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _marked(self, context: jinja2.runtime.Context, caller: Callable[[], str]) -> str:
        begin, end = context.get(SPAN_MARKS) or ("", "")
        return f"{begin}{caller()}{end}"


class _Namespace(jinja2.utils.Namespace):
    def __repr__(self) -> str:
        # One namespace may hold another twice, that a third, and so on: written out they would have no end.
        return "<Namespace>"


class _Bounding(jinja2.visitor.NodeTransformer):
    """Puts the checks into a template's tree that the sandbox has no place for."""

    def generic_visit(self, node: jinja2.nodes.Node, *args: Any, **kwargs: Any) -> Any:
        """Visit what is below a node, then what of the node itself takes long."""
        node = super().generic_visit(node, *args, **kwargs)
        if isinstance(node, jinja2.nodes.For):
            node.iter = _filtered(node.iter, _ROUNDS)
        elif isinstance(node, jinja2.nodes.Compare):
            node.expr = _compared(node.expr)
            for operand in node.ops:
                operand.expr = _compared(operand.expr)
            return _filtered(node, _STEP)
        elif isinstance(node, jinja2.nodes.Concat):
            return _filtered(jinja2.nodes.List(node.nodes, lineno=node.lineno), _JOINED)
        elif isinstance(node, jinja2.nodes.Tuple) and node.ctx == "load":
            return _filtered(node, _COMPARED)
        elif isinstance(node, jinja2.nodes.Getitem) and isinstance(node.arg, jinja2.nodes.Slice):
            return _filtered(node, _STEP)
        elif isinstance(node, jinja2.nodes.Extends | jinja2.nodes.Include | jinja2.nodes.Import):
            raise jinja2.TemplateSyntaxError("a chat template cannot include other templates", node.lineno)
        elif isinstance(node, jinja2.nodes.FromImport):
            raise jinja2.TemplateSyntaxError("a chat template cannot import other templates", node.lineno)
        return node


def _filtered(node: Any, name: str) -> jinja2.nodes.Filter:
    return jinja2.nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _compared(node: jinja2.nodes.Expr) -> jinja2.nodes.Expr:
    return node if isinstance(node, jinja2.nodes.Const) else _filtered(node, _COMPARED)


class BoundedEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The immutable sandbox, in which nothing takes long or grows large."""

    intercepted_binops = frozenset(jinja2.sandbox.SandboxedEnvironment.default_binop_table)
    concat = staticmethod(bounds.join)

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        if len(source) > _LONGEST_SOURCE:
            raise jinja2.TemplateSyntaxError(f"it has more than {_LONGEST_SOURCE:,} characters", 1)
        tree = super()._parse(source, name, filename)
        if sum(1 for _ in tree.find_all(jinja2.nodes.Node)) > _MOST_NODES:
            raise jinja2.TemplateSyntaxError(f"it has more than {_MOST_NODES:,} expressions and statements", 1)
        return _Bounding().visit(tree)  # type: ignore[no-any-return]

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        """`left operator right`, where the result is of an ordinary size."""
        bounds.check_operation(operator, left, right)
        return bounds.small(super().call_binop(context, operator, left, right))

    def call(__self, __context: jinja2.runtime.Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a macro, a method or a function."""
        bounds.spend()
        if isinstance(__obj, jinja2.runtime.LoopContext):
            args = tuple(map(bounds.rounds, args))
        elif isinstance(__obj, BuiltinMethodType):
            args = tuple(bounds.checked_method(__obj.__self__, __obj.__name__, (*args, *kwargs.values())))
            args = args[: len(args) - len(kwargs)]
        elif not isinstance(__obj, jinja2.runtime.Macro) or __obj.catch_kwargs or __obj.catch_varargs:
            bounds.size((args, kwargs))
        return bounds.small(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`str.format`, where no field is padded without end."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        @functools.wraps(wrapped)
        def checked(*args: Any, **kwargs: Any) -> str:
            bounds.check_braces(value.__self__, (args, kwargs))
            return wrapped(*args, **kwargs)

        return checked


def template_environment() -> BoundedEnvironment:
    """A fresh environment with `tojson`, `raise_exception`, `strftime_now`, loop controls and generation blocks."""
    environment = BoundedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        optimized=False,
        finalize=_shown,
        extensions=[GenerationBlock, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = _to_json
    for name in _LEFT_OUT:
        del environment.filters[name]
    environment.filters.update({name: _bounded_filter(name, each) for name, each in environment.filters.items()})
    environment.filters.update({_ROUNDS: bounds.rounds, _COMPARED: _looked_through, _JOINED: _joined, _STEP: _step})
    tests: dict[str, Any] = environment.tests
    tests.update({name: _bounded_test(tests[name]) for name in _COMPARING})
    del environment.globals["lipsum"]
    environment.globals["namespace"] = _Namespace
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    passed = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        values = bounds.check_filter(name, args[passed:], kwargs)
        return bounds.small(function(*args[:passed], *values, **kwargs))

    return bounded


def _bounded_test(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def bounded(*args: Any) -> Any:
        bounds.spend()
        return function(*map(_looked_through, args))

    return bounded


@jinja2.pass_context
def _shown(context: jinja2.runtime.Context, value: Any) -> Any:
    bounds.spend()
    return _looked_through(value)


def _looked_through(value: Any) -> Any:
    if not isinstance(value, str | int):
        bounds.size(value)
    return value


def _joined(values: list[Any]) -> str:
    bounds.spend()
    return bounds.join(value if isinstance(value, str) else str(_looked_through(value)) for value in values)


def _step(value: Any) -> Any:
    bounds.spend()
    return value


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    # Jinja's own filter escapes HTML characters, which no model has seen in training.
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    bounds.size(form, 1000)
    return datetime.now().strftime(form)
