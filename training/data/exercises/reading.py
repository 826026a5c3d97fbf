"""Exercises whose answer stands in the question: short texts to read, and facts to put into a form."""

from __future__ import annotations

import json

from topkapi.training.data.exercises.exercise import Draw, Exercise, Maker, is_one_of, number_is, says
from topkapi.training.data.exercises.letters import WORDS
from topkapi.training.data.exercises.words import (
    CATEGORIES,
    CITIES,
    CLEAR,
    NAMES,
    NOUNS,
    PEOPLE,
    THINGS,
    a,
    listed,
    plural,
)

_COLOURS = CATEGORIES["colour"]
_FOODS = ["bread", "cheese", "soup", "rice", "cake", "honey", "fish", *(plural(each) for each in CLEAR["fruit"])]
_PLACES = listed("kitchen garden school library market station park attic cellar bedroom street forest field office")


def things(draw: Draw) -> Exercise:
    """Who has what, of which colour."""
    names, owned = draw.several(NAMES, 2), draw.several(THINGS, 2)
    colours = draw.several(_COLOURS, 2)
    which = draw.number(0, 1)
    text = " ".join(
        f"{name} has {a(colour)} {thing}." for name, colour, thing in zip(names, colours, owned, strict=True)
    )
    name, thing, colour = names[which], owned[which], colours[which]
    about = (*names, *owned, *colours, which)
    if draw.chance(0.5):
        prompt = draw.wording(
            "{text} What colour is {name}'s {thing}?", "{text} Which colour is the {thing}?",
            "{text} What is the colour of the {thing}?", "{text} Tell me the colour of {name}'s {thing}.",
            "Read this: {text} What colour is the {thing}?", "{text}\n\nWhat colour is the {thing} of {name}?",
            text=text, name=name, thing=thing,
        )  # fmt: skip
        return Exercise(prompt, f"The {thing} is {colour}.", says(colour), about, alone=colour)
    prompt = draw.wording(
        "{text} Who has the {thing}?", "{text} Whose is the {thing}?", "{text} Who owns {a} {thing}?",
        "{text} Who has {a} {thing}?", "Read this: {text} Who has the {thing}?",
        "{text}\n\nTell me who has the {thing}.", text=text, thing=thing, a=a(colour),
    )  # fmt: skip
    return Exercise(prompt, f"{name} has the {thing}.", says(name), (*about, "who"), alone=name)


def lives(draw: Draw) -> Exercise:
    """Where somebody lives, what they are, how old."""
    name, city, job, age = draw.pick(NAMES), draw.pick(CITIES), draw.pick(CLEAR["job"]), draw.number(20, 80)
    food = draw.pick(_FOODS)
    sentences = [
        f"{name} is {a(job)}.", f"{name} lives in {city}.", f"{name} is {age} years old.", f"{name} likes {food}.",
    ]  # fmt: skip
    which = draw.number(0, 3)
    told = [
        sentences[which],
        *draw.several([each for each in sentences if each != sentences[which]], draw.number(1, 3)),
    ]
    draw.random.shuffle(told)
    question = draw.wording(*_QUESTIONS[which], name=name)
    text = " ".join(told)
    prompt = draw.wording(
        "{text} {q}", "{text}\n\n{q}", "Read the text and answer. {text} {q}", "{q} {text}",
        "Text: {text}\nQuestion: {q}", "Here is a text: {text} {q}", text=text, q=question,
    )  # fmt: skip
    found = (job, city, str(age), food)[which]
    checks = number_is(age) if which == 2 else says(found)
    return Exercise(prompt, sentences[which], checks, (name, found), alone=found)


_QUESTIONS = (
    ("What is {name}'s job?", "What does {name} do?", "What work does {name} do?"),
    ("Where does {name} live?", "In which city does {name} live?", "What city does {name} live in?"),
    ("How old is {name}?", "What is {name}'s age?", "How many years old is {name}?"),
    ("What does {name} like?", "Which food does {name} like?", "What does {name} like to eat?"),
)


def places(draw: Draw) -> Exercise:
    """Where somebody or something went."""
    name, other = draw.several(NAMES, 2)
    first, second = draw.several(_PLACES, 2)
    thing = draw.pick(THINGS)
    text, question, found = draw.pick(
        (
            (f"{name} put the {thing} in the {first}. {other} went to the {second}.", f"Where is the {thing}?", first),
            (f"{name} went to the {first}. {other} went to the {second}.", f"Where did {other} go?", second),
            (f"{name} was in the {first}. Then {name} went to the {second}.", f"Where is {name} now?", second),
            (f"The {thing} was in the {first}. {name} took it to the {second}.", f"Where is the {thing} now?", second),
            (f"{name} met {other} in the {first}.", f"Where did {name} meet {other}?", first),
        )
    )
    prompt = draw.wording(
        "{text} {q}", "{text}\n\n{q}", "Read this: {text} {q}", "{text} Question: {q}", "Text: {text}\nQuestion: {q}",
        "Here is what happened: {text} {q}", text=text, q=question,
    )  # fmt: skip
    return Exercise(prompt, f"In the {found}.", says(found), (text,), alone=found)


