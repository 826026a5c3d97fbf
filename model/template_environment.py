"""The Jinja environment chat templates are written for: the sandbox and the additions of transformers.

Templates come with checkpoints from anywhere, so they run in Jinja's immutable sandbox.
"""

import json
from collections.abc import Callable
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

SPAN_MARKS = "topkapi_span_marks"
"""Name of the template variable that holds the two characters put around each `{% generation %}` block."""


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


def template_environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """A fresh environment with `tojson`, `raise_exception`, `strftime_now`, loop controls and generation blocks."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    # Jinja's own filter escapes HTML characters, which no model has seen in training.
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
