"""Exercises with numbers up to a hundred."""

from __future__ import annotations

import re

from topkapi.training.data.exercises.exercise import Draw, Exercise, Maker, is_one_of, number_is, says
from topkapi.training.data.exercises.words import NAMES, THINGS, number_word, plural


def addition(draw: Draw) -> Exercise:
    """Two numbers, half of the time of one digit."""
    first, second = (draw.number(0, 9), draw.number(0, 9)) if draw.chance(0.5) else _two(draw)
    prompt = draw.wording(
        "What is {a} + {b}?", "{a} + {b} = ?", "{a}+{b}", "Add {a} and {b}.", "Calculate {a} plus {b}.",
        "What is the sum of {a} and {b}?", "How much is {a} plus {b}?", "Work out {a} + {b}.",
        "{a} plus {b} is what?", "What do {a} and {b} make together?", "Find the sum: {a} + {b}",
        "If you add {b} to {a}, what do you get?", "Compute {a} + {b}.", "Solve: {a} + {b}",
        "How much do {a} and {b} add up to?", "I need the total of {a} and {b}.", "What number is {b} more than {a}?",
        "Evaluate {a} + {b}.", a=first, b=second,
    )  # fmt: skip
    total = first + second
    about = (min(first, second), max(first, second))
    return Exercise(prompt, f"{first} + {second} = {total}.", number_is(total), about, alone=str(total))


def _two(draw: Draw) -> tuple[int, int]:
    first = draw.number(1, 90)
    return first, draw.number(1, 99 - first)


def subtraction(draw: Draw) -> Exercise:
    """A number from a larger one."""
    first = draw.number(1, 18) if draw.chance(0.5) else draw.number(10, 99)
    second = draw.number(0, first)
    prompt = draw.wording(
        "What is {a} - {b}?", "{a} - {b} = ?", "{a}-{b}", "Subtract {b} from {a}.", "Calculate {a} minus {b}.",
        "How much is {a} minus {b}?", "Work out {a} - {b}.", "What is the difference between {a} and {b}?",
        "Take {b} away from {a}.", "What is left when you take {b} from {a}?", "Compute {a} - {b}.", "Solve: {a} - {b}",
        "What number is {b} less than {a}?", "{a} minus {b} is what?", "Evaluate {a} - {b}.",
        a=first, b=second,
    )  # fmt: skip
    left = first - second
    return Exercise(prompt, f"{first} - {second} = {left}.", number_is(left), (first, second), alone=str(left))


def multiplication(draw: Draw) -> Exercise:
    """The table up to ten."""
    first, second = draw.number(1, 10), draw.number(1, 10)
    prompt = draw.wording(
        "What is {a} x {b}?", "What is {a} times {b}?", "{a} * {b} = ?", "Multiply {a} by {b}.", "Calculate {a} * {b}.",
        "How much is {a} times {b}?", "Work out {a} x {b}.", "What is the product of {a} and {b}?", "{a} times {b}",
        "Compute {a} x {b}.", "What do you get when you multiply {a} and {b}?", "Solve: {a} * {b}",
        a=first, b=second,
    )  # fmt: skip
    product = first * second
    return Exercise(
        prompt, f"{first} x {second} = {product}.", number_is(product), (first, second), True, alone=str(product)
    )


def doubling(draw: Draw) -> Exercise:
    """Twice a number, or half of it."""
    number = draw.number(1, 30)
    if draw.chance(0.5):
        prompt = draw.wording(
            "What is twice {n}?", "Double {n}.", "What is the double of {n}?", "How much is {n} doubled?",
            "What is two times {n}?", "Tell me the double of {n}.", n=number,
        )  # fmt: skip
        return Exercise(
            prompt, f"Twice {number} is {2 * number}.", number_is(2 * number), (number,), True, alone=str(2 * number)
        )
    prompt = draw.wording(
        "What is half of {n}?", "Halve {n}.", "How much is half of {n}?", "Tell me half of {n}.", "What is {n} halved?",
        "Divide {n} by 2.", n=2 * number,
    )  # fmt: skip
    return Exercise(
        prompt, f"Half of {2 * number} is {number}.", number_is(number), (number, "half"), True, alone=str(number)
    )


