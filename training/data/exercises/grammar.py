"""Exercises with the forms of words and sentences."""

from __future__ import annotations

from topkapi.training.data.exercises.exercise import Check, Draw, Exercise, Maker, is_one_of, says
from topkapi.training.data.exercises.words import (
    ACTION_PARTICIPLES,
    ACTIONS,
    ADJECTIVES,
    CLEAR,
    IRREGULAR_PLURALS,
    IRREGULAR_VERBS,
    MEN,
    NAMES,
    NOUNS,
    OPPOSITES,
    REGULAR_VERBS,
    SYNONYMS,
    WOMEN,
    a,
    listed,
    past,
    plural,
    third_person,
)

_BEINGS = [*CLEAR["animal"], *CLEAR["bird"], *CLEAR["job"], "boy", "girl", "king", "queen", "friend", "neighbour"]
_MOODS = listed(
    "happy sad tired hungry late ready busy ill angry cold lucky kind rich brave quiet clever strong afraid"
)
_PLACES = ["at home", "in the garden", "at school", "in the kitchen", "on the bus", "in town", "at work", "in the park"]
_VERBS = [verb for verb in REGULAR_VERBS if verb not in ("use", "knock")]


def plurals(draw: Draw) -> Exercise:
    """Of a noun."""
    noun = draw.pick(list(IRREGULAR_PLURALS) if draw.chance(0.3) else NOUNS)
    prompt = draw.wording(
        'What is the plural of "{w}"?', "What is the plural of {w}?", "Give the plural of {w}.",
        "Write the plural of {w}.", "One {w}, two what?", "Make this word plural: {w}",
        "How do you say more than one {w}?", "Plural of {w}?", 'Change "{w}" to its plural form.',
        "Turn {w} into the plural.", w=noun,
    )  # fmt: skip
    found = plural(noun)
    irregular = noun in IRREGULAR_PLURALS
    return Exercise(prompt, f"The plural of {noun} is {found}.", says(found), (noun,), irregular, alone=found)


def past_tense(draw: Draw) -> Exercise:
    """Of a verb."""
    irregular = draw.chance(0.5)
    verb = draw.pick(list(IRREGULAR_VERBS) if irregular else REGULAR_VERBS)
    prompt = draw.wording(
        'What is the past tense of "{w}"?', "What is the past tense of {w}?", "Give the past tense of {w}.",
        "Past tense of {w}?", "Write the past tense of the verb {w}.", "Put the verb {w} in the past tense.",
        "Today I {w}, yesterday I what?", 'Change "{w}" to the past.', "How do you say {w} in the past?", w=verb,
    )  # fmt: skip
    found = past(verb)
    return Exercise(prompt, f"The past tense of {verb} is {found}.", says(found), (verb,), irregular, alone=found)


def degrees(draw: Draw) -> Exercise:
    """Comparative and superlative."""
    adjective = draw.pick(list(ADJECTIVES))
    which = draw.number(0, 1)
    name, found = ("comparative", "superlative")[which], ADJECTIVES[adjective][which]
    prompt = draw.wording(
        'What is the {name} of "{w}"?', "What is the {name} of {w}?", "Give the {name} form of {w}.", "{Name} of {w}?",
        "Write the {name} of the word {w}.", 'Change "{w}" into its {name} form.', "What is the {name} form of {w}?",
        w=adjective, name=name, Name=name.capitalize(),
    )  # fmt: skip
    answer = f"The {name} of {adjective} is {found}."
    return Exercise(prompt, answer, says(found), (adjective, name), True, alone=found)


