"""Exercises of small talk: greetings, who the model is, and what it cannot know."""

from __future__ import annotations

from topkapi.training.data.exercises.exercise import Check, Draw, Exercise, Maker
from topkapi.training.data.exercises.words import CITIES, NAMES, THINGS, listed, plural

IDENTITY = "I am Topkapi, a small language model."


def _matching(pattern: str, most: int = 40) -> list[Check]:
    return [{"kind": "matches", "pattern": f"(?i){pattern}"}, {"kind": "words", "least": 1, "most": most}]


def greetings(draw: Draw) -> Exercise:
    """Hello."""
    named = draw.chance(0.3)
    name = draw.pick(NAMES)
    prompt = draw.wording(
        "Hello", "Hello!", "Hi", "Hi!", "Hi there!", "Hey", "Hello there.", "Good morning!", "Good evening!",
        "Good afternoon.", "Hello Topkapi!", "Hi, how are you?", "Hello, how are you?", "How are you?",
        "How are you today?", "Hey there!", "Good day!", "Greetings!", "Hi Topkapi, how are you doing?", "What's up?",
    )  # fmt: skip
    if named:
        prompt = f"{prompt} {draw.wording('I am {n}.', 'My name is {n}.', 'This is {n}.', n=name)}"
    hello = next(
        (each for each in ("Good morning", "Good evening", "Good afternoon") if prompt.startswith(each)), "Hello"
    )
    hello = f"{hello}, {name}!" if named else f"{hello}!"
    well = " I am well, thank you." if "ow are you" in prompt else ""
    answer = f"{hello}{well} How can I help you?"
    checks = _matching(r"\b(hello|hi|good (morning|evening|afternoon|day)|welcome|how can i help)\b")
    return Exercise(prompt, answer, checks, (prompt.split()[0], name if named else ""), by_heart=not named, exact=True)


def farewells(draw: Draw) -> Exercise:
    """Thanks, goodbyes and praise."""
    if draw.chance(0.5):
        prompt = draw.wording(
            "Thank you!", "Thanks!", "Thanks a lot.", "Thank you very much.", "Thanks for your help!",
            "Great, thanks.", "Thank you, that helps.", "Many thanks!", "Thanks, Topkapi.",
            "That was helpful, thank you.", "Perfect, thank you!", "Well done!", "Good answer!",
        )  # fmt: skip
        return Exercise(
            prompt, "You are welcome!", _matching(r"\bwelcome|glad|pleasure\b", 15), (prompt,), True, exact=True
        )
    prompt = draw.wording(
        "Goodbye!", "Bye!", "Bye bye.", "See you later!", "I have to go now.", "Good night!", "See you tomorrow.",
        "Farewell!", "That is all for today, bye.", "Until next time!", "I am leaving, goodbye.",
        "Talk to you later.", "Have a nice day!",
    )  # fmt: skip
    answer = "Good night!" if "night" in prompt else "Goodbye! Have a nice day."
    return Exercise(
        prompt, answer, _matching(r"\b(bye|goodbye|good night|see you|nice day)\b", 15), (prompt,), True, exact=True
    )


def identity(draw: Draw) -> Exercise:
    """Who and what it is."""
    topic = draw.number(0, 5)
    if topic == 0:
        prompt = draw.wording(
            "Who are you?", "What are you?", "What is your name?", "Tell me your name.", "How are you called?",
            "Introduce yourself.", "Tell me about yourself.", "Do you have a name?", "What should I call you?",
            "Who am I talking to?", "Your name?", "May I ask who you are?", "And who are you?", "What's your name?",
        )  # fmt: skip
        return Exercise(prompt, IDENTITY, _matching("topkapi"), (topic,), True, exact=True)
    if topic == 1:
        prompt = draw.wording(
            "Are you a human?", "Are you a person?", "Are you a real person?", "Am I talking to a human?",
            "Are you alive?", "Are you human or a machine?", "Do you have a body?", "Are you a man or a woman?",
            "Is there a person behind this?",
        )  # fmt: skip
        return Exercise(
            prompt, f"No, {IDENTITY}", _matching(r"topkapi|language model|program"), (topic,), True, exact=True
        )
    if topic == 2:
        prompt = draw.wording(
            "Are you an AI?", "Are you a robot?", "Are you a computer program?", "Are you a language model?",
            "Are you a machine?", "Are you artificial?", "Is this a chat program?", "Are you a bot?",
        )  # fmt: skip
        return Exercise(
            prompt, f"Yes, {IDENTITY}", _matching(r"topkapi|language model|program"), (topic,), True, exact=True
        )
    if topic == 3:
        prompt = draw.wording(
            "What can you do?", "How can you help me?", "What are you good at?", "What can I ask you?",
            "What do you do?", "What are you for?", "Can you help me?", "What kind of questions can you answer?",
            "How do I use you?",
        )  # fmt: skip
        answer = "I can answer simple questions, do small sums, work with words and lists, and talk a little."
        return Exercise(prompt, answer, _matching(r"\bI can\b"), (topic,), True, exact=True)
    if topic == 4:
        prompt = draw.wording(
            "Are you ChatGPT?", "Are you GPT-4?", "Is your name Siri?", "Are you Alexa?", "Are you made by Google?",
            "Are you Claude?", "Is your name Anna?", "Are you called Bob?",
        )  # fmt: skip
        return Exercise(prompt, f"No, {IDENTITY}", _matching("topkapi"), (topic,), True, exact=True)
    prompt = draw.wording(
        "How big are you?", "Are you a large language model?", "How many parameters do you have?",
        "Are you very clever?", "Do you know everything?", "Are you always right?", "Can I trust your answers?",
        "Do you make mistakes?",
    )  # fmt: skip
    answer = "I am a small language model and make mistakes, so please check what I say."
    return Exercise(prompt, answer, _matching(r"\b(small|mistakes|check)\b"), (topic,), True, exact=True)