def objects(draw: Draw) -> Exercise:
    """Facts as JSON."""
    name, city, age, job = draw.pick(NAMES), draw.pick(CITIES), draw.number(5, 90), draw.pick(CLEAR["job"])
    parts: list[tuple[str, object, str]] = [("age", age, f"is {age} years old"), ("city", city, f"lives in {city}"),
                                            ("job", job, f"is {a(job)}")]  # fmt: skip
    chosen = draw.several(parts, draw.number(1, 2))
    value = {"name": name, **{key: found for key, found, _ in chosen}}
    text = f"{name} {' and '.join(said for _, _, said in chosen)}."
    keys = " and ".join([", ".join(list(value)[:-1]), list(value)[-1]])
    prompt = draw.wording(
        "Write this as JSON with the keys {keys}: {text}", "{text} Give this as JSON with {keys}.",
        "Turn this into JSON: {text} Keys: {keys}", "Answer in JSON with the keys {keys}. {text}",
        "Make a JSON object with {keys} from this: {text}", "Extract {keys} as JSON: {text}",
        "{text} Put {keys} into a JSON object.", "Return JSON with {keys}: {text}", keys=keys, text=text,
    )  # fmt: skip
    return Exercise(
        prompt, json.dumps(value), [{"kind": "json", "value": value}], tuple(map(str, value.values())), exact=True
    )


def memberships(draw: Draw) -> Exercise:
    """Whether a list has something, yes or no."""
    items = draw.several(WORDS if draw.chance(0.6) else [str(number) for number in range(1, 60)], draw.number(3, 6))
    yes = draw.chance(0.5)
    item = draw.pick(items[1:]) if yes else items[0]
    shown = items if yes else items[1:]
    prompt = draw.wording(
        "Is {i} in this list: {s}?", "Does this list contain {i}: {s}?", "Answer yes or no: is {i} one of {s}?",
        "Yes or no: {i} is in the list {s}.", "Look at this list: {s}. Does it have {i}?", "Can you find {i} in {s}?",
        "Is {i} among these: {s}?", i=item, s=", ".join(shown),
    )  # fmt: skip
    answer = f"Yes, {item} is in the list." if yes else f"No, {item} is not in the list."
    checks = [{"kind": "starts_with", "value": "yes" if yes else "no"}]
    return Exercise(prompt, answer, checks, (item, *sorted(shown)), alone="Yes" if yes else "No")


def formats(draw: Draw) -> Exercise:
    """A given list in another form."""
    items = draw.several(WORDS, draw.number(3, 4))
    form = draw.pick(("bullets", "numbers", "commas", "and", "lines"))
    shown = "\n".join(items) if form in ("commas", "and") and draw.chance(0.5) else ", ".join(items)
    if form == "commas":
        shown = " ".join(items) if "\n" not in shown else shown
    asked = {
        "bullets": ("as a bulleted list", "with bullet points", "as bullet points"),
        "numbers": ("as a numbered list", "with numbers", "numbered from 1"),
        "commas": ("separated by commas", "with commas between them", "in one line with commas"),
        "and": ("as one phrase with and", "with and before the last", "joined by commas and a final and"),
        "lines": ("one on each line", "each on a line of its own", "one below the other"),
    }[form]
    found = {
        "bullets": "\n".join(f"- {item}" for item in items),
        "numbers": "\n".join(f"{number}. {item}" for number, item in enumerate(items, start=1)),
        "commas": ", ".join(items),
        "and": f"{', '.join(items[:-1])} and {items[-1]}",
        "lines": "\n".join(items),
    }[form]
    prompt = draw.wording(
        "Write these words {how}: {s}", "List these {how}: {s}", "Show this list {how}: {s}",
        "Format these words {how}: {s}", "Give these words {how}: {s}", "Put these words down {how}: {s}",
        "Write {how}: {s}", how=draw.pick(asked), s=shown,
    )  # fmt: skip
    return Exercise(prompt, found, is_one_of(found, found.replace("\n- ", "\n* ")), (form, *items), exact=True)


def sentences(draw: Draw) -> Exercise:
    """A sentence with a word in it."""
    word = draw.pick(NOUNS)
    prompt = draw.wording(
        'Write a sentence with the word "{w}".', "Make a sentence with {w}.", "Use {w} in a sentence.",
        "Write a sentence about {a}.", "Give me a short sentence with the word {w}.",
        "Can you write a sentence that has {w} in it?", "Form a sentence with the word {w}.",
        "Generate a sentence using the word '{w}'.", w=word, a=a(word),
    )  # fmt: skip
    name, colour, place = draw.pick(NAMES), draw.pick(_COLOURS), draw.pick(_PLACES)
    if word in CLEAR["job"] or word in PEOPLE:
        answer = draw.pick(
            (f"The {word} went to the {place}.", f"{name} spoke with the {word}.", f"I met the {word} in the {place}.")
        )
    else:
        answer = draw.pick(
            (f"There is {a(word)} near the {place}.", f"{name} saw {a(word)} yesterday.", f"The {word} is {colour}.",
             f"{name} drew {a(word)} with a {colour} pencil.")
        )  # fmt: skip
    checks = [{"kind": "frequency", "text": word, "least": 1}, {"kind": "words", "least": 3, "most": 25}]
    return Exercise(prompt, answer, checks, (word,), exact=True)


MAKERS: dict[str, Maker] = {
    "reading: things": things,
    "reading: people": lives,
    "reading: places": places,
    "JSON": objects,
    "yes or no": memberships,
    "list formats": formats,
    "sentences with a word": sentences,
}