def comparing(draw: Draw) -> Exercise:
    """The largest or the smallest of two or three numbers."""
    numbers = draw.several(range(100), draw.pick((2, 2, 3)))
    largest = draw.chance(0.5)
    found = max(numbers) if largest else min(numbers)
    word, other = ("larger", "bigger") if largest else ("smaller", "lower")
    if len(numbers) == 3:
        word, other = ("largest", "biggest") if largest else ("smallest", "lowest")
    listed = " or ".join(map(str, numbers)) if len(numbers) == 2 else "{}, {} or {}".format(*numbers)
    prompt = draw.wording(
        "Which is {word}, {listed}?", "Which number is {word}: {listed}?", "What is {word}: {listed}?",
        "Which of these numbers is {other}: {listed}?", "Is {listed} the {word} number?",
        "{listed}: which is {other}?", "Tell me which number is {word}, {listed}.",
        "Pick the {word} number: {listed}.", "Find the {word} number: {listed}.", "Of {listed}, which is {other}?",
        "Say which is {other}: {listed}.", "Choose the {word} one: {listed}", word=word, other=other, listed=listed,
    )  # fmt: skip
    about = (tuple(sorted(numbers)), largest)
    return Exercise(prompt, f"The {word} number is {found}.", number_is(found), about, alone=str(found))


def counting(draw: Draw) -> Exercise:
    """From one number to another, up or down."""
    first, steps = draw.number(0, 30), draw.number(2, 9)
    numbers = list(range(first, first + steps + 1))
    backwards = draw.chance(0.25)
    if backwards:
        numbers.reverse()
        prompt = draw.wording(
            "Count backwards from {a} to {b}.", "Count down from {a} to {b}.", "Count back from {a} to {b}.",
            "Write the numbers from {a} down to {b}.", "List the numbers from {a} down to {b}.",
            "Say the numbers backwards from {a} to {b}.", a=numbers[0], b=numbers[-1],
        )  # fmt: skip
    else:
        prompt = draw.wording(
            "Count from {a} to {b}.", "Write the numbers from {a} to {b}.", "List all numbers from {a} to {b}.",
            "Say the numbers {a} to {b}.", "Count up from {a} to {b}.", "Can you count from {a} to {b}?",
            "Which numbers come from {a} to {b}?", "Give me the numbers between {a} and {b}, both included.",
            a=numbers[0], b=numbers[-1],
        )  # fmt: skip
    answer = ", ".join(map(str, numbers))
    return Exercise(prompt, f"{answer}.", is_one_of(answer), (numbers[0], numbers[-1]))


def neighbours(draw: Draw) -> Exercise:
    """The number after or before one."""
    number, after = draw.number(1, 98), draw.chance(0.5)
    where = "after" if after else "before"
    found = number + 1 if after else number - 1
    prompt = draw.wording(
        "What number comes {where} {n}?", "Which number comes just {where} {n}?", "What comes {where} {n}?",
        "Name the number that comes right {where} {n}.", "Tell me the number {where} {n}.",
        "What is the number {where} {n}?", "When counting, which number comes {where} {n}?", n=number, where=where,
    )  # fmt: skip
    return Exercise(
        prompt, f"The number {where} {number} is {found}.", number_is(found), (number, after), alone=str(found)
    )


def parity(draw: Draw) -> Exercise:
    """Even or odd."""
    number = draw.number(0, 99)
    found, other = ("even", "odd") if number % 2 == 0 else ("odd", "even")
    prompt = draw.wording(
        "Is {n} even or odd?", "Is {n} odd or even?", "Is the number {n} an even or an odd number?",
        "{n}: even or odd?", "Tell me whether {n} is even or odd.", "Say if {n} is odd or even.",
        "What is {n}, even or odd?", n=number,
    )  # fmt: skip
    checks = [*says(found), {"kind": "excludes", "values": [other]}]
    return Exercise(prompt, f"{number} is {found}.", checks, (number,), alone=found)


def number_words(draw: Draw) -> Exercise:
    """Digits to words, or words to digits."""
    number = draw.number(0, 99)
    word = number_word(number)
    if draw.chance(0.5):
        prompt = draw.wording(
            "Write {n} in words.", "How do you write {n} in words?", "Spell the number {n} in words.",
            "What is {n} in words?", "Write the number {n} as a word.", "Say {n} in letters.", n=number,
        )  # fmt: skip
        return Exercise(prompt, word, is_one_of(word, word.replace("-", " ")), (number, "words"))
    prompt = draw.wording(
        "Write {w} as a number.", "What is {w} in digits?", "Write {w} in digits.", "Which number is {w}?",
        "Turn {w} into digits.", "Give {w} as digits.", w=word,
    )  # fmt: skip
    return Exercise(prompt, str(number), is_one_of(str(number)), (number, "digits"))


