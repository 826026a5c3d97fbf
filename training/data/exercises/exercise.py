"""What one exercise is, and the draws that make it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from random import Random
from typing import Any, TypeVar

T = TypeVar("T")
Check = dict[str, Any]
Message = dict[str, str]

# One wording in so many is kept from training, and of what a question is about one in so many.
_WORDINGS_PER_NEW = 6
_CONTENTS_PER_HELD_OUT = 8


@dataclass
class Exercise:
    """A question with its answer, and the checks (as `evaluate` reads them) that every right answer keeps.

    `about` is what decides the answer: equal ones are all trained on or all held out. `by_heart` are those that nothing
    but the answer itself could teach (the opposite of hot): there the wording counts too, so that what is held out was
    trained on in other words. `alone` is the answer without a sentence around it, if there is one. `exact` questions
    lose their sense by a change of letters or of what ends them. `before` are earlier turns. What is about the same in
    several kinds is of one `family`, on the same side in all of them.
    """

    prompt: str
    answer: str
    checks: list[Check]
    about: tuple[object, ...]
    by_heart: bool = False
    alone: str | None = None
    exact: bool = False
    before: list[Message] = field(default_factory=list)
    family: str = ""


class Draw:
    """Random choices, reproducible by `random`; held out or for training."""

    def __init__(self, random: Random, held_out: bool) -> None:
        self.random, self.held_out = random, held_out
        self.wordings: list[str] = []

    def pick(self, options: Sequence[T]) -> T:
        """One of them."""
        return self.random.choice(options)

    def several(self, options: Sequence[T], count: int) -> list[T]:
        """Different ones, in random order."""
        return self.random.sample(options, count)

    def number(self, low: int, high: int) -> int:
        """From `low` to `high`, both included."""
        return self.random.randint(low, high)

    def chance(self, probability: float) -> bool:
        """True that often."""
        return self.random.random() < probability

    def wording(self, *wordings: str, **values: object) -> str:
        """One of the wordings, filled with `values`; for training, none of those that are kept from it."""
        return self.one_of(wordings).format(**values)

    def one_of(self, wordings: Sequence[str]) -> str:
        """One of the wordings as it stands; for training, none of those that are kept from it."""
        kept = new_wordings(tuple(wordings))
        chosen = self.pick(wordings if self.held_out else [each for each in wordings if each not in kept])
        self.wordings.append(("new: " if chosen in kept else "") + chosen)
        return chosen

    @property
    def new_wording(self) -> bool:
        """Whether a wording was drawn that is kept from training."""
        return any(wording.startswith("new: ") for wording in self.wordings)


@cache
def new_wordings(wordings: tuple[str, ...]) -> frozenset[str]:
    """Those that are kept from training; none of a few."""
    return frozenset(sorted(wordings, key=_digest)[: len(wordings) // _WORDINGS_PER_NEW])


def is_held_out(kind: str, exercise: Exercise, draw: Draw) -> bool:
    """On which side of the split an exercise is; a function of what it is about, not of any seed."""
    if exercise.by_heart and draw.new_wording:
        return True
    said = draw.wordings if exercise.by_heart else ()
    return _digest(repr((exercise.family or kind, exercise.about, *said))) % _CONTENTS_PER_HELD_OUT == 0


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest())


Maker = Callable[[Draw], Exercise]


def number_is(value: int) -> list[Check]:
    """The last number of the answer is this one."""
    return [{"kind": "number", "value": value}]


def says(*words: str, most: int = 16) -> list[Check]:
    """These words occur, each as a word, in an answer of few."""
    return [*({"kind": "frequency", "text": word, "least": 1} for word in words), {"kind": "words", "most": most}]


def is_one_of(*answers: str) -> list[Check]:
    """The answer is one of these, but for case and a full stop."""
    return [{"kind": "one_of", "values": list(answers)}]


def user(content: str) -> Message:
    """A turn of the user."""
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    """An answer."""
    return {"role": "assistant", "content": content}
