"""Exercises on what words mean and what belongs together."""

from __future__ import annotations

from topkapi.training.data.exercises.exercise import Check, Draw, Exercise, Maker, says
from topkapi.training.data.exercises.words import (
    CAPITALS,
    CATEGORIES,
    CLEAR,
    COLOURS_OF,
    SOUNDS,
    YOUNG,
    a,
    listed,
    paragraphs,
    plural,
)

_BARE = listed("snow rain ice wind bread cheese butter honey salt milk tea coffee breakfast lunch dinner")
_MASS = listed("snow grass blood coal milk night chocolate salt")
_DEFINITIONS = {
    word: (definition, needed)
    for word, definition, needed in (line.split(" | ") for line in paragraphs("definitions.txt")[0])
}
"""What words mean, and a word that no right answer lacks."""


def definitions(draw: Draw) -> Exercise:
    """What a word means."""
    word = draw.pick(list(_DEFINITIONS))
    definition, needed = _DEFINITIONS[word]
    named = word if word in _BARE else f"the {word}" if word in ("sun", "moon") else a(word)
    prompt = draw.wording(
        "What is {named}?", 'What does "{w}" mean?', "Define {w}.", "Explain what {named} is.",
        "What does the word {w} mean?", "Give a definition of {w}.", "Tell me what {named} is.",
        "What do we mean by {w}?", 'Define the word "{w}".', "Can you explain what {named} is?", w=word, named=named,
    )  # fmt: skip
    answer = f"{named[0].upper()}{named[1:]} is {definition}."
    checks: list[Check] = [{"kind": "contains", "values": [needed]}, {"kind": "words", "most": 25}]
    return Exercise(prompt, answer, checks, (word,), True)


def naming(draw: Draw) -> Exercise:
    """The word for a meaning."""
    word = draw.pick(list(_DEFINITIONS))
    definition, _ = _DEFINITIONS[word]
    prompt = draw.wording(
        "What do we call {d}?", "Which word means: {d}?", "What is {d} called?", "Name this: {d}",
        "Guess the word: {d}", "What is the word for {d}?", "I am thinking of {d}. What is it?", d=definition,
    )  # fmt: skip
    return Exercise(prompt, f"The word is {word}.", says(word), (word,), True, alone=word)


def kinds(draw: Draw) -> Exercise:
    """What sort of thing something is."""
    category = draw.pick(list(CLEAR))
    item = draw.pick(CLEAR[category])
    named = item if item[0].isupper() or category in ("drink", "metal", "colour", "sport", "season") else a(item)
    if draw.chance(0.5):
        prompt = draw.wording(
            "What kind of thing is {named}?", "What is {named}: {options}?", "What sort of thing is {named}?",
            "To which group does {item} belong: {options}?", "Is {named} {options}?", "Classify this word: {item}",
            named=named, item=item, options=_options(draw, category),
        )  # fmt: skip
        answer = f"{named[0].upper()}{named[1:]} is {a(category)}."
        return Exercise(prompt, answer, says(*category.split()[-1:], most=10), (item,), True, alone=category)
    yes = draw.chance(0.5)
    asked = (
        category if yes else draw.pick([name for name in CLEAR if name != category and item not in CATEGORIES[name]])
    )
    prompt = draw.wording(
        "Is {named} {asked}?", "Would you call {item} {asked}?", "True or not: {item} is {asked}?",
        "Is {item} {asked} or not?", "Does {item} belong to the group: {group}?",
        "Is it right that {item} is {asked}?", named=named, item=item, asked=a(asked), group=asked,
    )  # fmt: skip
    answer = f"{'Yes' if yes else 'No'}, {named} is {a(category)}."
    checks = [{"kind": "starts_with", "value": "yes" if yes else "no"}]
    return Exercise(prompt, answer, checks, (item, asked), True, alone="Yes" if yes else "No")


def _options(draw: Draw, category: str) -> str:
    options = [a(category), a(draw.pick([name for name in CLEAR if name != category]))]
    draw.random.shuffle(options)
    return " or ".join(options)


def odd_ones(draw: Draw) -> Exercise:
    """What does not belong to the others."""
    category, other = draw.several([name for name in CLEAR if len(CLEAR[name]) > 3], 2)
    stranger = draw.pick(CLEAR[other])
    items = [*draw.several(CLEAR[category], draw.number(2, 3)), stranger]
    draw.random.shuffle(items)
    prompt = draw.wording(
        "Which word does not belong: {s}?", "Which is the odd one out: {s}?", "Find the odd one out: {s}",
        "Which of these is different from the others: {s}?", "What does not fit: {s}?",
        "Pick the word that does not belong: {s}", "One of these does not belong. Which? {s}", s=", ".join(items),
    )  # fmt: skip
    answer = f"{stranger} does not belong."
    return Exercise(prompt, answer, says(stranger, most=8), tuple(sorted(items)), alone=stranger, exact=True)


