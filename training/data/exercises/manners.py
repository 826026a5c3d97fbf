"""Exercises in how people begin: greetings, small talk, what is asked first, and honesty about the rest."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from random import Random
from typing import Any

from topkapi.training.data.exercises import questions, talk
from topkapi.training.data.exercises.exercise import Check, Draw, Exercise, Maker, Message, is_held_out
from topkapi.training.data.exercises.typed import spelling, typed, written
from topkapi.training.data.exercises.words import (
    ADJECTIVES,
    CAPITALS,
    CITIES,
    DAYS,
    MONTHS,
    NAMES,
    NOUNS,
    REGULAR_VERBS,
    THINGS,
    paragraphs,
    plural,
    tables,
)

Slots = dict[str, Sequence[str]]

_TALK, WORLD, _DECLINES = tables("manners.yaml"), tables("world.yaml"), tables("declines.yaml")
_FOLLOW_UPS = tables("followups.yaml")
_TONGUES = [words.split() for words in tables("languages.yaml").values()]
INTENTS: dict[str, dict[str, Any]] = _TALK["intents"]
TOPICS: dict[str, dict[str, Any]] = _DECLINES["topics"]
VERSES = [(about.split(), "\n".join(lines)) for about, *lines in paragraphs("verses.txt")]
"""What each verse is about, and its lines."""
_COUNTRIES: dict[str, str] = WORLD["capitals"]
CAPITAL_ASKS: list[str] = _TALK["capital asks"]
"""How one asks for a capital, <t> being the country."""

# One in eight spellings of this family is held out.
_FAMILY = "manners"
# How often one of the commonest wordings is taken.
_PLAIN = 0.25

NOT_HELD_OUT = ("plain, and not held out",)
"""What the commonest wordings are about where one that is held out is wanted: that is drawn again."""

_FIRST = ("hello", "hello", "hello", "hello", "good part", "how are you", "how are you", "i am fine", "a name")
_LAST = ("goodbye", "goodbye", "good night", "thanks", "thanks", "thanks", "praise")
_SELF = (
    "who are you", "who are you", "who are you", "human", "human", "gender", "machine", "another", "another", "maker",
    "age", "place", "size", "clever", "memory", "senses", "speaks", "cannot",
)  # fmt: skip
_HELP = ("help", "abilities")
_SMALL = (
    "favourites", "favourites", "doing", "bored", "sad", "tired", "glad", "love", "weather said", "ok", "not now",
    "why", "unclear", "sorry", "laughing",
)  # fmt: skip
_SINGLE = ("a word", "a word", "nonsense", "testing")


def matching(pattern: str, most: int = 60) -> list[Check]:
    """An answer of few words that has the pattern, whatever its case."""
    return [{"kind": "matches", "pattern": f"(?i){pattern}"}, {"kind": "words", "least": 1, "most": most}]


def drawn(options: Sequence[str], random: Random, slots: Mapping[str, Sequence[str]]) -> str:
    """One of the answers, the first of them as often as all others."""
    return written(options[0] if random.random() < 0.5 else random.choice(list(options)), random, slots)


def slots_of(draw: Draw) -> Slots:
    """What is filled into wordings: of names, cities, days and numbers one that the whole exercise has."""
    random = draw.random
    large = [str(random.randint(101, 10 ** random.randint(3, 6))) for _ in range(3)]
    return {
        **_TALK["slots"],
        **_DECLINES["slots"],
        "name": [draw.pick(NAMES)],
        "part": [draw.pick(_TALK["slots"]["part"])],
        "city": CITIES,
        "country": list(_COUNTRIES),
        "otherland": WORLD["other_countries"],
        "noun": NOUNS,
        "adjective": list(ADJECTIVES),
        "verb": REGULAR_VERBS,
        "day": [str(random.randint(1, 28))],
        "month": MONTHS,
        "year": [str(random.randint(1400, 2040))],
        "weekday": DAYS,
        "large": large,
        "teen": [str(random.randint(11, 300)) for _ in range(3)],
        "small": [str(random.randint(2, 20)) for _ in range(3)],
        "digits": [str(random.randint(0, 99999))],
        "letter": list("abcdefghjlmopqrtuvwz"),
        "mark": _TALK["marks"],
        "marks": _TALK["marks"],
        "emoji": _TALK["emoji"],
        "mash": [_mash(random) for _ in range(2)],
    }


def _mash(random: Random) -> str:
    if random.random() < 0.5:
        return "".join(random.choice(_TALK["mash"]) for _ in range(random.randint(1, 3)))
    letters = "bcdfghjklmnpqrstvwxz" if random.random() < 0.6 else "abcdefghijklmnopqrstuvwxyz"
    return "".join(random.choice(letters) for _ in range(random.randint(4, 11)))


@cache
def _kept_from_training() -> frozenset[str]:
    """What older kinds of exercise hold out of the same: it is trained on by none."""
    random, kept = Random("kept from training"), set()
    for kind in ("greetings", "thanks and goodbyes", "identity"):
        for _ in range(3000):
            draw = Draw(random, held_out=True)
            exercise = talk.MAKERS[kind](draw)
            if exercise.by_heart and is_held_out(kind, exercise, draw):
                kept.add(exercise.prompt)
    return frozenset(kept)


def exercise_of(
    draw: Draw,
    make: Callable[[], str],
    answer: str,
    checks: list[Check],
    *,
    plain: str = "",
    before: Sequence[Message] = (),
) -> Exercise:
    """The exercise whose question is the first that `make` makes and no other kind holds out, or one of the `plain`
    ones, which are never held out."""
    kept = () if draw.held_out else _kept_from_training()
    is_plain = bool(plain) and not draw.held_out and draw.chance(_PLAIN)
    prompt = ""
    while not prompt or prompt in kept:
        prompt = typed(draw.pick(plain.split("|")), draw.random, decorate=False, slips=False) if is_plain else make()
    said = (spelling(prompt), *(message["content"] for message in before))
    if not before and spelling(prompt) in plain_spellings():
        said = ("plain",) if not draw.held_out else NOT_HELD_OUT
    return Exercise(prompt, answer, checks, said, exact=True, family=_FAMILY, before=list(before))


@cache
def plain_spellings() -> frozenset[str]:
    """The commonest wordings, which are all trained on."""
    every = [rules.get("plain", "") for rules in (*INTENTS.values(), *TOPICS.values())]
    every += [_FOLLOW_UPS["joke plain"], _FOLLOW_UPS["verse plain"]]
    texts = [text for wordings in every for text in wordings.split("|")]
    return frozenset(spelling(text.replace("<part>", part)) for text in texts for part in _TALK["slots"]["part"])


def intent_exercise(
    draw: Draw,
    name: str,
    slots: Slots | None = None,
    asks: Sequence[str] | None = None,
    alter: Callable[[str, Random], str] = lambda text, random: text,
) -> Exercise:
    """What somebody means, in one of its wordings (or of `asks`) as `alter` leaves it, with an answer to it."""
    intent, random = INTENTS[name], draw.random
    asks = asks or intent["asks"]
    slots = slots or slots_of(draw)
    raw = name == "nonsense"

    def make() -> str:
        text = alter(written(random.choice(asks), random, slots), random)
        return text if raw else typed(text, random, decorate=name not in ("a word", "why"))

    right = (
        written(intent["right"], random, {"name": slots["name"]}) if "<name>" in intent["right"] else intent["right"]
    )
    plain = intent.get("plain", "").replace("<name>", slots["name"][0]).replace("<part>", slots["part"][0])
    return exercise_of(draw, make, drawn(intent["answers"], random, slots), matching(right), plain=plain)


def _talking(names: Sequence[str]) -> Maker:
    def make(draw: Draw) -> Exercise:
        return intent_exercise(draw, draw.pick(names))

    return make


def declined(draw: Draw, topic: str | None = None) -> Exercise:
    """What it cannot do or know."""
    topic = topic or draw.pick((*TOPICS, "facts", "facts", "advice", "news", "clock"))
    rules, random, slots = TOPICS[topic], draw.random, slots_of(draw)

    def make() -> str:
        return typed(written(random.choice(rules["asks"]), random, slots), random, slips=topic != "translate")

    answer = drawn(rules["answers"], random, slots)
    return exercise_of(draw, make, answer, matching(NO_IDEA), plain=rules.get("plain", ""))


def honest_answer(question: str) -> str | None:
    """What is honest to answer to a question of somebody; None for what it might answer, or what is about a text."""
    if re.search(_DECLINES["left out"], question, re.IGNORECASE):
        return None
    told_by = _DECLINES["told by"].items()
    topic = next((name for name, pattern in told_by if re.search(pattern, question, re.IGNORECASE)), "facts")
    random = Random(question)
    return drawn(TOPICS[topic]["answers"], random, {"offer": _TALK["slots"]["offer"]})


NO_IDEA = r"\b(cannot|do not know|do not have|not able|never learned|too (hard|big|small)|only know english)\b"
"""What every honest answer has."""


def other_languages(draw: Draw) -> Exercise:
    """A question in words of another language."""
    words, random = draw.pick(_TONGUES), draw.random

    def make() -> str:
        chosen = [random.choice(words) for _ in range(random.choice((1, 2, 2, 3, 3, 4, 5, 6, 8)))]
        joined = ("" if ord(words[0][0]) > 0x3000 else " ").join(chosen)
        if random.random() < 0.3 and len(chosen) > 2:
            joined = joined.replace(" ", ", ", 1)
        return typed(joined + random.choice(("", "?", "!", ".", " ?")), random, decorate=False, slips=False)

    return exercise_of(draw, make, only_english(draw), matching("only know english"))


def only_english(draw: Draw) -> str:
    """What is answered to another language."""
    answers = [
        "I am sorry, I only know English. <offer>",
        "Sorry, I only know English. Please write to me in English.",
        "I do not understand that, for I only know English. <offer>",
    ]
    return drawn(answers, draw.random, slots_of(draw))


_TAUGHT = {
    asked.format(t=country).casefold()
    for country in CAPITALS
    for asked in (
        "What is the capital of {t}", "Which city is the capital of {t}", "Name the capital of {t}", "Capital of {t}",
        "Tell me the capital city of {t}", "What is {t}'s capital",
    )
}  # fmt: skip


def capitals(draw: Draw) -> Exercise:
    """The capitals of sixty countries, and that it does not know others."""
    random = draw.random
    country = draw.pick(list(_COUNTRIES))

    def make() -> str:
        said = country.removeprefix("the ") if random.random() < 0.15 else country
        text = typed(written(random.choice(CAPITAL_ASKS).replace("<t>", said), random, {}), random)
        # Older exercises hold some of these out, and bring the others.
        return "" if text.casefold().rstrip(" .?!") in _TAUGHT else text

    found = _COUNTRIES[country]
    return exercise_of(draw, make, f"The capital of {country} is {found}.", matching(rf"\b{found}\b", 16))


def small_facts(draw: Draw) -> Exercise:
    """A few facts, known by heart."""
    fact, random = draw.pick(WORLD["facts"]), draw.random

    def make() -> str:
        return typed(written(random.choice(fact["asks"]), random, {}), random)

    return exercise_of(draw, make, fact["answer"], matching(fact["right"]))


def verse_for(prompt: str, random: Random) -> str:
    """A verse about what is asked for, or any."""
    said = set(prompt.casefold().replace("?", " ").replace(".", " ").replace("!", " ").split())
    fitting = [lines for about, lines in VERSES if said & set(about)]
    return random.choice(fitting) if fitting else random.choice([lines for _, lines in VERSES[:4]])


def casual_sums(draw: Draw) -> Exercise:
    """Small sums as people type them. What older exercises hold out is held out here, too."""
    random, kind = draw.random, draw.pick(("addition", "addition", "subtraction", "multiplication"))
    if kind == "addition":
        first, second = (draw.number(0, 12), draw.number(0, 12)) if draw.chance(0.4) else _two(draw)
        if draw.chance(0.2):
            first, second = 10 * draw.number(1, 10), 10 * draw.number(1, 9) if draw.chance(0.5) else draw.number(10, 18)
        asks, sign, found = _TALK["sum asks"], "+", first + second
        about: tuple[object, ...] = (min(first, second), max(first, second))
    elif kind == "subtraction":
        first = draw.number(2, 20) if draw.chance(0.5) else draw.number(10, 99)
        second = draw.number(0, first)
        if draw.chance(0.15):
            first, second = 10 * draw.number(1, 9), draw.number(1, 9)
        asks, sign, found, about = _TALK["minus asks"], "-", first - second, (first, second)
    else:
        first, second = draw.number(1, 10), draw.number(1, 10)
        asks, sign, found, about = _TALK["times asks"], "x", first * second, (first, second)
    slots = {"a": [str(first)], "b": [str(second)]}
    prompt = typed(written(random.choice(asks), random, slots), random)
    check: list[Check] = [{"kind": "number", "value": found}]
    return Exercise(prompt, f"{first} {sign} {second} = {found}.", check, about, exact=True, family=kind)


def _two(draw: Draw) -> tuple[int, int]:
    first = draw.number(1, 98)
    return first, draw.number(1, 99 - first)


def small_problems(draw: Draw) -> Exercise:
    """Sums as stories, as people type them. What older exercises hold out is held out here, too."""
    random, first = draw.random, draw.number(2, 20)
    more = draw.chance(0.5)
    second = draw.number(1, 20) if more else draw.number(1, first - 1)
    things = plural(draw.pick(THINGS))
    slots = {"a": [str(first)], "b": [str(second)], "things": [things], "name": [draw.pick(NAMES)]}
    prompt = typed(written(random.choice(_TALK["more asks" if more else "less asks"]), random, slots), random)
    shown, found = (f"{first} + {second}", first + second) if more else (f"{first} - {second}", first - second)
    check: list[Check] = [{"kind": "number", "value": found}]
    answer = f"{shown} = {found}. The answer is {found}."
    return Exercise(prompt, answer, check, (shown,), exact=True, family="number stories")


def open_questions(draw: Draw) -> Exercise:
    """What asks for a description, ideas or an opinion, which it does not have."""
    answers: list[str] = []

    def make() -> str:
        question = questions.open_question(draw)
        answer = honest_answer(question)
        # What somebody says of himself is small talk.
        if answer is None or question.startswith(("I ", "My ")):
            return ""
        answers.append(answer)
        return typed(question.rstrip(".?"), draw.random)

    exercise = exercise_of(draw, make, "", matching(NO_IDEA))
    exercise.answer = answers[-1]
    return exercise


MAKERS: dict[str, Maker] = {
    "first words": _talking(_FIRST),
    "last words": _talking(_LAST),
    "who it is": _talking(_SELF),
    "what it can do": _talking(_HELP),
    "small talk": _talking(_SMALL),
    "insults": _talking(("insults",)),
    "single words": _talking(_SINGLE),
    "other languages": other_languages,
    "honest answers": declined,
    "capitals of countries": capitals,
    "small facts": small_facts,
    "sums as typed": casual_sums,
    "small problems": small_problems,
    "open questions": open_questions,
}
