"""Structured output as a request asks for it, in llguidance's notation; its syntax is checked without torch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from topkapi.model.decoding.parameters import PARAMETERS, check_values
from topkapi.model.errors import InvalidRequest

# Between the elements of JSON: small models given more freedom go on with blanks for ever.
WHITE_SPACE = r"[ ]|\n[ ]{0,16}"

# These hold the interpreter while they search, so each reads a place of the text once: a literal without an end goes to
# the end of the text, and no repetition may begin anew within what another one has read.
_LITERAL = re.compile(r'//[^\n]*|#[^\n]*|"(?:\\[\s\S]|[^"\\])*+(?:"|\\?\Z)|/(?:\\[\s\S]|[^/\\])++(?:/|\\?\Z)')
_GBNF_RULE = re.compile(r"^[ \t]*[\w-]+\s*::=", re.MULTILINE)
_TEMPERATURE = re.compile(r"\[[^\[\]]*\btemperature\s*=")

SYNTAX_HINTS = {
    "regex": r"write it as in Python, without look-around and back references; \[ stands for a bracket itself",
    "json_schema": 'send a JSON Schema such as {"type": "object", "properties": {"name": {"type": "string"}}}',
    "grammar": 'write Lark rules such as start: "yes" | "no"',
    "choice": "send the texts to choose from",
    "json_object": None,
}
"""What to do about one that can't be read, by its parameter."""

# Longer ones are read once the checkpoint is, with limits of time and depth.
_READ_AT_ONCE = 10_000


def check_syntax(request: Mapping[str, Any]) -> None:
    """Raise `InvalidRequest` naming the parameter for one that no checkpoint could follow, as far as its text alone
    tells. Takes milliseconds."""
    given = check_values(request)
    for field in (parameter.name for parameter in PARAMETERS if parameter.stage == "grammar"):
        if given.get(field) is None or field == "json_object":
            continue
        if field == "grammar":
            check_lark(given[field], ())
        source = source_of(field, given[field])
        if len(source) > _READ_AT_ONCE:
            continue
        import llguidance

        if wrong := llguidance.LLMatcher.validate_grammar(source):
            raise refused(field, reason_of(wrong), SYNTAX_HINTS[field])


def source_of(field: str, value: Any) -> str:
    """The parameter in llguidance's own notation."""
    import llguidance

    matcher = llguidance.LLMatcher
    if field == "regex":
        return matcher.grammar_from_regex(value)
    if field == "choice":
        return matcher.grammar_from_lark("start: " + " | ".join(json.dumps(text) for text in value))
    if field == "grammar":
        return matcher.grammar_from_lark(value)
    if value is False:
        raise refused(field, "the schema is false, which nothing fulfils", "send an object, or true for any JSON")
    schema = {"type": "object"} if field == "json_object" else {} if value is True else value
    try:
        schema = json.dumps(schema, allow_nan=False)
        return matcher.grammar_from_json_schema(schema, defaults={"whitespace_pattern": WHITE_SPACE})
    except (ValueError, TypeError, RecursionError) as error:
        raise refused(field, str(error)) from None


def check_lark(text: str, end_spellings: Sequence[str]) -> None:
    """Refuse what llguidance reads but leaves to others to act on."""
    bare = _LITERAL.sub(" ", text)
    if _GBNF_RULE.search(bare):
        hint = 'write rules as `start: "yes" | "no"`, or send it to a route of llama.cpp\'s or OpenAI\'s clients'
        raise refused("grammar", "it looks like llama.cpp's GBNF (rules with ::=), and is read as Lark here", hint)
    named = next((spelling for spelling in end_spellings if spelling in bare), None)
    if named is not None:
        hint = "leave it out: it is allowed by itself where the grammar may stop"
        raise refused("grammar", f"it names the end token {named}", hint)
    if _TEMPERATURE.search(bare):
        hint = "leave it out, and set the temperature of the request"
        raise refused("grammar", "a rule's own temperature is not supported", hint)


def refused(field: str, reason: str, hint: str | None = None) -> InvalidRequest:
    return InvalidRequest(f"{field} can't be followed: {reason}", field=field, hint=hint)


def reason_of(message: str) -> str:
    """llguidance's message in one line, without its drawing of the place and its state."""
    message = message.partition("\n<")[0]
    cause = re.search(r"^error: (.+)$", message, re.MULTILINE)  # of a regular expression
    lines = [line.strip() for line in message.splitlines() if line.strip() and not re.match(r"\s*(\d+ \||\^)", line)]
    reason = cause[1] if cause else " ".join(lines)
    if reason in ("NoExtension", "NoExtensionBias"):
        return "no text can fulfil it"
    return reason or "llguidance gave no reason"
