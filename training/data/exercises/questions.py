"""Open questions: no rule can check their answers, but a larger model can give them, and they ask for no facts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random

from topkapi.training.data.exercises.exercise import Draw
from topkapi.training.data.exercises.words import ADJECTIVES, CLEAR, THINGS, a, listed, plural, tables

_TABLES = tables("questions.yaml")
_SCENES, _FEELINGS = listed(_TABLES["scenes"]), listed(_TABLES["feelings"])
_PEOPLE, _OCCASIONS, _TASKS, _EVENTS = (_TABLES[name] for name in ("people", "occasions", "tasks", "events"))


def _about_things(draw: Draw) -> str:
    thing = draw.pick(THINGS)
    return draw.wording(
        "Describe {a}.", "Describe {a} in two sentences.", "What can you do with {a}?",
        "Write two sentences about {a}.", "Why do people like {many}?", "What is {a} good for?",
        "How would you explain {a} to a child?", "Where do you find {a}?", "Write an advertisement for {a}.",
        "What do {many} look like?", a=a(thing), many=plural(thing),
    )  # fmt: skip


def _about_beings(draw: Draw) -> str:
    if draw.chance(0.5):
        being = draw.pick([*CLEAR["animal"], *CLEAR["bird"]])
        return draw.wording(
            "Describe {a}.", "What do you like about {many}?", "Suggest a name for {a}.",
            "Write two sentences about {a}.", "What would {a} say if it could speak?", "How should one treat {a}?",
            "Write a short poem about {a}.", a=a(being), many=plural(being),
        )  # fmt: skip
    job = draw.pick(CLEAR["job"])
    return draw.wording(
        "What does {a} do?", "Describe the work of {a}.", "What does {a} need for the work?", "Why is {a} important?",
        "Describe a day in the life of {a}.", "What would you ask {a}?", "What should one learn to become {a}?",
        a=a(job),
    )  # fmt: skip


def _about_places(draw: Draw) -> str:
    return draw.wording(
        "Describe {a}.", "Write a short poem about {a}.", "What can you see at {a}?",
        "Write two sentences about {a} at night.", "Why would somebody visit {a}?", "What sounds do you hear at {a}?",
        "Describe {a} in the morning.", "Begin a story that takes place at {a}.", a=a(draw.pick(_SCENES)),
    )  # fmt: skip


def _about_feelings(draw: Draw) -> str:
    return draw.wording(
        "What would you say to a friend who is {f}?", "I am {f}. What should I do?",
        "How do you know that somebody is {f}?", "I feel {f} today.", "My friend is {f}. How can I help?",
        "Write a kind message to somebody who is {f}.", "What helps when one is {f}?", f=draw.pick(_FEELINGS),
    )  # fmt: skip


def _about_ideas(draw: Draw) -> str:
    return draw.wording(
        "Give three ideas for {o}.", "What do I need for {o}?", "Suggest something for {o}.",
        "Give me some tips for {o}.", "How do I plan {o}?", "What should I not forget for {o}?",
        "Can you help me with {o}?", o=draw.pick(_OCCASIONS),
    )  # fmt: skip


def _about_tasks(draw: Draw) -> str:
    return draw.wording(
        "How do you {t}?", "Explain how to {t}.", "Tell me how to {t} in two sentences.",
        "What is the best way to {t}?", "What do I need to {t}?", "Why is it useful to know how to {t}?",
        "Teach me to {t}.", t=draw.pick(_TASKS),
    )  # fmt: skip


def _about_messages(draw: Draw) -> str:
    return draw.wording(
        "Write a short message to {p} about {e}.", "Write a polite note to {p} about {e}.",
        "How do I tell {p} about {e}?", "Help me write to {p} about {e}.",
        "Write two friendly sentences to {p} about {e}.", "What can I say to {p} about {e}?", p=draw.pick(_PEOPLE),
        e=draw.pick(_EVENTS),
    )  # fmt: skip


def _about_differences(draw: Draw) -> str:
    first, second = draw.several(
        CLEAR[draw.pick(("animal", "bird", "fruit", "vegetable", "tool", "job", "instrument"))], 2
    )
    return draw.wording(
        "What is the difference between {x} and {y}?", "How does {x} differ from {y}?",
        "What do {x} and {y} have in common?", "Which would you rather have, {x} or {y}? Say why.",
        "Compare {x} and {y}.", "Would you choose {x} or {y}?", x=a(first), y=a(second),
    )  # fmt: skip


def _about_qualities(draw: Draw) -> str:
    return draw.wording(
        "Name something that is {q}.", "What does it mean to be {q}?", "Write a sentence with the word {q}.",
        "When is it good to be {q}?", "Describe something {q}.", "Give an example of something {q}.",
        q=draw.pick(list(ADJECTIVES)),
    )  # fmt: skip


_TOPICS: tuple[Callable[[Draw], str], ...] = (
    _about_things, _about_beings, _about_places, _about_feelings, _about_ideas, _about_tasks, _about_messages,
    _about_differences, _about_qualities,
)  # fmt: skip


def open_question(draw: Draw) -> str:
    """One of them."""
    return draw.pick(_TOPICS)(draw)


def open_questions(seed: int) -> Iterator[str]:
    """Different questions, as many as there are; the seed decides their order."""
    draw = Draw(Random(f"questions {seed}"), held_out=False)
    seen: set[str] = set()
    repeated = 0
    # All are nearly exhausted when so many in a row have come before.
    while repeated < 1000:
        question = open_question(draw)
        repeated = repeated + 1 if question in seen else 0
        if not repeated:
            seen.add(question)
            yield question
