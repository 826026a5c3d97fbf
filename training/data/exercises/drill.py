"""Exercises in what is still wrong after manners.

More wordings of how people begin, scorn and praise told apart, typing in haste, what comes in one breath with a
greeting, differences, and problems of one step beside those of several. Then what is still wrong after these:
differences that are taken for others, and whole phrases of other languages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from topkapi.training.data.exercises import followups, manners
from topkapi.training.data.exercises.exercise import Check, Draw, Exercise, Maker
from topkapi.training.data.exercises.manners import (
    NO_IDEA,
    TOPICS,
    Slots,
    drawn,
    exercise_of,
    intent_exercise,
    matching,
    only_english,
    slots_of,
)
from topkapi.training.data.exercises.typed import hasty, typed, written
from topkapi.training.data.exercises.words import MEN, THINGS, WOMEN, plural, tables

_TABLE: dict[str, Any] = tables("drill.yaml")
_MORE: dict[str, list[str]] = _TABLE["more of"]
_JUDGED: dict[str, tuple[str, list[str]]] = {
    "insults": ("scorn", _TABLE["scorn only"]),
    "praise": ("praised", _TABLE["praise only"]),
}

_FIRST = ("hello", "hello", "hello", "hello", "good part", "how are you", "how are you", "a name")
_LAST = ("thanks", "thanks", "thanks", "goodbye", "goodbye", "good night")
_SELF = (
    "who are you", "who are you", "who are you", "human", "machine", "another", "maker", "size", "abilities",
    "abilities", "favourites", "sad",
)  # fmt: skip


def _meaning(*names: str) -> Maker:
    """One of what manners have wordings for."""

    def make(draw: Draw) -> Exercise:
        return intent_exercise(draw, draw.pick(names))

    return make


# What is asked after a greeting, or typed in haste.
_ASKED: tuple[Maker, ...] = (
    manners.casual_sums, manners.capitals, manners.small_facts, manners.declined, manners.declined, followups.jokes,
    followups.verses, _meaning("who are you", "abilities", "help", "human", "maker", "another", "age", "machine"),
)  # fmt: skip
_TYPED: tuple[Maker, ...] = (
    *_ASKED,
    _meaning("hello", "good part", "how are you", "thanks", "thanks", "goodbye", "good night"),
    _meaning("thanks", "who are you", "who are you", "abilities", "help"),
)
_BETWEEN = (
    "{|||i have a question, |one thing: |tell me, |please, |i am new here. |how are you? |nice to meet you. "
    "|quick question: }"
)


def _slots_of(draw: Draw) -> Slots:
    return {**slots_of(draw), **_TABLE["slots"]}


def _more_of(names: Sequence[str]) -> Maker:
    def make(draw: Draw) -> Exercise:
        name = draw.pick(names)
        return intent_exercise(draw, name, _slots_of(draw), asks=_MORE[name])

    return make


def scorn_and_praise(draw: Draw) -> Exercise:
    """Both in the same sentences, so that the word decides."""
    name = draw.pick(("insults", "insults", "praise"))
    judged, only = _JUDGED[name]
    slots = {**_slots_of(draw), "judged": _TABLE["slots"][judged]}
    return intent_exercise(draw, name, slots, asks=only if draw.chance(0.25) else _TABLE["scorn or praise"])


def after_a_greeting(draw: Draw) -> Exercise:
    """A question in one breath with a greeting: the question is answered."""
    exercise = draw.pick(_ASKED)(draw)
    hail = typed(
        written("<hail>{| <whom>}", draw.random, _slots_of(draw)), draw.random, decorate=False, slips=False
    ).rstrip("?")
    between = ", " if hail[-1].isalpha() and draw.chance(0.7) else " "
    prompt = f"{hail}{between}{written(_BETWEEN, draw.random, {})} {exercise.prompt}"
    exercise.prompt = prompt.replace("  ", " ")
    return exercise


def in_haste(draw: Draw) -> Exercise:
    """What people begin with, by fingers that slip more than once."""
    exercise = draw.pick(_TYPED)(draw)
    exercise.prompt = hasty(exercise.prompt, draw.random)
    return exercise


def differences(draw: Draw) -> Exercise:
    """A number from a larger one, half of the time borrowing. What older exercises hold out is held out here, too."""
    if draw.chance(0.5):
        tens = draw.number(2, 9)
        ones = draw.number(0, 8)
        above = 0 if draw.chance(0.25) else draw.number(0, tens - 1)
        first, second = 10 * tens + ones, 10 * above + draw.number(ones + 1, 9)
    else:
        first = draw.number(2, 20) if draw.chance(0.4) else draw.number(10, 99)
        second = draw.number(0, first)
    return _difference(draw, first, second)


def close_differences(draw: Draw) -> Exercise:
    """Those that are taken for others: of equal ones (71 - 21, where nothing is borrowed), of neighbours (38 - 31, of
    which nothing but ones is left), of a number and itself, and small ones."""
    kind = draw.pick(("equal ones", "equal ones", "near", "near", "near", "small", "the same"))
    first = draw.number(2, 19) if kind == "small" else draw.number(10, 99)
    if kind == "equal ones":
        second = first - 10 * draw.number(1, first // 10)
    else:
        second = {"near": first - draw.number(1, 9), "small": draw.number(0, first), "the same": first}[kind]
    return _difference(draw, first, second)


def _difference(draw: Draw, first: int, second: int) -> Exercise:
    slots = {"a": [str(first)], "b": [str(second)]}
    prompt = typed(written(draw.one_of(_TABLE["differences"]), draw.random, slots), draw.random)
    left = first - second
    check: list[Check] = [{"kind": "number", "value": left}]
    return Exercise(prompt, f"{first} - {second} = {left}.", check, (first, second), exact=True, family="subtraction")


def products(draw: Draw) -> Exercise:
    """The table up to ten as it is asked for at school and in shops; what older exercises hold out is held out, too."""
    first, second = draw.number(1, 10), draw.number(1, 10)
    slots = {**slots_of(draw), "a": [str(first)], "b": [str(second)], "things": [plural(draw.pick(THINGS))]}
    prompt = typed(written(draw.one_of(_TABLE["products"]), draw.random, slots), draw.random)
    check: list[Check] = [{"kind": "number", "value": first * second}]
    answer = f"{first} x {second} = {first * second}."
    return Exercise(prompt, answer, check, (first, second), by_heart=True, exact=True, family="multiplication")


def _told(draw: Draw, first: int, second: int) -> Slots:
    """What is filled into a problem: its numbers, somebody with a pronoun, somebody else, and things."""
    woman = draw.chance(0.5)
    return {
        **slots_of(draw),
        "a": [str(first)],
        "b": [str(second)],
        "c": [str(draw.number(2, 9))],
        "things": [plural(draw.pick(THINGS))],
        "name": [draw.pick(WOMEN if woman else MEN)],
        "other": [draw.pick(MEN if woman else WOMEN)],
        "she": ["she" if woman else "he"],
        "pos": ["her" if woman else "his"],
    }


def problems(draw: Draw) -> Exercise:
    """Sums as stories in many wordings. What older exercises hold out is held out here, too."""
    random, more = draw.random, draw.chance(0.5)
    first = draw.number(2, 20) if draw.chance(0.7) else draw.number(20, 60)
    second = draw.number(1, 20) if more else draw.number(1, first - 1)
    asked = written(draw.one_of(_TABLE["gained" if more else "lost"]), random, _told(draw, first, second))
    shown, found = (f"{first} + {second}", first + second) if more else (f"{first} - {second}", first - second)
    check: list[Check] = [{"kind": "number", "value": found}]
    answer = f"{shown} = {found}. The answer is {found}."
    return Exercise(typed(asked, random), answer, check, (shown,), exact=True, family="number stories")


def problems_of_several_steps(draw: Draw) -> Exercise:
    """What looks like those, and is too hard."""
    random, slots = draw.random, _told(draw, draw.number(2, 60), draw.number(2, 20))

    def make() -> str:
        return typed(written(random.choice(_TABLE["several"]), random, slots), random)

    return exercise_of(draw, make, drawn(TOPICS["problems"]["answers"], random, slots), matching(NO_IDEA))


def phrases_of_languages(draw: Draw) -> Exercise:
    """What people begin with in another language, in whole sentences."""
    random = draw.random
    slots: Slots = {**slots_of(draw), "person": slots_of(draw)["name"]}

    def make() -> str:
        said = written(random.choice(_TABLE["phrases"]), random, slots)
        return typed(said, random, decorate=False, slips=False)

    return exercise_of(draw, make, only_english(draw), matching("only know english"))


MAKERS: dict[str, Maker] = {
    "first words, more": _more_of(_FIRST),
    "last words, more": _more_of(_LAST),
    "who it is, more": _more_of(_SELF),
    "scorn and praise": scorn_and_praise,
    "after a greeting": after_a_greeting,
    "typed in haste": in_haste,
    "differences": differences,
    "problems of one step": problems,
    "problems of several steps": problems_of_several_steps,
}
AFTERWARDS: dict[str, Maker] = {
    "close differences": close_differences,
    "phrases of other languages": phrases_of_languages,
}
"""What the drill itself left wrong; kinds of its own, so that what was drawn for it can be drawn again."""
SAID: dict[str, Maker] = {"products in words": products}
"""What was still wrong in the end."""