def sequences(draw: Draw) -> Exercise:
    """What comes next, by steps of one size."""
    first, step = draw.number(0, 30), draw.pick((1, 2, 2, 3, 5, 10, 10))
    numbers = [first + step * index for index in range(draw.number(3, 5))]
    found = numbers[-1] + step
    prompt = draw.wording(
        "What comes next: {s}?", "What is the next number: {s}?", "Continue the sequence: {s}",
        "Which number follows: {s}?", "Find the next number in the sequence {s}.",
        "Complete the series with one number: {s}, ?", "{s}, ... What is next?", s=", ".join(map(str, numbers)),
    )  # fmt: skip
    return Exercise(prompt, f"The next number is {found}.", number_is(found), (first, step), alone=str(found))


def stories(draw: Draw) -> Exercise:
    """Small sums told as stories."""
    name, thing = draw.pick(NAMES), draw.pick(THINGS)
    things = plural(thing)
    first = draw.number(2, 20)
    if draw.chance(0.5):
        second = draw.number(2, 20)
        prompt = draw.wording(
            "{name} has {a} {things} and gets {b} more. How many {things} does {name} have now?",
            "{name} has {a} {things}. A friend gives {name} {b} more. How many {things} are there now?",
            "{name} finds {a} {things} in the morning and {b} in the evening. How many is that in all?",
            "There are {a} {things} in a box. {name} puts in {b} more. How many {things} are in the box?",
            "{name} buys {a} {things} today and {b} tomorrow. How many {things} is that together?",
            "If {name} has {a} {things} and buys {b} more, how many {things} does {name} have?",
            name=name, a=first, b=second, things=things,
        )  # fmt: skip
        found, shown = first + second, f"{first} + {second}"
    else:
        second = draw.number(1, first - 1)
        prompt = draw.wording(
            "{name} has {a} {things} and gives away {b}. How many {things} are left?",
            "{name} has {a} {things} and loses {b} of them. How many {things} does {name} have now?",
            "There are {a} {things} on the table. {name} takes {b}. How many remain?",
            "{name} had {a} {things} and sold {b}. How many {things} does {name} still have?",
            "Of {a} {things}, {b} are broken. How many are not?",
            "If {name} has {a} {things} and loses {b}, how many {things} are left?",
            name=name, a=first, b=second, things=things,
        )  # fmt: skip
        found, shown = first - second, f"{first} - {second}"
    return Exercise(prompt, f"{shown} = {found}. The answer is {found}.", number_is(found), (shown,), alone=str(found))


_SUM = re.compile(r"(?<!\d)(\d+) ([+-]) (\d+) = (?=\d+\b(?! [+-]))")
_TWICE = re.compile(r"(?<=^Twice )(\d+) is (?=\d)")
_ROUND = re.compile(r"(?<=^2 x )\((\d+) \+ (\d+)\) = ")


def with_steps(answer: str) -> str:
    """An answer with what one writes down on the way: 25 + 16 = 30 + 11 = 41, where tens are carried or borrowed."""
    answer = _SUM.sub(lambda found: found[0] + _tens_and_ones(int(found[1]), found[2], int(found[3])), answer)
    answer = _TWICE.sub(lambda found: found[0] + _tens_and_ones(int(found[1]), "+", int(found[1])), answer)
    return _ROUND.sub(lambda found: f"{found[0]}2 x {int(found[1]) + int(found[2])} = ", answer)


def _tens_and_ones(first: int, sign: str, second: int) -> str:
    if sign == "+":
        tens, ones = first // 10 * 10 + second // 10 * 10, first % 10 + second % 10
        return f"{tens} + {ones} = " if tens and ones > 9 else ""
    tens, ones = first // 10 * 10 - second // 10 * 10, first % 10 - second % 10
    # The smallest are known by heart, and one step is no shorter than the sum itself.
    return f"{tens} - {-ones} = " if ones < 0 and first >= 20 and (first % 10 or second > 9) else ""


MAKERS: dict[str, Maker] = {
    "addition": addition,
    "subtraction": subtraction,
    "multiplication": multiplication,
    "doubling and halving": doubling,
    "comparing numbers": comparing,
    "counting": counting,
    "next number": neighbours,
    "even or odd": parity,
    "number words": number_words,
    "sequences": sequences,
    "number stories": stories,
}
