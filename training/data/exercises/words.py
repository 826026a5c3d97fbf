"""The word lists that exercises are made of, and the forms of words."""

from __future__ import annotations

from importlib import resources
from typing import Any

import yaml


def listed(words: str) -> list[str]:
    """Words with white space between them, as a list."""
    return words.split()


def paired(pairs: str) -> dict[str, str]:
    """`first:second` pairs with white space between them."""
    return dict(pair.split(":") for pair in listed(pairs))


def text_of(name: str) -> str:
    """A text file that lies beside this module."""
    return (resources.files(__package__) / name).read_text("utf-8")


def paragraphs(name: str) -> list[list[str]]:
    """The lines of each paragraph of a text file, the first one, a comment, left out."""
    return [paragraph.split("\n") for paragraph in text_of(name).strip().split("\n\n")[1:]]


def tables(name: str) -> dict[str, Any]:
    """The tables of a YAML file."""
    found: dict[str, Any] = yaml.safe_load(text_of(name))
    return found


_TABLES = tables("words.yaml")

CATEGORIES: dict[str, list[str]] = {name: listed(items) for name, items in _TABLES["categories"].items()}
"""Things by what they are; the name is one of them in the singular."""

# What belongs to two of them says nothing about either.
_SEEN = [item for items in CATEGORIES.values() for item in items]
CLEAR = {name: [item for item in items if _SEEN.count(item) == 1] for name, items in CATEGORIES.items()}
"""`CATEGORIES` without what belongs to two of them."""

PEOPLE = listed(_TABLES["people"])
THINGS = [item for name in ("fruit", "vegetable", "tool", "garment", "instrument") for item in CLEAR[name]]
THINGS += listed(_TABLES["objects"])
"""What one can have, buy and lose."""
_BEINGS = [item for name in ("animal", "bird", "insect", "vehicle", "job") for item in CLEAR[name]]
NOUNS = [*THINGS, *_BEINGS, *PEOPLE, *listed(_TABLES["places"]), *listed(_TABLES["others"])]
"""Things and beings that can be counted."""

IRREGULAR_PLURALS = paired(_TABLES["irregular_plurals"])
REGULAR_VERBS = listed(_TABLES["regular_verbs"])
_FORMS = [each.split(":") for each in listed(_TABLES["irregular_verbs"])]
IRREGULAR_VERBS = {base: (past, participle) for base, past, participle in _FORMS}
"""Base form to past tense and past participle."""
ACTIONS = listed(_TABLES["actions"])
"""Past tenses of what one can do to another."""
ACTION_PARTICIPLES = paired(_TABLES["action_participles"])
"""The participles of those in which they differ."""

OPPOSITES = [(first, second) for first, second in (pair.split(":") for pair in listed(_TABLES["opposites"]))]
"""Pairs that hold both ways."""
SYNONYMS = paired(_TABLES["synonyms"])
ADJECTIVES = {
    base: (comparative, superlative)
    for base, comparative, superlative in (each.split(":") for each in listed(_TABLES["adjectives"]))
}
"""Adjective to comparative and superlative."""

WOMEN, MEN, CITIES = (listed(_TABLES[name]) for name in ("women", "men", "cities"))
NAMES = WOMEN + MEN
CAPITALS: dict[str, str] = _TABLES["capitals"]
YOUNG, SOUNDS, COLOURS_OF = (paired(_TABLES[name]) for name in ("young", "sounds", "colours_of"))
DAYS, MONTHS, ORDINALS = (listed(_TABLES[name]) for name in ("days", "months", "ordinals"))
_NUMBERS, _TENS = listed(_TABLES["numbers"]), listed(_TABLES["tens"])


def number_word(number: int) -> str:
    """0 to 99 in words."""
    if number < 20:
        return _NUMBERS[number]
    tens = _TENS[number // 10 - 2]
    return tens if number % 10 == 0 else f"{tens}-{_NUMBERS[number % 10]}"


def plural(noun: str) -> str:
    """The plural of a noun."""
    if noun in IRREGULAR_PLURALS:
        return IRREGULAR_PLURALS[noun]
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


def past(verb: str) -> str:
    """The past tense of a verb in its base form."""
    if verb in IRREGULAR_VERBS:
        return IRREGULAR_VERBS[verb][0]
    if verb.endswith("e"):
        return verb + "d"
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return verb[:-1] + "ied"
    return verb + "ed"


def third_person(verb: str) -> str:
    """What she does: `walks`, `goes`, `carries`."""
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return verb[:-1] + "ies"
    return verb + ("es" if verb.endswith(("s", "x", "ch", "sh", "o")) else "s")


def a(noun: str) -> str:
    """The noun with `a` or `an`."""
    return f"{'an' if noun[0].lower() in 'aeio' or noun.startswith(('umb', 'unc')) else 'a'} {noun}"
