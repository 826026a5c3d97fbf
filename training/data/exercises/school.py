"""Exercises as schoolbooks have them: units, shapes, parts of speech, the mood of a sentence."""

from __future__ import annotations

from topkapi.training.data.exercises.exercise import Check, Draw, Exercise, Maker, is_one_of, number_is, says
from topkapi.training.data.exercises.words import ADJECTIVES, CITIES, CLEAR, NAMES, NOUNS, THINGS, a, listed, past

_UNITS = (
    ("kilometers", "meters", 1000), ("meters", "centimeters", 100), ("centimeters", "millimeters", 10),
    ("kilograms", "grams", 1000), ("liters", "milliliters", 1000),
    ("hours", "minutes", 60), ("minutes", "seconds", 60),
    ("days", "hours", 24), ("weeks", "days", 7), ("years", "months", 12), ("euros", "cents", 100),
    ("tons", "kilograms", 1000),
)  # fmt: skip
_VERBS = listed(
    "walk jump play help look laugh smile dance climb work wait shout whisper arrive hurry listen learn travel"
)
_DOERS = [*CLEAR["animal"], *CLEAR["bird"], *CLEAR["job"]]
_ADVERBS = listed("slowly quickly quietly loudly happily sadly carefully bravely badly calmly kindly eagerly politely")
_PLAIN = [each for each in ADJECTIVES if each not in ("light", "cool", "kind", "long", "fast", "late", "hard", "early")]
_LIKED = listed("good wonderful great lovely excellent delicious beautiful perfect pleasant brilliant nice amazing")
_DISLIKED = listed("bad terrible awful boring ugly horrible dreadful disappointing poor unpleasant nasty dull")
_JUDGED = listed("film book meal song game holiday hotel soup show party lesson trip coffee story weather service")


def conversions(draw: Draw) -> Exercise:
    """From one unit to another."""
    large, small, factor = draw.pick(_UNITS)
    number = draw.number(2, 12 if factor in (7, 12, 24, 60) else 50)
    first, second, found = number, number * factor, number * factor
    source, target = large, small
    if draw.chance(0.4):
        first, second, source, target, found = second, number, small, large, number
    prompt = draw.wording(
        "Convert {n} {s} to {t}.", "How many {t} are {n} {s}?", "How many {t} are in {n} {s}?",
        "{n} {s} are how many {t}?", "What is {n} {s} in {t}?", "Change {n} {s} into {t}.", "Express {n} {s} in {t}.",
        "Turn {n} {s} into {t}.", n=first, s=source, t=target,
    )  # fmt: skip
    answer = f"{first} {source} is {second} {target}."
    return Exercise(prompt, answer, _first_number(found, target), (number, large, small), alone=f"{found} {target}")


def _first_number(value: int, unit: str) -> list[Check]:
    return [{"kind": "matches", "pattern": rf"(?<![\d.,]){value:,}\s+{unit}|(?<![\d.,]){value}\s+{unit}"}]


def shapes(draw: Draw) -> Exercise:
    """Area and perimeter of squares and rectangles, in whole numbers."""
    first, second = draw.number(2, 10), draw.number(2, 10)
    square = draw.chance(0.5)
    if square:
        second = first
    what = draw.pick(("area", "perimeter"))
    shape = f"square with sides of {first}" if square else f"rectangle of {first} by {second}"
    prompt = draw.wording(
        "What is the {what} of a {shape} meters?", "Calculate the {what} of a {shape} meters.",
        "Find the {what} of a {shape} meters.", "How large is the {what} of a {shape} meters?",
        "A garden is a {shape} meters. What is its {what}?", "Work out the {what} of a {shape} meters.", what=what,
        shape=shape,
    )  # fmt: skip
    if what == "area":
        found, shown, unit = first * second, f"{first} x {second}", "square meters"
    else:
        found, shown, unit = 2 * (first + second), f"2 x ({first} + {second})", "meters"
    answer = f"{shown} = {found}. The {what} is {found} {unit}."
    return Exercise(
        prompt, answer, number_is(found), (min(first, second), max(first, second), what), True, alone=str(found)
    )


