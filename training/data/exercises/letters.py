"""Exercises with letters, and with words as they are written."""

from __future__ import annotations

import re

from topkapi.training.data.exercises.exercise import Check, Draw, Exercise, Maker, is_one_of, number_is, says
from topkapi.training.data.exercises.words import (
    ADJECTIVES,
    CITIES,
    IRREGULAR_VERBS,
    NAMES,
    NOUNS,
    REGULAR_VERBS,
    a,
    number_word,
    past,
)

_ALPHABET = "abcdefghijklmnopqrstuvwxyz"
WORDS = sorted({word for word in [*NOUNS, *REGULAR_VERBS, *IRREGULAR_VERBS, *ADJECTIVES] if 3 <= len(word) <= 7})
"""Short words to spell and to sort."""
_PLACES = ("first", "second", "third", "fourth", "fifth")


def spelling(draw: Draw) -> Exercise:
    """A word letter by letter."""
    word = draw.pick(WORDS)
    prompt = draw.wording(
        'Spell the word "{w}".', "Spell {w}.", "How do you spell {w}?", 'How is the word "{w}" spelled?',
        "Spell {w} letter by letter.", "Write the letters of {w} one by one.", 'What are the letters in "{w}"?',
        "Can you spell {w}?", "Give me the spelling of {w}.", "List the letters of the word {w}.",
        "Please spell {w} for me.", "Which letters make up the word {w}?", w=word,
    )  # fmt: skip
    found = "-".join(word)
    return Exercise(prompt, found, is_one_of(found, ", ".join(word), " ".join(word)), (word,))


def letter_places(draw: Draw) -> Exercise:
    """The first or the last letter of a word."""
    word, first = draw.pick(WORDS), draw.chance(0.6)
    where, found = ("first", word[0]) if first else ("last", word[-1])
    verb = "start" if first else "end"
    prompt = draw.wording(
        'What is the {where} letter of "{w}"?', "What is the {where} letter of {w}?",
        "Which letter does {w} {verb} with?", 'Name the {where} letter of the word "{w}".',
        "With which letter does the word {w} {verb}?", "Tell me the {where} letter in {w}.",
        "What letter does the word {w} {verb} with?", "Give the {where} letter of {w}.", w=word, where=where,
        verb=verb,
    )  # fmt: skip
    answer = f'The {where} letter of "{word}" is {found}.'
    checks: list[Check] = [
        {"kind": "matches", "pattern": rf"(?i)(?<![A-Za-z'])['\"]?{found}['\"]?[.]?$"},
        {"kind": "words", "most": 12},
    ]
    return Exercise(prompt, answer, checks, (word, where), alone=found)


def letter_count(draw: Draw) -> Exercise:
    """How many letters a word has."""
    word = draw.pick(WORDS)
    prompt = draw.wording(
        'How many letters are in the word "{w}"?', "How many letters does {w} have?", "Count the letters in {w}.",
        'How many letters has the word "{w}"?', "How long is the word {w}, in letters?",
        "Tell me how many letters {w} has.", w=word,
    )  # fmt: skip
    answer = f"{'-'.join(word)}: {word} has {len(word)} letters."
    return Exercise(prompt, answer, number_is(len(word)), (word,), alone=str(len(word)))


def contains_letter(draw: Draw) -> Exercise:
    """Whether a word has a letter."""
    word = draw.pick(WORDS)
    yes = draw.chance(0.5)
    letter = draw.pick(word if yes else [each for each in "abcdefghilmnoprstuwy" if each not in word])
    prompt = draw.wording(
        'Does the word "{w}" contain the letter {l}?', "Is there the letter {l} in {w}?",
        "Does {w} have the letter {l}?", 'Is the letter "{l}" part of the word "{w}"?',
        "Does the letter {l} occur in {w}?", "Can you find the letter {l} in {w}?", w=word, l=letter,
    )  # fmt: skip
    answer = f'Yes, "{word}" contains the letter {letter}.' if yes else f'No, "{word}" has no {letter}.'
    return Exercise(prompt, answer, _yes_or_no(yes), (word, letter), alone="Yes" if yes else "No")


def _yes_or_no(yes: bool) -> list[Check]:
    return [{"kind": "starts_with", "value": "yes" if yes else "no"}]


