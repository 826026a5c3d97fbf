"""Rows of exercises: conversations that `finetune` trains on and `evaluate` checks, in an order that the seed decides.

Of every kind of exercise some contents (numbers, names, words) and some wordings are kept from training, whatever the
seed: what is held out shares no question with what is trained on.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from random import Random
from typing import Any

from topkapi.training.data.exercises import (
    beyond,
    calendar,
    drill,
    followups,
    grammar,
    letters,
    manners,
    meaning,
    memory,
    numbers,
    openings,
    reading,
    school,
    talk,
    writing,
)
from topkapi.training.data.exercises.exercise import (
    Draw,
    Exercise,
    Maker,
    Message,
    assistant,
    is_held_out,
    is_one_of,
    user,
)
from topkapi.training.data.exercises.typed import spelling

_AREAS = (numbers, calendar, letters, grammar, school, meaning, reading, writing, talk, memory)
_BASICS: dict[str, Maker] = {kind: maker for area in _AREAS for kind, maker in area.MAKERS.items()}
_MANNERS = manners.MAKERS | followups.MAKERS
_DRILL = drill.MAKERS
_POLISH = drill.AFTERWARDS
_OPENINGS = openings.MAKERS
_REVIEW = openings.AFTERWARDS
_SAID = openings.SAID | drill.SAID
_BEYOND = beyond.MAKERS
_AS_TYPED = _MANNERS | _DRILL | _POLISH | _OPENINGS | _REVIEW | _SAID | _BEYOND
MAKERS: dict[str, Maker] = _BASICS | _AS_TYPED
"""Every kind of exercise with what makes one."""
GROUPS = {
    "basics": tuple(_BASICS),
    "manners": tuple(_MANNERS),
    "drill": tuple(_DRILL),
    "polish": tuple(_POLISH),
    "openings": tuple(_OPENINGS),
    "review": tuple(_REVIEW),
    "said": tuple(_SAID),
    "beyond": tuple(_BEYOND),
}
"""Kinds that go together, by a name for them."""

# Kinds with more to learn come more often.
_WEIGHTS = dict.fromkeys(memory.MAKERS, 2.0) | {
    "addition": 4, "subtraction": 3, "multiplication": 2, "comparing numbers": 2, "number stories": 2, "spelling": 3,
    "copying": 2, "sorting": 2, "definitions": 2, "identity": 1.5, "what it cannot know": 1.5,
} | {
    "first words": 17, "last words": 12, "who it is": 15, "what it can do": 8, "small talk": 12, "insults": 3,
    "single words": 5, "other languages": 5, "honest answers": 32, "capitals of countries": 10, "small facts": 14,
    "sums as typed": 18, "small problems": 7, "open questions": 8, "jokes": 5, "verses": 4, "follow-ups": 13,
    "older ones as typed": 16,
} | {
    "first words, more": 18, "last words, more": 14, "who it is, more": 12, "scorn and praise": 8,
    "after a greeting": 8, "typed in haste": 10, "differences": 44, "problems of one step": 14,
    "problems of several steps": 5, "close differences": 6, "phrases of other languages": 4,
    "first words, wider": 10, "last words, wider": 10, "who it is, wider": 6, "one word or another": 7,
    "openings in haste": 4, "requests in haste": 4,
    "first and last words, afterwards": 8, "struck at random": 2, "greetings of other languages": 1,
    "as people said it": 6, "one after another": 3, "products in words": 3,
    "as others said it": 12, "others one after another": 4, "names never heard": 5, "names asked again": 2,
    "quotients": 4, "sums in words": 4, "sums too large": 3, "capitals of others": 3, "capitals backwards": 3,
}  # fmt: skip

_ALONE = 0.2
_WRAPPED = 0.3
_EARLIER_TURNS = 0.15
_EARLIER_BEFORE_MANNERS = 0.05
_BETWEEN = 0.35
_SYSTEM = 0.05

_SYSTEM_MESSAGES = (
    "You are a helpful assistant.",
    "You are Topkapi, a small language model.",
    "Answer briefly.",
    "Be polite and brief.",
    "You are Topkapi. You answer simple questions.",
    "You are a friendly assistant.",
)


def make_rows(
    seed: int,
    count: int,
    *,
    held_out: bool,
    kinds: Iterable[str] = MAKERS,
    without: Container[str] = (),
    steps: bool = False,
) -> Iterator[dict[str, Any]]:
    """`count` rows: `messages`, their `kind`, the `checks` of the last answer, and whether its `wording` is `seen` in
    training or `new`. They ask different things, save that the commonest words of `manners` come again in training. No
    user of them says anything whose `spelling` is among those of `without`. With `steps` the answers of sums and counts
    say what one writes down on the way.

    Rows that are held out take the `kinds` in turn, others by their weights. The first N rows do not depend on `count`.
    """
    random = Random(f"exercises {seed} {held_out}")
    kinds = list(kinds)
    weights = [_WEIGHTS.get(kind, 1.0) for kind in kinds]
    seen: set[str] = set()
    made = 0
    while made < count:
        turn = random.sample(kinds, len(kinds)) if held_out else random.choices(kinds, weights, k=64)
        for kind in turn[: count - made]:
            row = _row(kind, random, held_out)
            again = kind in _AS_TYPED and not held_out
            # Earlier turns are always new in the end. What everybody says is trained on as often as it is said.
            while ((asked := repr(row["messages"][:-1])) in seen and not again) or _says(row, without):
                row = _row(kind, random, held_out)
            seen.add(asked)
            made += 1
            yield _with_steps(row) if steps else row


def _with_steps(row: dict[str, Any]) -> dict[str, Any]:
    messages = [
        assistant(letters.with_steps(numbers.with_steps(told["content"]))) if told["role"] == "assistant" else told
        for told in row["messages"]
    ]
    return row | {"messages": messages}


def _says(row: dict[str, Any], without: Container[str]) -> bool:
    return any(spelling(told["content"]) in without for told in row["messages"] if told["role"] == "user")


def _exercise(kind: str, random: Random, held_out: bool) -> tuple[Exercise, bool]:
    """One on the right side of the split, and whether its wording is kept from training."""
    while True:
        draw = Draw(random, held_out)
        exercise = MAKERS[kind](draw)
        if is_held_out(kind, exercise, draw) == held_out:
            return _asked_for_alone(exercise, draw), draw.new_wording


def _row(kind: str, random: Random, held_out: bool) -> dict[str, Any]:
    exercise, new = _exercise(kind, random, held_out)
    earlier = list(exercise.before)
    if not earlier and random.random() < (_EARLIER_BEFORE_MANNERS if kind in _AS_TYPED else _EARLIER_TURNS):
        earlier = [turn for _ in range(random.randint(1, 2)) for turn in _exchange(kind, random, held_out)]
    elif earlier and kind not in ("memory: go on from there", *_AS_TYPED) and random.random() < _BETWEEN:
        earlier += _exchange(kind, random, held_out)
    if not held_out and random.random() < _SYSTEM:
        earlier.insert(0, {"role": "system", "content": random.choice(_SYSTEM_MESSAGES)})
    return {
        "messages": [*earlier, user(_wrapped(exercise, random)), assistant(exercise.answer)],
        "kind": kind,
        "wording": "new" if new else "seen",
        "checks": exercise.checks,
    }


def _exchange(kind: str, random: Random, held_out: bool) -> list[Message]:
    """A question with its answer that says nothing about the user, to stand before or between others."""
    apart = {*memory.MAKERS, *talk.MAKERS, *(reading.MAKERS if kind in memory.MAKERS else ())}
    if kind in ("identity", "thanks and goodbyes", "addition", "spelling"):
        apart.discard("greetings")
    exercise, _ = _exercise(random.choice([each for each in _BASICS if each not in apart]), random, held_out)
    return [user(exercise.prompt), assistant(exercise.answer)]


def _asked_for_alone(exercise: Exercise, draw: Draw) -> Exercise:
    """Sometimes the answer is wanted without a sentence around it."""
    found = exercise.alone
    if found is None or not draw.chance(_ALONE):
        return exercise
    wanted: tuple[str, ...]
    if found in ("Yes", "No"):
        wanted = ("Answer yes or no.", "Just yes or no.", "Answer with yes or no only.")
    elif found.isdigit():
        wanted = ("Answer with the number only.", "Just the number.", "Give only the number.")
    elif " " not in found:
        wanted = ("Answer in one word.", "Just one word.", "Give a one-word answer.", "Only one word, please.")
    else:
        wanted = ("Give only the answer.", "Just the answer.", "No full sentence, please.")
    request = draw.pick(wanted)
    ended = exercise.prompt.endswith((".", "?", "!"))
    exercise.prompt = f"{exercise.prompt} {request}" if ended and draw.chance(0.7) else f"{request} {exercise.prompt}"
    exercise.answer, exercise.checks = found, is_one_of(found)
    return exercise


def _wrapped(exercise: Exercise, random: Random) -> str:
    """The question, sometimes in the middle of politeness or carelessly typed."""
    prompt = exercise.prompt
    if exercise.exact or random.random() >= _WRAPPED:
        return prompt
    ended = prompt.endswith((".", "?", "!"))
    wraps = [
        f"Question: {prompt}", f"Please tell me: {prompt}", f"Quick question: {prompt}", f"Hi! {prompt}", f"{prompt} ",
        f"I have a question. {prompt}", f"Please help me: {prompt}", f"Hello Topkapi. {prompt}", f"OK. {prompt}",
        f"Next: {prompt}", f"Please answer this. {prompt}", f"Can you help? {prompt}", f"One more: {prompt}",
    ]  # fmt: skip
    if ended:
        wraps += [
            f"{prompt} Thanks!",
            f"{prompt} Thank you.",
            f"{prompt} Please.",
            prompt[:-1],
            prompt.lower(),
            prompt[:-1].lower(),
        ]
    else:
        wraps += [f"{prompt}.", f"{prompt} please"]
    return random.choice(wraps)
