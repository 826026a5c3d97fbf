"""Exercises in several turns: what was told earlier is asked for later."""

from __future__ import annotations

from topkapi.training.data.exercises.exercise import Draw, Exercise, Maker, assistant, number_is, says, user
from topkapi.training.data.exercises.letters import WORDS
from topkapi.training.data.exercises.words import CATEGORIES, CITIES, CLEAR, NAMES, THINGS, a

_COLOURS = CATEGORIES["colour"]
_NAMING = "what one is called"


def own_facts(draw: Draw) -> Exercise:
    """What somebody tells of themselves."""
    topic = draw.number(0, 6)
    name = draw.pick(NAMES)
    where = ""
    if topic == 0:
        told = draw.wording(
            "My name is {v}.", "I am {v}.", "Hi, I'm {v}.", "You can call me {v}.", "I am called {v}.",
            "Hello, my name is {v}!", v=name,
        )  # fmt: skip
        reply = f"Nice to meet you, {name}!"
        asked = draw.wording(
            "What is my name?", "Who am I?", "Do you remember my name?", "What's my name?", "Tell me my name.",
            "Can you say my name?", "What am I called?",
        )  # fmt: skip
        found, answer = name, f"Your name is {name}."
    elif topic == 1:
        found = draw.pick(CITIES)
        told = draw.wording(
            "I live in {v}.", "I come from {v}.", "My home is in {v}.", "I am from {v}.", "My city is {v}.",
            "I moved to {v}.", v=found,
        )  # fmt: skip
        reply = f"{found} is a nice place to live."
        asked = draw.wording(
            "Where do I live?", "Which city do I live in?", "What is my city?", "Do you remember where I live?",
            "In which city is my home?", "Tell me where I live.",
        )  # fmt: skip
        answer = f"You live in {found}."
    elif topic == 2:
        pet = draw.pick(("dog", "cat", "horse", "rabbit", "parrot"))
        found = name
        told = draw.wording(
            "My {p} is called {v}.", "I have a {p}. Its name is {v}.", "I have a {p} named {v}.",
            "My {p}'s name is {v}.", "We have a {p}, {v}.", "This is my {p} {v}.", p=pet, v=name,
        )  # fmt: skip
        reply = f"{name} is a nice name for a {pet}."
        asked = draw.wording(
            "What is my {p}'s name?", "What is my {p} called?", "Do you remember the name of my {p}?",
            "How is my {p} called?", "Tell me my {p}'s name.", "What's the name of my {p}?", p=pet,
        )  # fmt: skip
        answer = f"Your {pet} is called {name}."
    elif topic == 3:
        found = draw.pick(_COLOURS)
        told = draw.wording(
            "My favourite colour is {v}.", "I like the colour {v} best.", "The colour I like most is {v}.",
            "{V} is my favourite colour.", "I love the colour {v}.", "My favorite color is {v}.", v=found,
            V=found.capitalize(),
        )  # fmt: skip
        reply = f"{found.capitalize()} is a nice colour."
        asked = draw.wording(
            "What is my favourite colour?", "Which colour do I like best?", "Do you remember my favourite colour?",
            "What colour do I like?", "Which colour did I tell you?", "Tell me my favourite colour.",
        )  # fmt: skip
        answer = f"Your favourite colour is {found}."
    elif topic == 4:
        found = str(draw.number(10, 99))
        told = draw.wording(
            "My number is {v}.", "Remember the number {v}.", "Please keep this number in mind: {v}.",
            "The number is {v}.", "The secret number is {v}.", "I want you to remember {v}.", v=found,
        )  # fmt: skip
        reply = f"I will remember the number {found}."
        asked = draw.wording(
            "What is the number?", "Which number did I tell you?", "What was my number?", "Tell me the number.",
            "What number should you remember?", "Do you remember the number?",
        )  # fmt: skip
        answer = f"The number is {found}."
    elif topic == 5:
        found = draw.pick(CLEAR["job"])
        told = draw.wording(
            "I am {a}.", "I work as {a}.", "My job is {v}.", "I am {a} by trade.", "I have worked as {a} for years.",
            "My work? I am {a}.", v=found, a=a(found),
        )  # fmt: skip
        reply = "That is useful work."
        asked = draw.wording(
            "What is my job?", "What do I do for work?", "What am I by trade?", "Do you remember my job?",
            "What work do I do?", "Tell me what my job is.",
        )  # fmt: skip
        answer = f"You are {a(found)}."
    else:
        found, where = draw.pick(THINGS), draw.pick(("box", "bag", "cupboard", "garden", "kitchen", "drawer", "car"))
        told = draw.wording(
            "I put the {v} in the {w}.", "The {v} is in the {w}.", "I left the {v} in the {w}.",
            "My {v} is in the {w}.", "Remember: the {v} is in the {w}.", "I keep my {v} in the {w}.", v=found,
            w=where,
        )  # fmt: skip
        reply = f"I will remember: the {found} is in the {where}."
        asked = draw.wording(
            "Where is the {v}?", "Where did I put the {v}?", "Where is my {v}?", "Do you remember where the {v} is?",
            "In what place is the {v}?", "Tell me where the {v} is.", v=found,
        )  # fmt: skip
        answer = f"It is in the {where}."
    family = _NAMING if topic == 0 else ""
    about = (found,) if family else (topic, found, where)
    found = where or found
    checks = number_is(int(found)) if topic == 4 else says(found)
    return Exercise(asked, answer, checks, about, alone=found, before=[user(told), assistant(reply)], family=family)