def alphabet(draw: Draw) -> Exercise:
    """The neighbours of a letter."""
    index, after = draw.number(1, 24), draw.chance(0.6)
    where = "after" if after else "before"
    letter, found = _ALPHABET[index], _ALPHABET[index + (1 if after else -1)]
    prompt = draw.wording(
        "Which letter comes {where} {l} in the alphabet?", "What letter is {where} {l}?",
        "What comes {where} the letter {l}?", "Name the letter {where} {l}.",
        "In the alphabet, what comes {where} {l}?", "Tell me the letter that comes {where} {l}.", l=letter.upper(),
        where=where,
    )  # fmt: skip
    checks: list[Check] = [{"kind": "matches", "pattern": rf"(?i)(?<![A-Za-z'])['\"]?{found}['\"]?[.]?$"}]
    answer = f"The letter {where} {letter.upper()} is {found.upper()}."
    return Exercise(prompt, answer, checks, (letter, where), True, alone=found.upper())


def capitals(draw: Draw) -> Exercise:
    """In capital or small letters."""
    text = draw.pick((draw.pick(WORDS), " ".join(draw.several(WORDS, 2)), _short_sentence(draw)))
    if draw.chance(0.65):
        prompt = draw.wording(
            "Write in capital letters: {t}", "Put this in capitals: {t}", "Turn this into upper case: {t}",
            "Write this in upper case: {t}", "Convert to capital letters: {t}", "Say this in capital letters: {t}",
            "Change to uppercase: {t}", t=text,
        )  # fmt: skip
        found, check = text.upper(), "uppercase"
    else:
        prompt = draw.wording(
            "Write in small letters: {t}", "Put this in lower case: {t}", "Turn this into lower case: {t}",
            "Write this without capital letters: {t}", "Convert to small letters: {t}", "Change to lowercase: {t}",
            t=text.upper(),
        )  # fmt: skip
        found, check = text.lower(), "lowercase"
    return Exercise(prompt, found, [*is_one_of(found), {"kind": check}], (text, check), exact=True)


def _short_sentence(draw: Draw) -> str:
    noun, other, verb = draw.pick(NOUNS), draw.pick(NOUNS), past(draw.pick(REGULAR_VERBS))
    name, adjective = draw.pick(NAMES), draw.pick(list(ADJECTIVES))
    return draw.pick(
        (
            f"The {noun} is {adjective}.",
            f"{name} {verb} all day.",
            f"{name} lives in {draw.pick(CITIES)}.",
            f"There is {a(noun)} near the {other}.",
            f"My {noun} is very {adjective}.",
            f"The {noun} and the {other} are {adjective}.",
            f"{name} has {number_word(draw.number(2, 12))} friends.",
        )
    )


def copying(draw: Draw) -> Exercise:
    """A text word for word, once or several times."""
    text = _short_sentence(draw) if draw.chance(0.6) else draw.pick(WORDS)
    if " " not in text and draw.chance(0.6):
        times = draw.number(2, 4)
        often = {2: "twice", 3: "three times", 4: "four times"}[times]
        prompt = draw.wording(
            'Say "{t}" {often}.', 'Write the word "{t}" {often}.', "Repeat {t} {often}.", "Write {t} {often}.",
            "Say the word {t} {often}.", 'Print "{t}" {often}.', t=text, often=often,
        )  # fmt: skip
        found = " ".join([text] * times)
        return Exercise(prompt, found, is_one_of(found, ", ".join([text] * times)), (text, times), exact=True)
    prompt = draw.wording(
        "Repeat after me: {t}", "Say exactly this: {t}", 'Repeat this: "{t}"', "Copy this text: {t}", "Repeat: {t}",
        "Write this again, word for word: {t}", 'Say "{t}"', "Echo the following: {t}", "Please copy: {t}",
        t=text,
    )  # fmt: skip
    return Exercise(prompt, text, is_one_of(text), (text,), exact=True)


