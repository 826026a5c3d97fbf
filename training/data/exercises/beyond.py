"""Exercises in what lies just beyond what the chat checkpoint knew.

Names that it has never seen, letter by letter; quotients and sums in words, which it can do, beside larger sums, which
it cannot; other countries than those of which it knows the capital, and the capitals backwards; and what people say
first and last in the sentences of eight others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from topkapi.training.data.exercises import manners
from topkapi.training.data.exercises.exercise import (
    Draw,
    Exercise,
    Maker,
    assistant,
    number_is,
    says,
    user,
)
from topkapi.training.data.exercises.manners import (
    CAPITAL_ASKS,
    NO_IDEA,
    WORLD,
    Slots,
    drawn,
    exercise_of,
    intent_exercise,
    matching,
    slots_of,
)
from topkapi.training.data.exercises.openings import in_a_row, said_by
from topkapi.training.data.exercises.typed import typed, written
from topkapi.training.data.exercises.words import NAMES, THINGS, listed, number_word, plural, tables

_TABLE: dict[str, Any] = tables("beyond.yaml")
_HEARD: dict[str, list[str]] = {name: said.split("|") for name, said in tables("heard.yaml").items()}
_NAMES, _SURNAMES = [*NAMES, *listed(_TABLE["names"])], listed(_TABLE["surnames"])
_BEGUN, _GONE_ON, _ENDED = (listed(_TABLE[part]) for part in ("begun", "gone on", "ended"))
_CAPITALS: dict[str, str] = WORLD["capitals"]
_OTHERS: list[str] = _TABLE["other countries"]
_HEARD_OFTEN = {
    "hello": 6, "good part": 2, "how are you": 3, "thanks": 6, "goodbye": 4, "good night": 1, "who are you": 7,
    "human": 3, "machine": 2, "another": 2, "maker": 4, "age": 1, "place": 1, "abilities": 5, "praise": 1, "ok": 2,
}  # fmt: skip
_WORDS_OF_SIGNS = {"+": ("plus", "and", "+"), "-": ("minus", "less", "take away"), "x": ("times", "multiplied by", "x")}


def _name(draw: Draw) -> str:
    """A name, two times of three one that hardly anybody has."""
    if draw.chance(0.35):
        return draw.pick(_NAMES)
    middle = "".join(draw.pick(_GONE_ON) for _ in range(draw.pick((0, 0, 1, 1, 1, 2))))
    return draw.pick(_BEGUN) + middle + draw.pick(_ENDED)


def _telling(draw: Draw, name: str) -> str:
    """How somebody says this name; the name itself is spelled right."""
    called = _HEARD["a name"] if draw.chance(0.4) else _TABLE["called"]
    full = f"{name} {draw.pick(_SURNAMES)}" if draw.chance(0.1) else name
    slots = {**slots_of(draw), "name": [full]}
    return typed(written(draw.one_of(called), draw.random, slots), draw.random, decorate=False, slips=False)


def names(draw: Draw) -> Exercise:
    """A name is said again as it was told."""
    name = _name(draw)
    answer = drawn(manners.INTENTS["a name"]["answers"], draw.random, {"name": [name]})
    return Exercise(_telling(draw, name), answer, says(name), (name,), exact=True, family="names")


def names_asked_again(draw: Draw) -> Exercise:
    """A name is still known a turn later, or two."""
    name = _name(draw)
    before = [user(_telling(draw, name)), assistant(f"Nice to meet you, {name}! How can I help you?")]
    if draw.chance(0.4):
        between = intent_exercise(draw, draw.pick(("how are you", "machine", "abilities", "ok", "thanks")))
        before += [user(between.prompt), assistant(between.answer)]
    asked = typed(written(draw.one_of(_TABLE["asked again"]), draw.random, {}), draw.random, slips=False)
    return Exercise(asked, f"Your name is {name}.", says(name), (name,), exact=True, before=before, family="names")


def _asked(draw: Draw, wordings: Sequence[str], **slots: object) -> str:
    filled = {name: [str(value)] for name, value in slots.items()}
    return typed(written(draw.one_of(wordings), draw.random, filled), draw.random)


def quotients(draw: Draw) -> Exercise:
    """The table up to ten backwards."""
    found, divisor = draw.number(1, 10), draw.number(1, 10)
    things = plural(draw.pick(THINGS))
    prompt = _asked(draw, _TABLE["quotients"], a=found * divisor, b=divisor, things=things)
    answer = f"{found * divisor} / {divisor} = {found}."
    return Exercise(prompt, answer, number_is(found), (found * divisor, divisor), True, exact=True)


def sums_in_words(draw: Draw) -> Exercise:
    """Sums, differences, products, halves and doubles of numbers in words, or of one word."""
    kind = draw.pick(("+", "+", "-", "-", "x", "x", "half", "double"))
    if kind in ("half", "double"):
        number = draw.number(1, 20) if draw.chance(0.6) else draw.number(1, 49)
        given, found = (2 * number, number) if kind == "half" else (number, 2 * number)
        shown = number_word(given) if draw.chance(0.5) else given
        prompt = _asked(draw, _TABLE["halves" if kind == "half" else "doubles"], n=shown)
        answer = f"Half of {given} is {found}." if kind == "half" else f"Twice {given} is {found}."
        return Exercise(prompt, answer, number_is(found), (kind, given), exact=True)
    if kind == "x":
        first, second = draw.number(1, 10), draw.number(1, 10)
        found = first * second
    elif kind == "+":
        first, second = draw.number(0, 12), draw.number(0, 12)
        if draw.chance(0.3):
            first, second = draw.number(1, 80), draw.number(1, 19)
        found = first + second
    else:
        first = draw.number(2, 20) if draw.chance(0.7) else draw.number(20, 99)
        second = draw.number(0, min(first, 20))
        found = first - second
    sign = draw.pick(_WORDS_OF_SIGNS[kind])
    prompt = _asked(draw, _TABLE["sums in words"], a=number_word(first), b=number_word(second), sign=sign)
    # What older exercises hold out is held out here, too.
    about = (min(first, second), max(first, second)) if kind == "+" else (first, second)
    family = {"+": "addition", "-": "subtraction", "x": "multiplication"}[kind]
    answer = f"{first} {kind} {second} = {found}."
    return Exercise(prompt, answer, number_is(found), about, kind == "x", exact=True, family=family)


def too_large(draw: Draw) -> Exercise:
    """Products beyond the table, quotients beyond it and sums of three numbers, which are declined."""
    random = draw.random
    larger = random.randint(11, 30) if random.random() < 0.5 else random.randint(11, 99)
    other = random.randint(3, 10) if random.random() < 0.4 else random.randint(11, 99)
    divisor = random.randint(3, 30)
    divided = random.randint(101, 999)
    if random.random() < 0.5:
        divisor = random.randint(3, 9)
        # One that is not in the table.
        divided = random.choice([each for each in range(11, 100) if each % divisor or each > 10 * divisor])
    slots: Slots = {
        **slots_of(draw),
        "p": [str(larger)], "q": [str(other)], "u": [str(divided)], "v": [str(divisor)],
        "a": [str(random.randint(1, 30))], "b": [str(random.randint(1, 20))], "c": [str(random.randint(1, 20))],
        "thing": [draw.pick(THINGS)],
    }  # fmt: skip

    def make() -> str:
        return typed(written(random.choice(_TABLE["too large"]), random, slots), random)

    return exercise_of(draw, make, drawn(_TABLE["beyond answers"], random, slots), matching(NO_IDEA))


def other_capitals(draw: Draw) -> Exercise:
    """Capitals of countries of which it has learned none, and of such as there are not."""
    random = draw.random
    country = (
        draw.pick(_OTHERS) if draw.chance(0.7) else draw.pick(_TABLE["land begun"]) + draw.pick(_TABLE["land ended"])
    )

    def make() -> str:
        said = country.removeprefix("the ") if random.random() < 0.3 else country
        asks = random.choice(CAPITAL_ASKS)
        return typed(written(asks.replace("<t>", said), random, {}), random)

    answer = drawn(_TABLE["other capitals answers"], random, slots_of(draw))
    exercise = exercise_of(draw, make, answer, matching(NO_IDEA))
    return replace(exercise, about=(country,), family="capitals of others")


def capitals_backwards(draw: Draw) -> Exercise:
    """The country of a capital, and whether a city is the capital of a country."""
    country = draw.pick(list(_CAPITALS))
    city = _CAPITALS[country]
    if draw.chance(0.5):
        prompt = _asked(draw, _TABLE["backwards"], city=city)
        right = country.removeprefix("the ")
        return Exercise(
            prompt, f"{city} is the capital of {country}.", matching(rf"\b{right}\b", 16), (city,), True, exact=True
        )
    is_so = draw.chance(0.5)
    named = city if is_so else draw.pick([each for each in _CAPITALS.values() if each != city])
    prompt = _asked(draw, _TABLE["doubted"], city=named, t=country)
    said = "Yes" if is_so else "No"
    check = matching(rf"^{said}\b.*\b{city}\b", 16)
    return Exercise(
        prompt, f"{said}, the capital of {country} is {city}.", check, (country, named, "doubted"), True, exact=True
    )


MAKERS: dict[str, Maker] = {
    "as others said it": said_by(_HEARD, _HEARD_OFTEN),
    "others one after another": in_a_row(_HEARD),
    "names never heard": names,
    "names asked again": names_asked_again,
    "quotients": quotients,
    "sums in words": sums_in_words,
    "sums too large": too_large,
    "capitals of others": other_capitals,
    "capitals backwards": capitals_backwards,
}
