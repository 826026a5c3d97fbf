"""Exercises in how people begin and end, after the drill: wider wordings, drawn out and run together.

What the drill left wrong were sentences after a greeting in words that no exercise had, and single words of thanks that
were taken for words to spell. Beside them stand what only looks like them: nonsense, and whole requests in haste.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from random import Random
from typing import Any

from topkapi.training.data.exercises import followups, manners
from topkapi.training.data.exercises.exercise import Draw, Exercise, Maker, Message, assistant, user
from topkapi.training.data.exercises.manners import (
    Slots,
    exercise_of,
    intent_exercise,
    matching,
    only_english,
    slots_of,
)
from topkapi.training.data.exercises.typed import drawn_out, hasty, spelling, typed, written
from topkapi.training.data.exercises.words import tables

_TABLE: dict[str, Any] = tables("openings.yaml")
_MORE: dict[str, list[str]] = _TABLE["more of"]
_ALONE: dict[str, list[str]] = _TABLE["alone"]

_FIRST = ("hello", "hello", "hello", "hello", "good part", "how are you", "how are you", "a name")
_LAST = ("thanks", "thanks", "thanks", "thanks", "goodbye", "goodbye", "good night", "sad")
_SELF = (
    "who are you", "who are you", "who are you", "human", "machine", "another", "maker", "maker", "maker", "age",
    "place", "abilities",
)  # fmt: skip
_SINGLE = ("hello", "hello", "hello", "good part", "thanks", "thanks", "thanks", "goodbye", "goodbye", "good night")
_OTHERS = ("ok", "not now", "praise")
_UNCLEAR = ("nonsense", "nonsense", "nonsense", "testing", "a word", "a word", "a word", "a word")
_REQUEST_MAKERS = manners.MAKERS | followups.MAKERS
_REQUESTS = {
    "honest answers": 10, "jokes": 3, "verses": 2, "small talk": 4, "what it can do": 3, "insults": 2, "small facts": 3,
    "capitals of countries": 2, "open questions": 3,
}  # fmt: skip
_AFTERWARDS: dict[str, list[str]] = _TABLE["afterwards"]
_SAID: dict[str, list[str]] = {name: said.split("|") for name, said in tables("said.yaml").items()}
_SAID_OFTEN = {
    "hello": 6, "good part": 2, "how are you": 3, "a name": 1, "thanks": 6, "goodbye": 4, "good night": 1,
    "who are you": 6, "human": 3, "machine": 2, "another": 2, "maker": 4, "age": 1, "place": 1, "abilities": 5,
    "praise": 1, "ok": 1,
}  # fmt: skip
# What is said in one conversation, one after another.
_IN_A_ROW = (
    ("hello", "how are you", "who are you", "abilities"), ("who are you", "abilities", "thanks", "goodbye"),
    ("good part", "a name", "who are you", "maker"), ("who are you", "machine", "maker", "abilities"),
    ("hello", "abilities", "ok", "thanks"), ("who are you", "human", "age", "place"),
    ("hello", "who are you", "another", "maker"),
    ("how are you", "abilities", "who are you", "thanks"), ("hello", "help", "thanks", "good night"),
)  # fmt: skip
_HASTY = (*_FIRST, *_LAST, "good part", "good part", "thanks", "thanks", "who are you", "maker", "abilities")


def _slots_of(draw: Draw) -> Slots:
    return {**slots_of(draw), **_TABLE["slots"]}


def _loose(text: str, random: Random) -> str:
    """`text` with a word drawn out, or two run together, now and then."""
    if random.random() < 0.1:
        words = text.split(" ")
        at = random.randrange(min(len(words), 2))
        words[at] = drawn_out(words[at], random)
        text = " ".join(words)
    return text.replace(" ", "", 1) if random.random() < 0.06 else text


def _wider(names: tuple[str, ...]) -> Maker:
    def make(draw: Draw) -> Exercise:
        name = draw.pick(names)
        return intent_exercise(draw, name, _slots_of(draw), asks=_MORE[name], alter=_loose)

    return make


def afterwards(draw: Draw) -> Exercise:
    """How people begin and end in still more words."""
    name = draw.pick(("hello", "hello", "hello", "good part", "who are you", "another", "thanks", "thanks", "goodbye"))
    slots = {**_slots_of(draw), **_TABLE["slots afterwards"]}
    return intent_exercise(draw, name, slots, asks=_AFTERWARDS[name], alter=_loose)


def struck_at_random(draw: Draw) -> Exercise:
    """Keys struck at random, one thing several times, single signs and numbers, which ask for nothing."""

    def again(text: str, random: Random) -> str:
        return text * random.choice((1, 1, 2, 3, 5, 8)) if len(text) < 6 and not text.isdigit() else text

    return intent_exercise(draw, "nonsense", _slots_of(draw), asks=_TABLE["mash"], alter=again)


def greetings_of_languages(draw: Draw) -> Exercise:
    """A greeting of another language and nothing else."""
    random = draw.random

    def make() -> str:
        return typed(written(random.choice(_TABLE["hailed"]), random, {}), random, decorate=False, slips=False)

    return exercise_of(draw, make, only_english(draw), matching("only know english"))


def one_word_or_another(draw: Draw) -> Exercise:
    """A single word, which alone decides: a greeting, thanks, a goodbye, a word that is none of them, or no word."""
    if draw.chance(0.4):
        return intent_exercise(draw, draw.pick(_UNCLEAR))
    name = draw.pick(_OTHERS if draw.chance(0.15) else _SINGLE)

    def longer(text: str, random: Random) -> str:
        return drawn_out(text, random) if random.random() < 0.5 else text

    return intent_exercise(draw, name, _slots_of(draw), asks=_ALONE[name], alter=longer)


def openings_in_haste(draw: Draw) -> Exercise:
    """How people begin and end, by fingers that slip more than once."""
    name = draw.pick(_HASTY)
    asks = _ALONE[name] if name in _ALONE and draw.chance(0.4) else _MORE[name]
    return intent_exercise(draw, name, _slots_of(draw), asks=asks, alter=hasty)


def requests_in_haste(draw: Draw) -> Exercise:
    """Whole requests by the same fingers, which are no greeting for all that."""
    kind = draw.random.choices(list(_REQUESTS), list(_REQUESTS.values()))[0]
    exercise = _REQUEST_MAKERS[kind](draw)
    prompt = hasty(exercise.prompt, draw.random)
    said = spelling(prompt)
    is_plain = draw.held_out and said in manners.plain_spellings()
    return replace(exercise, prompt=prompt, about=manners.NOT_HELD_OUT if is_plain else (said,))


def said_by(said: Mapping[str, Sequence[str]], often: Mapping[str, int]) -> Maker:
    """How people begin, end and ask who it is, in sentences that no pattern makes; sometimes by fingers that slip.

    `said` are the sentences by what is meant, of which each comes as `often`.
    """

    def make(draw: Draw) -> Exercise:
        name = draw.random.choices(list(often), list(often.values()))[0]
        slots = _slots_of(draw)
        return intent_exercise(draw, name, slots, asks=said[name], alter=hasty if draw.chance(0.15) else _loose)

    return make


def in_a_row(said: Mapping[str, Sequence[str]]) -> Maker:
    """What comes after such a beginning and its answer: each question has its own, whatever was answered before."""

    def make(draw: Draw) -> Exercise:
        names = draw.pick(_IN_A_ROW)
        at = draw.number(1, len(names) - 1)
        slots = _slots_of(draw)
        before: list[Message] = []
        for name in names[draw.number(0, at - 1) : at]:
            intent = manners.INTENTS[name]
            plain = typed(
                written(draw.pick(intent["plain"].split("|")), draw.random, slots),
                draw.random,
                decorate=False,
                slips=False,
            )
            before += [user(plain), assistant(manners.drawn(intent["answers"], draw.random, slots))]
        name = names[at]
        asks = said[name] if name in said and draw.chance(0.4) else manners.INTENTS[name]["asks"]
        return replace(intent_exercise(draw, name, slots, asks=asks), before=before)

    return make


MAKERS: dict[str, Maker] = {
    "first words, wider": _wider(_FIRST),
    "last words, wider": _wider(_LAST),
    "who it is, wider": _wider(_SELF),
    "one word or another": one_word_or_another,
    "openings in haste": openings_in_haste,
    "requests in haste": requests_in_haste,
}
AFTERWARDS: dict[str, Maker] = {
    "first and last words, afterwards": afterwards,
    "struck at random": struck_at_random,
    "greetings of other languages": greetings_of_languages,
}
"""What these left wrong; kinds of their own, so that what was drawn for a checkpoint can be drawn again."""
SAID: dict[str, Maker] = {"as people said it": said_by(_SAID, _SAID_OFTEN), "one after another": in_a_row(_SAID)}
"""What three other people wrote, and what comes in one conversation."""