def opposites(draw: Draw) -> Exercise:
    """Of a word."""
    pair = draw.pick(OPPOSITES)
    word, found = pair if draw.chance(0.5) else pair[::-1]
    prompt = draw.wording(
        'What is the opposite of "{w}"?', "What is the opposite of {w}?", "Give the opposite of {w}.",
        "Opposite of {w}?", "Tell me the opposite of the word {w}.", "Which word means the opposite of {w}?",
        'Name an antonym of "{w}".', "What is an antonym for {w}?", "If it is not {w}, what is it?",
        "Provide an antonym for '{w}'.", w=word,
    )  # fmt: skip
    right = [second if first == word else first for first, second in OPPOSITES if word in (first, second)]
    checks: list[Check] = [
        {"kind": "matches", "pattern": rf"(?i)\b({'|'.join(right)})\b"},
        {"kind": "words", "most": 10},
    ]
    return Exercise(prompt, f"The opposite of {word} is {found}.", checks, (word,), True, alone=found)


def synonyms(draw: Draw) -> Exercise:
    """Another word for one."""
    word = draw.pick(list(SYNONYMS))
    found = SYNONYMS[word]
    prompt = draw.wording(
        'What is a synonym for "{w}"?', "Give a synonym for {w}.", "Give me another word for {w}.", "Synonym of {w}?",
        "Which word means the same as {w}?", "What is another word for {w}?", "Provide a synonym for '{w}'.",
        "Name a word that means {w}.", w=word,
    )  # fmt: skip
    return Exercise(prompt, f"A synonym for {word} is {found}.", says(found), (word,), True, alone=found)


def articles(draw: Draw) -> Exercise:
    """A or an."""
    noun = draw.pick(NOUNS)
    found = a(noun)
    prompt = draw.wording(
        "A or an: {w}?", "Which is right, a {w} or an {w}?", 'Do you say "a {w}" or "an {w}"?',
        "Put a or an before {w}.", "Is it a {w} or an {w}?", "Write the word {w} with a or an.", w=noun,
    )  # fmt: skip
    return Exercise(prompt, f"It is {found}.", says(found, most=4), (noun,), alone=found)


def voice(draw: Draw) -> Exercise:
    """Active to passive, and back."""
    subject, target = draw.several(_BEINGS, 2)
    action = draw.pick(ACTIONS)
    active = f"The {subject} {action} the {target}."
    passive = f"The {target} was {ACTION_PARTICIPLES.get(action, action)} by the {subject}."
    if draw.chance(0.6):
        given, found, name = active, passive, "passive"
    else:
        given, found, name = passive, active, "active"
    prompt = draw.wording(
        "Put this sentence into the {name} voice: {s}", "Rewrite in the {name} voice: {s}", "Make this {name}: {s}",
        "Change this sentence to the {name} voice: {s}", "Turn this into the {name}: {s}",
        "Convert to {name} voice: {s}", "Write this sentence in the {name} voice: {s}",
        "Rewrite the sentence using the {name} voice.\n\n{s}",
        "Rewrite the following sentence in {name} voice: '{s}'", name=name, s=given,
    )  # fmt: skip
    return Exercise(prompt, found, is_one_of(found), (subject, action, target), exact=True)


def negation(draw: Draw) -> Exercise:
    """What is not so."""
    subject = f"The {draw.pick(NOUNS)}" if draw.chance(0.5) else draw.pick(NAMES)
    rest = draw.pick([*_MOODS, *_PLACES])
    verb = draw.pick(("is", "is", "was"))
    given, found = f"{subject} {verb} {rest}.", f"{subject} {verb} not {rest}."
    prompt = draw.wording(
        "Make this sentence negative: {s}", "Say the opposite with the word not: {s}", "Negate this sentence: {s}",
        "Put not into this sentence: {s}", "Rewrite as a negative sentence: {s}", "Turn this into a negative: {s}",
        s=given,
    )  # fmt: skip
    return Exercise(prompt, found, is_one_of(found, found.replace(f"{verb} not", f"{verb}n't")), (given,), exact=True)


