"""Exercises in writing some sentences: reasons, advice, and short stories."""

from __future__ import annotations

from topkapi.training.data.exercises.exercise import Check, Draw, Exercise, Maker
from topkapi.training.data.exercises.words import CATEGORIES, CLEAR, NAMES, THINGS, WOMEN, a, listed, paragraphs, tables

_COUNTS = {2: "two", 3: "three", 4: "four"}
_TABLES = tables("stories.yaml")
_HEROES = [*CLEAR["animal"], *CLEAR["bird"], *CLEAR["job"], *listed(_TABLES["heroes"])]
_SCENES = listed(_TABLES["scenes"])
_BARE = listed("snow winter summer")
_PLOTS, _TIMES, _WEATHER, _ENDS = (_TABLES[name] for name in ("plots", "times", "weather", "ends"))
_REASONS = paragraphs("reasons.txt")
_ADVICE = {topic: tips for topic, *tips in paragraphs("advice.txt")}


def reasons(draw: Draw) -> Exercise:
    """Why something is as it is, in as many sentences as are wanted."""
    so, asked, first, second, word = draw.pick(_REASONS)
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
    topic = draw.pick(list(_ADVICE))
    count = draw.number(2, 4)
    prompt = draw.wording(
        "Give {n} tips for {t}.", "Give me {n} tips for {t}.", "What are {n} tips for {t}?", "List {n} tips for {t}.",
        "I need {n} tips for {t}.", "Name {n} things that help with {t}.", "Can you give me {n} tips for {t}?",
        "Write {n} pieces of advice for {t}.", n=_COUNTS[count], t=topic,
    )  # fmt: skip
    answer = "\n".join(f"{number}. {tip}" for number, tip in enumerate(draw.several(_ADVICE[topic], count), start=1))
    every = "|".join(tip.rstrip(".") for tip in _ADVICE[topic])
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
