"""Exercises in jokes and verses, in what is said after an answer, and older exercises as people type them."""

from __future__ import annotations

from random import Random
from typing import Any

from topkapi.training.data.exercises import (
    calendar,
    grammar,
    letters,
    manners,
    meaning,
    numbers,
    reading,
    school,
    writing,
)
from topkapi.training.data.exercises.exercise import Draw, Exercise, Maker, Message, assistant, user
from topkapi.training.data.exercises.manners import (
    INTENTS,
    Slots,
    declined,
    drawn,
    exercise_of,
    intent_exercise,
    matching,
    slots_of,
    verse_for,
)
from topkapi.training.data.exercises.typed import typed, written
from topkapi.training.data.exercises.words import OPPOSITES, tables

_ASKS: dict[str, Any] = tables("followups.yaml")
JOKES: list[dict[str, str]] = _ASKS["jokes"]
"""The jokes that it knows: what is asked, the punch line, and why one laughs."""
_TOLD = [f"{joke['asked']} {joke['punch']}" for joke in JOKES]
_SCARECROW = r"(outstanding|gummy|two tired)"
_NO_MORE = "I only know three jokes, and you have heard them all. Would you like a verse?"
_BEFORE_VERSE = ("Here is a verse that I know:", "Here is an old verse:")
_NOTHING_ELSE = {"size", "maker", "cannot"}


def _say(name: str, random: Random, slots: Slots) -> str:
    return typed(written(random.choice(_ASKS[name]), random, slots), random)


def jokes(draw: Draw) -> Exercise:
    """One of three."""
    random, slots = draw.random, slots_of(draw)
    asks, plain = "joke asks", _ASKS["joke plain"]
    return exercise_of(draw, lambda: _say(asks, random, slots), draw.pick(_TOLD), matching(_SCARECROW), plain=plain)


def verses(draw: Draw) -> Exercise:
    """An old verse, for it cannot write a new one."""
    random, slots = draw.random, slots_of(draw)
    checks: list[dict[str, Any]] = [{"kind": "matches", "pattern": r"verse.*\n.*\n."}]
    exercise = exercise_of(draw, lambda: _say("verse asks", random, slots), "", checks, plain=_ASKS["verse plain"])
    exercise.answer = f"{draw.pick(_BEFORE_VERSE)}\n{verse_for(exercise.prompt, random)}"
    return exercise


def follow_ups(draw: Draw) -> Exercise:
    """What comes after an answer of its own."""
    return draw.pick(_FOLLOWING)(draw)


def _after(exercise: Exercise) -> list[Message]:
    return [*exercise.before, user(exercise.prompt), assistant(exercise.answer)]


def _following(draw: Draw, before: list[Message], asked: str, answer: str, right: str) -> Exercise:
    random, slots = draw.random, slots_of(draw)
    return exercise_of(draw, lambda: _say(asked, random, slots), answer, matching(right), before=before)


def _another_joke(draw: Draw) -> Exercise:
    before = _after(jokes(draw))
    left = [joke for joke in _TOLD if joke != before[-1]["content"]]
    draw.random.shuffle(left)
    for joke in left[: draw.number(0, 2)]:
        before += [user(_say("another joke", draw.random, {})), assistant(joke)]
        left.remove(joke)
    answer, right = (left[0], _SCARECROW) if left else (_NO_MORE, "three jokes")
    return _following(draw, before, "another joke", answer, right)


def _joke_explained(draw: Draw) -> Exercise:
    joke = draw.pick(JOKES)
    asked = _say("joke asks", draw.random, slots_of(draw))
    before = [user(asked), assistant(f"{joke['asked']} {joke['punch']}")]
    return _following(draw, before, "do not get it", f"{joke['why']} It is only a small joke.", "small joke")


