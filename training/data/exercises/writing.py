"""Exercises in writing some sentences: reasons, advice, and short stories."""

from __future__ import annotations

from topkapi.training.data.exercises.exercise import Check, Draw, Exercise, Maker
from topkapi.training.data.exercises.explanations import ADVICE, REASONS
from topkapi.training.data.exercises.words import CATEGORIES, CLEAR, NAMES, THINGS, WOMEN, a, listed

_COUNTS = {2: "two", 3: "three", 4: "four"}
_HEROES = [
    *CLEAR["animal"],
    *CLEAR["bird"],
    *CLEAR["job"],
    *listed("dragon robot giant ghost pirate child friend neighbour"),
]
_SCENES = listed(
    "lighthouse castle forest island river bridge garden village city farm school library market tower mountain lake "
    "beach cave museum station ship train boat house kitchen desert storm snow sea winter summer"
)
_BARE = listed("snow winter summer")
_PLOTS = (
    ("wanted to see the sea", "{n} walked for three days, and there it was.", "sat on the sand and heard the waves"),
    ("had lost a key", "{n} looked under every stone, and there it was.", "opened the old door and laughed"),
    ("was very lonely", "A small bird came and sang for {o}.", "had a friend from that day on"),
    ("could not sleep", "{n} counted the stars until the night was quiet.", "fell asleep and dreamed of flying"),
    ("wanted to learn to sing", "An old teacher had time for {o}.", "sang so well that all the neighbours came"),
    ("was afraid of the dark", "{n} lit a small lamp, and the shadows ran away.", "was never afraid again"),
    ("was looking for a treasure", "{n} found a box, too heavy to carry.", "shared what was in it with everybody"),
    ("had made a mistake", "{n} said sorry, and nobody was angry.", "went home with a light heart"),
    ("was hungry and cold", "A kind woman saw {o} and opened her door.", "ate hot soup by the fire"),
    ("wanted to help", "A lost child ran to {o} and cried.", "brought the child home before night"),
)  # fmt: skip
_TIMES = (
    "Once upon a time",
    "Long ago",
    "One winter morning",
    "On a warm evening in summer",
    "Many years ago",
    "One day",
)
_WEATHER = (
    "The wind was cold.",
    "It rained all day.",
    "The sun was low.",
    "The sky was full of clouds.",
    "The air was still.",
)
_ENDS = ("It was a good day.", "And so all was well.", "Nobody ever forgot it.", "People still tell of it.", "The end.")


def reasons(draw: Draw) -> Exercise:
    """Why something is as it is, in as many sentences as are wanted."""
    so, asked, first, second, word = draw.pick(REASONS)
    length = draw.number(0, 2)
    if length == 0:
        prompt = draw.wording(
            "Why {q}?", "Explain why {s}.", "Can you explain why {s}?", "Tell me why {s}.",
            "What is the reason that {s}?", "Do you know why {s}?", "How come {s}?", "Give me the reason why {s}.",
            q=asked, s=so,
        )  # fmt: skip
    else:
        prompt = draw.wording(
            "Explain in {n} why {s}.", "In {n}, why {q}?", "Why {q}? Answer in {n}.", "Tell me in {n} why {s}.",
            "Explain why {s} in {n}.", "Use {n} to explain why {s}.", "Write {n} about why {s}.", "Say in {n} why {s}.",
            q=asked, s=so, n="one sentence" if length == 1 else "two sentences",
        )  # fmt: skip
    answer = first if length == 1 else f"{first} {second}"
    sentences = {0: (1, 4), 1: (1, 1), 2: (2, 2)}[length]
    checks: list[Check] = [
        {"kind": "words", "least": 6, "most": 60},
        {"kind": "sentences", "least": sentences[0], "most": sentences[1]},
    ]
    if word in answer.casefold():
        checks.append({"kind": "contains", "values": [word]})
    return Exercise(prompt, answer, checks, (so, length), True, exact=True)


def advice(draw: Draw) -> Exercise:
    """Some tips, numbered."""
    topic = draw.pick(list(ADVICE))
    count = draw.number(2, 4)
    prompt = draw.wording(
        "Give {n} tips for {t}.", "Give me {n} tips for {t}.", "What are {n} tips for {t}?", "List {n} tips for {t}.",
        "I need {n} tips for {t}.", "Name {n} things that help with {t}.", "Can you give me {n} tips for {t}?",
        "Write {n} pieces of advice for {t}.", n=_COUNTS[count], t=topic,
    )  # fmt: skip
    answer = "\n".join(f"{number}. {tip}" for number, tip in enumerate(draw.several(ADVICE[topic], count), start=1))
    every = "|".join(tip.rstrip(".") for tip in ADVICE[topic])
    checks: list[Check] = [
        {
            "kind": "matches",
            "pattern": r"\A" + r"\n".join(rf"{number}\. (?:{every})\.?" for number in range(1, count + 1)) + r"\Z",
        }
    ]
    return Exercise(prompt, answer, checks, (topic, count), True, exact=True)


def stories(draw: Draw) -> Exercise:
    """A story of some sentences about somebody, something or some place."""
    name, (wish, turn, ending) = draw.pick(NAMES), draw.pick(_PLOTS)
    when, weather, end = draw.pick(_TIMES), draw.pick(_WEATHER), draw.pick(_ENDS)
    she = name in WOMEN
    about = draw.number(0, 2)
    if about == 0:
        subject = draw.pick(_HEROES)
        beginning = f"{when} there was {a(subject)} called {name} who {wish}."
        middle = f"{weather} {name} went out all the same."
    elif about == 1:
        subject = draw.pick(_SCENES)
        where = f"in {subject}" if subject in _BARE else f"near {a(subject)}"
        beginning = f"{when}, {where}, there was a {'girl' if she else 'boy'} called {name} who {wish}."
        middle = f"{weather} {name} looked at the {subject} for a long time."
    else:
        subject = draw.pick(THINGS)
        beginning = f"{when} {name} found {a(draw.pick(CATEGORIES['colour']))} {subject}. {name} {wish}."
        middle = f"{weather} {name} took the {subject} and went out."
    text = f"{beginning} {middle} {turn.format(n=name, o='her' if she else 'him')} In the end {name} {ending}. {end}"
    named = subject if subject in _BARE else a(subject)
    prompt = draw.wording(
        "Write a short story about {w}.", "Tell me a story about {w}.", "Write a story about {w}.",
        "Tell a short story about {w}.", "Can you write a short story about {w}?", "I would like a story about {w}.",
        "Make up a story about {w}.", "Write a little story with {w} in it.",
        "Please tell me a short story about {w}.", w=named,
    )  # fmt: skip
    checks: list[Check] = [
        {"kind": "contains", "values": [subject]},
        {"kind": "sentences", "least": 3, "most": 9},
        {"kind": "words", "least": 20, "most": 120},
    ]
    return Exercise(prompt, text, checks, (subject,), exact=True)


MAKERS: dict[str, Maker] = {
    "reasons": reasons,
    "advice": advice,
    "short stories": stories,
}