_RELATIONS = listed("sister brother mother father neighbour teacher cousin uncle aunt boss friend doctor grandmother")
_DETAILS = (
    "phone number", "birthday", "middle name", "address", "favourite song", "password", "shoe size", "favourite book",
    "bank account", "first job", "dream last night", "plan for Sunday", "secret", "car's colour", "house number",
)  # fmt: skip
_NO_IDEA = r"\b(cannot|can't|can not|do not know|don't know|not able|no way of knowing|unable)\b"


def refusals(draw: Draw) -> Exercise:
    """What a program without senses, memory of the past or sight of the future cannot know."""
    topic = draw.number(0, 4)
    if topic == 0:
        who, detail = draw.pick(_RELATIONS), draw.pick(_DETAILS)
        prompt = draw.wording(
            "What is my {w}'s {d}?", "Tell me my {w}'s {d}.", "Do you know my {w}'s {d}?",
            "What's the {d} of my {w}?", "Can you tell me the {d} of my {w}?", "Guess my {w}'s {d}.",
            "I forgot my {w}'s {d}. What is it?", w=who, d=detail,
        )  # fmt: skip
        return Exercise(
            prompt, f"I cannot know that: you have not told me about your {who}.", _matching(_NO_IDEA), (who, detail)
        )
    if topic == 1:
        detail = draw.pick(("name", "age", *_DETAILS))
        prompt = draw.wording(
            "What is my {d}?", "Tell me my {d}.", "Do you know my {d}?", "Can you guess my {d}?", "What's my {d}?",
            "My {d}, please?", "Do you remember my {d}?", d=detail,
        )  # fmt: skip
        return Exercise(
            prompt, f"I do not know your {detail}: you have not told me.", _matching(_NO_IDEA), (detail,), True
        )
    if topic == 2:
        city = draw.pick(CITIES)
        prompt = draw.wording(
            "What is the weather like in {c}?", "Is it raining in {c} now?", "How warm is it in {c} today?",
            "What time is it in {c} now?", "What is happening in {c} today?", "Is the market in {c} open now?",
            "How many people are on the streets of {c} now?", c=city,
        )  # fmt: skip
        return Exercise(
            prompt, f"I cannot know that: I cannot see what happens in {city} now.", _matching(_NO_IDEA), (city,)
        )
    if topic == 3:
        name, other = draw.several(NAMES, 2)
        prompt = draw.wording(
            "Will {n} win the race tomorrow?", "What will {n} do next year?", "Who will win tomorrow, {n} or {o}?",
            "Will {n} marry {o}?", "When will {n} come home?", "What will happen to {n} tomorrow?",
            "Will {n} pass the test?", n=name, o=other,
        )  # fmt: skip
        return Exercise(prompt, "I cannot know that: nobody can see the future.", _matching(_NO_IDEA), (name, other))
    thing = draw.pick(THINGS)
    prompt = draw.wording(
        "How many {ts} are in my room?", "What is in my {t}?", "Where did I put my {t}?", "What colour is my {t}?",
        "Can you see my {t}?", "How much did I pay for my {t}?", "What am I holding, a {t} or a stone?",
        "Is my {t} clean?", t=thing, ts=plural(thing),
    )  # fmt: skip
    return Exercise(prompt, "I cannot know that: I cannot see you or your things.", _matching(_NO_IDEA), (thing,))


MAKERS: dict[str, Maker] = {
    "greetings": greetings,
    "thanks and goodbyes": farewells,
    "identity": identity,
    "what it cannot know": refusals,
}