def examples(draw: Draw) -> Exercise:
    """Some things of a kind, in the form asked for."""
    category = draw.pick([name for name in CATEGORIES if len(CATEGORIES[name]) > 4])
    count = draw.number(2, 5)
    some = {2: "two", 3: "three", 4: "four", 5: "five"}[count]
    things = _plural_of(category)
    items = draw.several(CATEGORIES[category], count)
    form, asked = draw.pick(
        (
            ("comma", ""), ("comma", ""), ("comma", " Separate them with commas."), ("bullets", " Use bullet points."),
            ("bullets", " Write them as a bulleted list."), ("numbers", " Number them."),
            ("numbers", " Make a numbered list."), ("lines", " Put each on a line of its own."),
        )
    )  # fmt: skip
    prompt = draw.wording(
        "Name {some} {things}.", "Give me {some} {things}.", "List {some} {things}.", "Write down {some} {things}.",
        "Can you name {some} {things}?", "Give {some} examples of {things}.", "Tell me {some} {things}.",
        "I need {some} {things}.", "What are {some} {things}?", "Think of {some} {things}.",
        "Make a list of {some} {things}.", "Please list {n} {things}.", some=some, things=things, n=count,
    ) + asked  # fmt: skip
    checks: list[Check] = [{"kind": "items", "of": CATEGORIES[category], "count": count}]
    if form == "comma":
        answer = ", ".join(items)
    elif form == "bullets":
        answer = "\n".join(f"- {item}" for item in items)
        checks.append({"kind": "bullets", "least": count, "most": count})
    elif form == "numbers":
        answer = "\n".join(f"{number}. {item}" for number, item in enumerate(items, start=1))
        checks.append({"kind": "matches", "pattern": rf"(?m)^{count}[.)] \S"})
    else:
        answer = "\n".join(items)
        checks.append({"kind": "matches", "pattern": r"\A[^\n]+" + r"\n[^\n]+" * (count - 1) + r"\Z"})
    return Exercise(prompt, answer, checks, (category, count, asked), True, exact=bool(asked))


def _plural_of(category: str) -> str:
    if " of " in category:
        first, _, rest = category.partition(" of ")
        return f"{plural(first)} of {rest}"
    return {"country": "countries"}.get(category, plural(category))


def facts(draw: Draw) -> Exercise:
    """What everybody knows: capitals of countries, young animals, sounds, colours."""
    which = draw.number(0, 3)
    if which == 0:
        thing = draw.pick(list(CAPITALS))
        found = CAPITALS[thing]
        prompt = draw.wording(
            "What is the capital of {t}?", "Which city is the capital of {t}?", "Name the capital of {t}.",
            "Capital of {t}?", "Tell me the capital city of {t}.", "What is {t}'s capital?", t=thing,
        )  # fmt: skip
        answer = f"The capital of {thing} is {found}."
    elif which == 1:
        thing = draw.pick(list(YOUNG))
        found = YOUNG[thing]
        prompt = draw.wording(
            "What is a young {t} called?", "What do we call a baby {t}?", "What is a baby {t} called?",
            "Name the young of a {t}.", "What is the word for a young {t}?", "What is the name for a baby {t}?",
            t=thing,
        )  # fmt: skip
        answer = f"A young {thing} is called a {found}."
    elif which == 2:
        thing = draw.pick(list(SOUNDS))
        found = SOUNDS[thing]
        prompt = draw.wording(
            "What sound does {t} make?", "How does {t} sound?", "What does {t} say?", "Which sound does {t} make?",
            "What noise does {t} make?", "Tell me what sound {t} makes.", t=a(thing),
        )  # fmt: skip
        answer = f"{a(thing).capitalize()} {found}."
    else:
        thing = draw.pick(list(COLOURS_OF))
        found = COLOURS_OF[thing]
        prompt = draw.wording(
            "What colour is {t}?", "What is the colour of {t}?", "Which colour does {t} have?",
            "Tell me the colour of {t}.", "What color is {t}?", "Name the colour of {t}.",
            t=thing if thing in _MASS else a(thing),
        )  # fmt: skip
        answer = f"{thing.capitalize()} is {found}." if thing in _MASS else f"{a(thing).capitalize()} is {found}."
    return Exercise(prompt, answer, says(*found.split()), (which, thing), True, alone=found)


MAKERS: dict[str, Maker] = {
    "definitions": definitions,
    "naming": naming,
    "what kind of thing": kinds,
    "odd one out": odd_ones,
    "lists": examples,
    "facts": facts,
}