def two_facts(draw: Draw) -> Exercise:
    """Two facts, of which one is asked for."""
    name, other = draw.several(NAMES, 2)
    first, second = draw.several(_COLOURS if draw.chance(0.5) else THINGS, 2)
    if first in _COLOURS:
        told = [f"{name} likes {first}.", f"{other} likes {second}."]
        asked = draw.wording(
            "What does {n} like?", "Which colour does {n} like?", "What colour does {n} like?",
            "And what did I say {n} likes?", "Do you know what {n} likes?", "Tell me what {n} likes.", n=name,
        )  # fmt: skip
        answer = f"{name} likes {first}."
    else:
        told = [f"{name} has {a(first)}.", f"{other} has {a(second)}."]
        asked = draw.wording(
            "What does {n} have?", "What did I say {n} has?", "Which thing does {n} have?", "What belongs to {n}?",
            "Do you remember what {n} has?", "Tell me what {n} has.", n=name,
        )  # fmt: skip
        answer = f"{name} has {a(first)}."
    draw.random.shuffle(told)
    before = [user(told[0]), assistant("I see."), user(told[1]), assistant("I will remember that.")]
    if draw.chance(0.3):
        before = [user(" ".join(told)), assistant("I will remember that.")]
    return Exercise(asked, answer, says(first), (name, other, first, second), alone=first, before=before)


def changes(draw: Draw) -> Exercise:
    """A fact that is corrected; the last word counts."""
    first, second = draw.several(NAMES, 2)
    told = draw.wording("My name is {v}.", "I am {v}.", "Hello, I am {v}.", v=first)
    changed = draw.wording(
        "Sorry, my name is {v}.", "I meant {v}, not {o}.", "No, my name is {v}.", "Please call me {v} instead.",
        "That was wrong, I am {v}.", "Actually, my name is {v}.", v=second, o=first,
    )  # fmt: skip
    asked = draw.wording(
        "What is my name?", "So what is my name?", "Who am I?", "What's my name now?", "Tell me my name.",
        "What am I called?",
    )  # fmt: skip
    before = [
        user(told),
        assistant(f"Nice to meet you, {first}!"),
        user(changed),
        assistant(f"I see, you are {second}."),
    ]
    checks = [*says(second), {"kind": "excludes", "values": [first]}]
    return Exercise(asked, f"Your name is {second}.", checks, (second,), alone=second, before=before, family=_NAMING)


def follow_ups(draw: Draw) -> Exercise:
    """A sum that goes on from the last answer."""
    first, second, more = draw.number(1, 30), draw.number(1, 30), draw.number(1, 9)
    total = first + second
    asked = draw.wording("What is {a} + {b}?", "Add {a} and {b}.", "How much is {a} plus {b}?", a=first, b=second)
    before = [user(asked), assistant(f"{first} + {second} = {total}.")]
    if draw.chance(0.6):
        prompt = draw.wording(
            "Add {n} to that.", "And plus {n}?", "Now add {n}.", "What is that plus {n}?", "And {n} more?",
            "Please add {n} to it.", n=more,
        )  # fmt: skip
        found, shown = total + more, f"{total} + {more}"
    else:
        more = min(more, total)
        prompt = draw.wording(
            "Take {n} away from that.", "And minus {n}?", "Now subtract {n}.", "What is that minus {n}?",
            "Subtract {n} from it.", "And {n} less?", n=more,
        )  # fmt: skip
        found, shown = total - more, f"{total} - {more}"
    return Exercise(prompt, f"{shown} = {found}.", number_is(found), (shown,), alone=str(found), before=before)


def repeats(draw: Draw) -> Exercise:
    """What was said, once more or in another way."""
    word = draw.pick(WORDS)
    told = draw.wording(
        'The word is "{v}".', "My word is {v}.", "Remember this word: {v}", "Keep the word {v} in mind.",
        "Please remember {v}.", "The password is {v}.", v=word,
    )  # fmt: skip
    how = draw.number(0, 2)
    if how == 0:
        prompt = draw.wording(
            "What was the word?", "Which word did I tell you?", "Say the word.", "What word should you remember?",
            "Tell me the word again.", "What did I ask you to remember?",
        )  # fmt: skip
        answer, checks = f"The word is {word}.", says(word)
    elif how == 1:
        prompt = draw.wording(
            "Write the word in capital letters.", "Say the word in capitals.", "Now write it in upper case.",
            "Write that word in upper case.", "The word in capital letters, please.", "Put it in capitals.",
        )  # fmt: skip
        answer, checks = word.upper(), [*says(word), {"kind": "uppercase"}]
    else:
        prompt = draw.wording(
            "Spell the word.", "How is the word spelled?", "Now spell it.", "Spell it letter by letter.",
            "What are its letters?", "Give me the letters of the word.",
        )  # fmt: skip
        answer = "-".join(word)
        checks = [{"kind": "one_of", "values": [answer, ", ".join(word), " ".join(word)]}]
    before = [user(told), assistant(f"I will remember the word {word}.")]
    return Exercise(prompt, answer, checks, (word, how), before=before)


MAKERS: dict[str, Maker] = {
    "memory: what you told": own_facts,
    "memory: one of two": two_facts,
    "memory: corrected": changes,
    "memory: go on from there": follow_ups,
    "memory: say it again": repeats,
}
