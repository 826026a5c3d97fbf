"""Exercises with days, months and hours."""

from __future__ import annotations

from topkapi.training.data.exercises.exercise import Draw, Exercise, Maker, number_is, says
from topkapi.training.data.exercises.words import DAYS, MONTHS, ORDINALS, number_word

_FACTS = (
    ("days", "a week", 7),
    ("months", "a year", 12),
    ("hours", "a day", 24),
    ("minutes", "an hour", 60),
    ("seconds", "a minute", 60),
    ("seasons", "a year", 4),
    ("weeks", "a year", 52),
    ("days", "a year", 365),
)


def days(draw: Draw) -> Exercise:
    """The day some days after or before another."""
    index, away = draw.number(0, 6), draw.pick((1, 1, 1, 2, 3))
    after = draw.chance(0.6)
    day, found = DAYS[index], DAYS[(index + (away if after else -away)) % 7]
    where = "after" if after else "before"
    if away == 1:
        prompt = draw.wording(
            "What day comes {where} {day}?", "Which day is {where} {day}?", "What is the day {where} {day}?",
            "Name the day that comes {where} {day}.", "Tell me the day {where} {day}.",
            "Which day of the week comes {where} {day}?", "What is the day of the week right {where} {day}?", day=day,
            where=where,
        )  # fmt: skip
        return Exercise(
            prompt, f"The day {where} {day} is {found}.", says(found), (day, where, away), True, alone=found
        )
    turn = {"after": "in {n} days", "before": "{n} days ago"}[where]
    tense = "will it be" if after else "was it"
    prompt = draw.wording(
        "Today is {day}. What day {tense} {turn}?", "If today is {day}, which day {tense} {turn}?",
        "It is {day} today. What day of the week {tense} {turn}?", "What day is {n} days {where} {day}?",
        "Which day comes {n} days {where} {day}?", "Name the day {n} days {where} {day}.",
        day=day, where=where, n=number_word(away), tense=tense, turn=turn.format(n=number_word(away)),
    )  # fmt: skip
    answer = f"{number_word(away).capitalize()} days {where} {day} is {found}."
    return Exercise(prompt, answer, says(found), (day, where, away), True, alone=found)


def tomorrow(draw: Draw) -> Exercise:
    """Today's neighbours."""
    index, ahead = draw.number(0, 6), draw.chance(0.5)
    day, found = DAYS[index], DAYS[(index + (1 if ahead else -1)) % 7]
    when, tense = ("tomorrow", "is") if ahead else ("yesterday", "was")
    prompt = draw.wording(
        "Today is {day}. What day {tense} {when}?", "If today is {day}, what {tense} {when}?",
        "It is {day} today. Which day {tense} {when}?", "Today is {day}, so {when} {tense} which day?",
        "Which day {tense} {when} if it is {day} today?", "When today is {day}, what day {tense} it {when}?",
        day=day, when=when, tense=tense,
    )  # fmt: skip
    tail = f"{when.capitalize()} {tense} {found}."
    return Exercise(prompt, tail, says(found), (day, ahead), True, alone=found)


def months(draw: Draw) -> Exercise:
    """The month after or before another, or by its number."""
    index = draw.number(0, 11)
    month = MONTHS[index]
    if draw.chance(0.35):
        prompt = draw.wording(
            "What is the {n} month of the year?", "Which month is the {n} of the year?", "Name the {n} month.",
            "Tell me the {n} month of the year.", "Which is the {n} month?", "What month comes {n} in the year?",
            n=ORDINALS[index],
        )  # fmt: skip
        return Exercise(prompt, f"The {ORDINALS[index]} month is {month}.", says(month), (month,), True, alone=month)
    where = draw.pick(("after", "before"))
    found = MONTHS[(index + (1 if where == "after" else -1)) % 12]
    prompt = draw.wording(
        "What month comes {where} {month}?", "Which month is {where} {month}?", "What is the month {where} {month}?",
        "Name the month that comes {where} {month}.", "Tell me the month {where} {month}.",
        "Which month of the year comes right {where} {month}?", month=month, where=where,
    )  # fmt: skip
    return Exercise(prompt, f"The month {where} {month} is {found}.", says(found), (month, where), True, alone=found)


def hours(draw: Draw) -> Exercise:
    """The time some hours later or earlier."""
    hour, away = draw.number(1, 12), draw.number(1, 6)
    later = draw.chance(0.6)
    found = (hour + (away if later else -away) - 1) % 12 + 1
    some = "1 hour" if away == 1 else f"{away} hours"
    if later:
        prompt = draw.wording(
            "It is {h} o'clock. What time will it be in {some}?",
            "It is {h} o'clock now. What time is it {some} later?", "What time is {some} after {h} o'clock?",
            "A film starts at {h} o'clock and lasts {some}. When does it end?",
            "I leave at {h} o'clock and travel for {some}. When do I arrive?",
            "What time comes {some} after {h} o'clock?", h=hour, some=some,
        )  # fmt: skip
    else:
        prompt = draw.wording(
            "It is {h} o'clock. What time was it {some} ago?", "What time is {some} before {h} o'clock?",
            "It is {h} o'clock now. What time was it {some} earlier?", "What time comes {some} before {h} o'clock?",
            "I came at {h} o'clock after a walk of {some}. When did I start?",
            "Which time is {some} before {h} o'clock?", h=hour, some=some,
        )  # fmt: skip
    answer = f"{found} o'clock"
    return Exercise(prompt, f"{answer}.", number_is(found), (hour, away, later), alone=answer)


def units(draw: Draw) -> Exercise:
    """How many of them another holds."""
    part, whole, number = draw.pick(_FACTS)
    prompt = draw.wording(
        "How many {part} are in {whole}?", "How many {part} are there in {whole}?",
        "How many {part} does {whole} have?", "{Whole} has how many {part}?", "Tell me how many {part} {whole} has.",
        "What number of {part} makes {whole}?", "How many {part} make {whole}?", part=part, whole=whole,
        Whole=whole.capitalize(),
    )  # fmt: skip
    answer = f"There are {number} {part} in {whole}."
    return Exercise(prompt, answer, number_is(number), (part, whole), True, alone=str(number))


MAKERS: dict[str, Maker] = {
    "days": days,
    "today and tomorrow": tomorrow,
    "months": months,
    "hours": hours,
    "units of time": units,
}
