"""llama.cpp's grammars (GBNF) in the notation that structured output reads."""

from __future__ import annotations

import re

from llguidance.gbnf_to_lark import gbnf_to_lark

from topkapi.model.decoding.table import LONGEST_STRUCTURE
from topkapi.model.errors import InvalidRequest

# It begins on one line: over line breaks, it would look through the rest of a text from every line of it.
_RULE = re.compile(r"^[ \t]*[A-Za-z0-9_-]+\s*::=", re.MULTILINE)


def is_gbnf(grammar: object) -> bool:
    """Whether a grammar has rules as GBNF writes them, which Lark never does."""
    return isinstance(grammar, str) and len(grammar) <= LONGEST_STRUCTURE and _RULE.search(grammar) is not None


def lark_of(grammar: str | None, field: str = "grammar") -> str | None:
    """A GBNF grammar in Lark's notation. Raises `InvalidRequest` naming `field` where it is no such grammar."""
    if not grammar or grammar.startswith("%llguidance"):
        return grammar or None
    if len(grammar) > LONGEST_STRUCTURE:
        message = f"{field} has {len(grammar):,} characters, and {LONGEST_STRUCTURE:,} is the most"
        raise InvalidRequest(message, field=field, hint="make it shorter")
    try:
        return gbnf_to_lark(grammar)
    except RecursionError:
        raise InvalidRequest(f"{field} is nested too deeply", field=field, hint="use rules of its own") from None
    except Exception as error:  # the converter raises bare Exception for what it cannot read
        reason = str(error).replace("\n", " ")
        hint = "send GBNF with a rule named root, or Lark after a first line %llguidance {}"
        raise InvalidRequest(f"{field} is not valid GBNF: {reason}", field=field, hint=hint) from None