def reversing(draw: Draw) -> Exercise:
    """Words, letters or numbers in reverse order."""
    count = draw.number(3, 5)
    what, options = draw.pick(
        (("words", WORDS), ("letters", list(_ALPHABET)), ("numbers", [str(number) for number in range(1, 30)]))
    )
    items = draw.several(options, count)
    joint = draw.pick((", ", " "))
    prompt = draw.wording(
        "Reverse the order of these {what}: {s}", "Write these {what} in reverse order: {s}", "Reverse this list: {s}",
        "Say these {what} backwards: {s}", "Turn this list around: {s}", "Put these {what} in the opposite order: {s}",
        "List these {what} from last to first: {s}", what=what, s=joint.join(items),
    )  # fmt: skip
    found = joint.join(reversed(items))
    return Exercise(prompt, found, is_one_of(found, ", ".join(reversed(items))), tuple(items), exact=True)


def picking(draw: Draw) -> Exercise:
    """One of several words by its place."""
    items = draw.several(WORDS, draw.number(3, 5))
    index = draw.number(0, len(items) - 1)
    where = "last" if index == len(items) - 1 and draw.chance(0.7) else _PLACES[index]
    prompt = draw.wording(
        "What is the {where} word in this list: {s}?", "Which word is {where}: {s}?", "Name the {where} item: {s}",
        "What comes {where} in this list: {s}?", "Give me the {where} word of: {s}", "Pick the {where} one: {s}",
        "Tell me the {where} word: {s}", s=", ".join(items), where=where,
    )  # fmt: skip
    return Exercise(
        prompt, f"The {where} word is {items[index]}.", says(items[index], most=6), (*items, index), alone=items[index]
    )


def word_count(draw: Draw) -> Exercise:
    """How many words a list has."""
    items = draw.several(WORDS, draw.number(1, 8))
    prompt = draw.wording(
        "How many words are in this list: {s}?", "Count the words: {s}", "How many words are these: {s}?",
        "How many items are there: {s}?", "Count the items in this list: {s}", "How many words do you see here: {s}?",
        s=", ".join(items),
    )  # fmt: skip
    number = len(items)
    answer = "There is 1 word." if number == 1 else f"There are {number} words."
    return Exercise(prompt, answer, number_is(number), tuple(items), alone=str(number))


def sorting(draw: Draw) -> Exercise:
    """Words by the alphabet, numbers by size."""
    if draw.chance(0.5):
        numbers, down = draw.several(range(100), draw.number(3, 5)), draw.chance(0.3)
        order = "from largest to smallest" if down else "from smallest to largest"
        prompt = draw.wording(
            "Sort these numbers {order}: {s}", "Put these numbers in order {order}: {s}", "Arrange {order}: {s}",
            "Order these numbers {order}: {s}", "Write these numbers {order}: {s}", "List {order}: {s}",
            "Rank these {order}: {s}", order=order, s=", ".join(map(str, numbers)),
        )  # fmt: skip
        found = ", ".join(map(str, sorted(numbers, reverse=down)))
        return Exercise(prompt, found, is_one_of(found), (down, *sorted(numbers)), exact=True)
    firsts = draw.several(sorted({word[0] for word in WORDS}), draw.number(3, 4))
    items = [draw.pick([word for word in WORDS if word[0] == first]) for first in firsts]
    prompt = draw.wording(
        "Sort these words alphabetically: {s}", "Put these words in alphabetical order: {s}",
        "Sort by the alphabet: {s}", "Arrange these words from A to Z: {s}", "Order these words alphabetically: {s}",
        "Alphabetise this list: {s}", "Write these words in the order of the alphabet: {s}", s=", ".join(items),
    )  # fmt: skip
    found = ", ".join(sorted(items))
    return Exercise(prompt, found, is_one_of(found), tuple(sorted(items)), exact=True)


_SPELLED = re.compile(r"^([a-z](?:-[a-z])+)(?=: \w+ has \d)")


def with_steps(answer: str) -> str:
    """Letters that are counted one after another: 1 c, 2 a, 3 t."""
    return _SPELLED.sub(
        lambda found: ", ".join(f"{at} {letter}" for at, letter in enumerate(found[1].split("-"), start=1)), answer
    )


MAKERS: dict[str, Maker] = {
    "spelling": spelling,
    "first and last letter": letter_places,
    "counting letters": letter_count,
    "letters in words": contains_letter,
    "alphabet": alphabet,
    "capital letters": capitals,
    "copying": copying,
    "reversing": reversing,
    "picking from a list": picking,
    "counting words": word_count,
    "sorting": sorting,
}