def _another_verse(draw: Draw) -> Exercise:
    before = _after(verses(draw))
    told = before[-1]["content"]
    other = draw.pick([lines for _, lines in manners.VERSES if lines not in told])
    checks: list[dict[str, Any]] = [{"kind": "matches", "pattern": r"verse.*\n.*\n."}]
    random = draw.random
    return exercise_of(
        draw, lambda: _say("another verse", random, {}), f"Here is another verse:\n{other}", checks, before=before
    )


def _told_of_itself(draw: Draw) -> Exercise:
    name = draw.pick(("who are you", "machine", "another", "human"))
    before = _after(intent_exercise(draw, name))
    answer = "I cannot prove it, but it is so: I am Topkapi, a small language model."
    return _following(draw, before, "prove", answer, "cannot prove")


def _what_is_that(draw: Draw) -> Exercise:
    before = _after(intent_exercise(draw, draw.pick(("who are you", "human", "machine"))))
    fact = next(each for each in manners.WORLD["facts"] if "which word comes next" in each["answer"])
    random = draw.random

    def make() -> str:
        return typed(written(random.choice(fact["asks"]), random, {}), random)

    return exercise_of(draw, make, fact["answer"], matching("which word comes next"), before=before)


def _sure(draw: Draw) -> Exercise:
    which = draw.pick((manners.casual_sums, manners.capitals, manners.small_facts))
    before = _after(which(draw))
    said = before[-1]["content"]
    return _following(draw, before, "are you sure", f"I think so: {said} But I do make mistakes.", "I think so")


def _there(draw: Draw) -> Exercise:
    before = _after(manners.capitals(draw))
    offer = draw.pick(manners.slots_of(draw)["offer"])
    return _following(
        draw, before, "people there", f"I do not know that: I only know the names of capitals. {offer}", "do not know"
    )


def _of_another(draw: Draw) -> Exercise:
    """The same question once more, of another."""
    random = draw.random
    and_of = _ASKS["and of"]
    if draw.chance(0.6):
        before, again = _after(manners.capitals(draw)), manners.capitals(draw)
        other = again.answer.removeprefix("The capital of ").split(" is ")[0]
        text = written(and_of.replace("<x>", other), random, {})
        return exercise_of(draw, lambda: typed(text, random), again.answer, again.checks, before=before)
    word, opposite = draw.pick(OPPOSITES)
    first, second = draw.pick([pair for pair in OPPOSITES if pair[0] != word])
    ask = typed(
        f"{draw.pick(('what is the opposite of', 'opposite of', 'the opposite of'))} {first}", random, slips=False
    )
    before = [user(ask), assistant(f"The opposite of {first} is {second}.")]
    text = written(and_of.replace("<x>", word), random, {})
    answer = f"The opposite of {word} is {opposite}."
    return exercise_of(draw, lambda: typed(text, random, slips=False), answer, matching(opposite, 16), before=before)


def _why_not(draw: Draw) -> Exercise:
    before = _after(declined(draw))
    offer = draw.pick(manners.slots_of(draw)["offer"])
    answer = f"I am a very small program and cannot look anything up. {offer}"
    return _following(draw, before, "why not", answer, "very small program")


def _what_instead(draw: Draw) -> Exercise:
    before = _after(declined(draw))
    answer = drawn(INTENTS["abilities"]["answers"], draw.random, slots_of(draw))
    return _following(draw, before, "what instead", answer, r"\b(i can|ask me)\b")


def _polite(draw: Draw) -> Exercise:
    """Thanks, goodbyes and laughter after any answer."""
    makers = (jokes, verses, manners.capitals, manners.small_facts, manners.casual_sums, declined)
    before = _after(draw.pick(makers)(draw))
    joke = before[-1]["content"] in _TOLD
    name = draw.pick(("thanks", "thanks", "goodbye", "praise", "ok", *(("laughing",) * 4 if joke else ())))
    polite = intent_exercise(draw, name)
    return exercise_of(draw, lambda: polite.prompt, polite.answer, polite.checks, before=before)