def parts_of_speech(draw: Draw) -> Exercise:
    """The noun, verb, adjective or adverb of a sentence."""
    words = {
        "adjective": draw.pick(_PLAIN),
        "noun": draw.pick(_DOERS),
        "verb": past(draw.pick(_VERBS)),
        "adverb": draw.pick(_ADVERBS),
    }
    what = draw.pick(list(words))
    text = f"The {words['adjective']} {words['noun']} {words['verb']} {words['adverb']}."
    prompt = draw.wording(
        "Identify the {what} in this sentence: {s}", "What is the {what} in this sentence? {s}", "Find the {what}: {s}",
        "Which word is the {what}? {s}", "Name the {what} in the sentence '{s}'", "Pick out the {what}: {s}",
        "Identify the {what} in the sentence.\n\n{s}", "Tell me the {what} of this sentence: {s}", what=what, s=text,
    )  # fmt: skip
    found = words[what]
    return Exercise(prompt, f"The {what} is {found}.", says(found, most=6), (text, what), alone=found, exact=True)


def moods(draw: Draw) -> Exercise:
    """Whether a sentence is positive or negative."""
    good = draw.chance(0.5)
    word, thing = draw.pick(_LIKED if good else _DISLIKED), draw.pick(_JUDGED)
    text = draw.pick(
        (
            f"The {thing} was {word}.", f"What a {word} {thing}!", f"I think the {thing} is {word}.",
            f"This {thing} is {word}.",
            f"I {'love' if good else 'hate'} this {thing}.", f"The {thing} made me {'happy' if good else 'sad'}.",
            f"We had a {word} {thing} in {draw.pick(CITIES)}.", f"{draw.pick(NAMES)} said that the {thing} was {word}.",
        )
    )  # fmt: skip
    prompt = draw.wording(
        "Is this sentence positive or negative? {s}", "Classify the sentiment: {s}", "Positive or negative: {s}",
        "What is the sentiment of this sentence? {s}", "Does this sound positive or negative? {s}",
        "Classify this text as positive or negative: {s}", "Say whether this is positive or negative: {s}",
        "Perform a sentiment analysis of this sentence.\n\n{s}", s=text,
    )  # fmt: skip
    found, other = ("positive", "negative") if good else ("negative", "positive")
    checks = [*says(found, most=8), {"kind": "excludes", "values": [other]}]
    return Exercise(prompt, f"The sentence is {found}.", checks, (text,), alone=found.capitalize(), exact=True)


def joining(draw: Draw) -> Exercise:
    """Two sentences made one."""
    name = draw.pick(NAMES)
    first, second = draw.several(THINGS, 2)
    one, two, found = draw.pick(
        (
            (f"{name} has {a(first)}.", f"{name} has {a(second)}.", f"{name} has {a(first)} and {a(second)}."),
            (f"The {first} is old.", f"The {second} is old.", f"The {first} and the {second} are old."),
            (f"{name} saw the {first}.", f"{name} saw the {second}.", f"{name} saw the {first} and the {second}."),
        )
    )
    prompt = draw.wording(
        "Combine these sentences: {x} {y}", "Join the two sentences with and: {x} {y}",
        "Make one sentence of these: {x} {y}", "Combine the two sentences into one.\n\n{x} {y}",
        "Put these together in one sentence: {x} {y}", "Write this as one sentence: {x} {y}",
        "Merge these two sentences: {x} {y}", x=one, y=two,
    )  # fmt: skip
    return Exercise(prompt, found, is_one_of(found), (name, first, second), exact=True)


def punctuation(draw: Draw) -> Exercise:
    """The mark that ends a sentence."""
    noun, name = draw.pick(NOUNS), draw.pick(NAMES)
    text, mark = draw.pick(
        (
            (f"Where is the {noun}", "?"), (f"Is the {noun} old", "?"), (f"Who has seen {name}", "?"),
            (f"When does {name} come", "?"),
            (f"The {noun} is old", "."), (f"{name} is at home", "."), (f"{name} looks at the {noun}", "."),
            (f"Why is {name} at the {noun}", "?"), (f"There is {a(noun)} in {draw.pick(CITIES)}", "."),
        )
    )  # fmt: skip
    prompt = draw.wording(
        "Add the missing punctuation mark: {s}", "Which mark is missing at the end: {s}",
        "End this sentence with the right mark: {s}", "Put the right mark at the end: {s}",
        "Punctuate this sentence: {s}", "Add a full stop or a question mark: {s}",
        "Write this with the right punctuation: {s}", s=text,
    )  # fmt: skip
    found = text + mark
    ending = r"\?" if mark == "?" else r"\."
    checks: list[Check] = [{"kind": "matches", "pattern": f"^{text}{ending}$"}]
    return Exercise(prompt, found, checks, (text,), exact=True)


MAKERS: dict[str, Maker] = {
    "units": conversions,
    "area and perimeter": shapes,
    "parts of speech": parts_of_speech,
    "positive or negative": moods,
    "joining sentences": joining,
    "punctuation": punctuation,
}