def questions(draw: Draw) -> Exercise:
    """A statement turned into a question."""
    subject = f"the {draw.pick(NOUNS)}" if draw.chance(0.5) else draw.pick(NAMES)
    rest = draw.pick([*_MOODS, *_PLACES])
    verb = draw.pick(("is", "is", "was", "can"))
    if verb == "can":
        rest = draw.pick(listed("swim sing dance cook read write run jump climb sleep"))
    given = f"{subject[0].upper()}{subject[1:]} {verb} {rest}."
    found = f"{verb.capitalize()} {subject} {rest}?"
    prompt = draw.wording(
        "Turn this into a question: {s}", "Make a question of this sentence: {s}", "Rewrite as a question: {s}",
        "Change this statement into a question: {s}", "Ask this as a question: {s}", "Form a question from: {s}",
        "Change the sentence '{s}' into a question.", s=given,
    )  # fmt: skip
    return Exercise(prompt, found, [{"kind": "one_of", "values": [found, found[:-1]]}], (given,), exact=True)


def tenses(draw: Draw) -> Exercise:
    """A sentence in another tense."""
    verb, name = draw.pick(_VERBS + list(IRREGULAR_VERBS)), draw.pick(["She", "He", *NAMES])
    when = draw.pick(("every day", "at home", "in the garden", "in the evening", "with a friend", "a lot", "again"))
    forms = {
        "present": f"{name} {third_person(verb)} {when}.",
        "past": f"{name} {past(verb)} {when}.",
        "future": f"{name} will {verb} {when}.",
    }
    source, target = draw.several(list(forms), 2)
    prompt = draw.wording(
        "Put this sentence into the {t} tense: {s}", "Rewrite in the {t} tense: {s}", "Change to the {t} tense: {s}",
        "Write this sentence in the {t} tense: {s}", "Turn this into the {t} tense: {s}", "Use the {t} tense: {s}",
        "Rewrite the sentence in the {t} tense.\n\n{s}", "Change the tense of this sentence to {t}: {s}", t=target,
        s=forms[source],
    )  # fmt: skip
    return Exercise(prompt, forms[target], is_one_of(forms[target]), (name, verb, when, target), exact=True)


def pronouns(draw: Draw) -> Exercise:
    """A name replaced by he or she."""
    name = draw.pick(draw.pick((WOMEN, MEN)))
    rest = f"is {draw.pick(_MOODS)}" if draw.chance(0.5) else f"{third_person(draw.pick(_VERBS))} {draw.pick(_PLACES)}"
    found = f"{'She' if name in WOMEN else 'He'} {rest}."
    prompt = draw.wording(
        "Replace the name with a pronoun: {s}", "Use a pronoun instead of the name: {s}",
        "Write he or she for the name: {s}", "Rewrite with a pronoun: {s}",
        "Put a pronoun in the place of the name: {s}", "Swap the name for he or she: {s}", s=f"{name} {rest}.",
    )  # fmt: skip
    return Exercise(prompt, found, is_one_of(found), (name, rest), exact=True)


def corrections(draw: Draw) -> Exercise:
    """Capitals and a full stop, or the right form of a verb."""
    name = draw.pick(NAMES)
    if draw.chance(0.5):
        verb, place = draw.pick(_VERBS), draw.pick(_PLACES)
        given, found = f"{name} {verb} {place} every day.", f"{name} {third_person(verb)} {place} every day."
    else:
        found = f"{name} is {draw.pick(_MOODS)} and {draw.pick(NAMES)} is {draw.pick(_MOODS)}."
        given = found.lower().rstrip(".")
    prompt = draw.wording(
        "Correct this sentence: {s}", "Fix the mistakes: {s}", "Write this sentence correctly: {s}",
        "Correct the grammar: {s}", "Edit this sentence for grammar: {s}", "What is the right way to write this? {s}",
        "Fix this: {s}", "Edit the following sentence for grammar.\n\n{s}", s=given,
    )  # fmt: skip
    return Exercise(prompt, found, [{"kind": "matches", "pattern": f"^{found}$"}], (found,), exact=True)


MAKERS: dict[str, Maker] = {
    "plural": plurals,
    "past tense": past_tense,
    "comparative and superlative": degrees,
    "opposites": opposites,
    "synonyms": synonyms,
    "a or an": articles,
    "active and passive": voice,
    "negation": negation,
    "questions from statements": questions,
    "tenses": tenses,
    "pronouns": pronouns,
    "corrections": corrections,
}