def _well_too(draw: Draw) -> Exercise:
    first = intent_exercise(draw, draw.pick(("hello", "good part", "how are you")))
    return _following(draw, _after(first), "after well", "I am well, thank you. How can I help you?", r"\bwell\b")


def _then(draw: Draw) -> Exercise:
    """What it has offered is asked for."""
    before = _after(intent_exercise(draw, draw.pick(("help", "abilities", "bored", "cannot"))))
    which = draw.number(0, 2)
    if which == 0:
        return _following(
            draw, before, "do it then", "Gladly! Which sum? Give me two small numbers, such as 7 + 5.", "which sum"
        )
    if which == 1:
        return _following(draw, before, "tell it then", draw.pick(_TOLD), _SCARECROW)
    verse = f"{draw.pick(_BEFORE_VERSE)}\n{verse_for('', draw.random)}"
    return _following(draw, before, "say verse then", verse, r"verse")


def _added(draw: Draw) -> Exercise:
    """A number added to a sum, or taken from it."""
    random = draw.random
    first = manners.casual_sums(draw)
    value = int(first.checks[0]["value"])
    number = draw.number(1, 9)
    plus = draw.chance(0.7) or value < number
    found = value + number if plus else value - number
    verb = (
        "{add|plus|now add|and add|and plus|then add|ok add|please add}"
        if plus
        else "{minus|take away|subtract|now subtract|and minus}"
    )
    text = written(
        f"{{great |ok |now |and |}}{verb} {number}{{ to that| to it||}}" if plus else f"{{ok |now |}}{verb} {number}",
        random,
        {},
    )
    answer = f"{value} {'+' if plus else '-'} {number} = {found}."
    checks: list[dict[str, Any]] = [{"kind": "number", "value": found}]
    return exercise_of(draw, lambda: typed(text, random, slips=False), answer, checks, before=_after(first))


_FOLLOWING: tuple[Maker, ...] = (
    _another_joke, _joke_explained, _another_verse, _told_of_itself, _what_is_that, _sure, _there, _of_another,
    _of_another, _why_not, _what_instead, _polite, _polite, _polite, _well_too, _then, _then, _added,
)  # fmt: skip

_OLDER = {
    kind: maker
    for area in (calendar, grammar, letters, meaning, numbers, reading, school, writing)
    for kind, maker in area.MAKERS.items()
}
_AS_TYPED = (
    "opposites", "opposites", "plural", "plural", "past tense", "sorting", "sorting", "sorting", "days", "months",
    "today and tomorrow", "units of time", "spelling", "counting", "short stories", "a or an", "comparing numbers",
    "doubling and halving", "number stories", "sentences with a word", "synonyms", "definitions", "naming",
    "even or odd", "multiplication", "subtraction", "reading: places", "reading: people",
)  # fmt: skip


def as_typed(draw: Draw) -> Exercise:
    """An older exercise as people type it; held out where it was."""
    kind = draw.pick(_AS_TYPED)
    exercise: Exercise = _OLDER[kind](draw)
    text = exercise.prompt
    text = text.replace("What is", "{What is|whats|what's|tell me}", 1) if draw.chance(0.3) else text
    if kind == "sorting" and (asks := _ASKS["sort asks"]) and draw.chance(0.6):
        asked, items = exercise.prompt.split(": ", 1)
        if "largest to" not in asked:
            what = "numbers" if items[0].isdigit() else "words"
            said = typed(written(draw.pick(asks).replace("<what>", what), draw.random, {}), draw.random, decorate=False)
            exercise.prompt = f"{said.rstrip('.?!: ')}: {items}"
    elif not exercise.exact and "{" not in exercise.prompt:
        exercise.prompt = typed(written(text, draw.random, {}).rstrip("?."), draw.random, slips=False)
    exercise.family, exercise.exact = exercise.family or kind, True
    return exercise


MAKERS: dict[str, Maker] = {
    "jokes": jokes,
    "verses": verses,
    "follow-ups": follow_ups,
    "older ones as typed": as_typed,
}
