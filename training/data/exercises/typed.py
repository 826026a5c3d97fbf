"""How people type: wordings written as choices, and the case, the marks and the slips of quick fingers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from random import Random

_CHOICE = re.compile(r"\{([^{}]*)\}")
_SLOT = re.compile(r"<([a-z]+)>")
_LENGTHENED = re.compile(r"(\w)~")
_SPACES = re.compile(r" +(?=[,.?!]|$)|(?<= ) +")

_SHORT = {
    "you": "u", "are": "r", "your": "ur", "what": "wat", "please": "pls", "thanks": "thx", "because": "cuz", "to": "2",
    "for": "4", "why": "y", "tell": "tel", "know": "kno", "is not": "isnt", "what's": "whats", "who's": "whos",
    "i am": "im", "don't": "dont", "can't": "cant", "how's": "hows", "i'm": "im", "let's": "lets", "that's": "thats",
    "with": "w", "the": "teh", "and": "n", "okay": "ok", "people": "ppl", "something": "smth", "about": "abt",
    "tomorrow": "tmrw",
}  # fmt: skip
_BEFORE = (
    "so ", "ok ", "hey ", "um, ", "hi, ", "hello, ", "please ", "and ", "well, ", "oh, ", "ok so ", "hey, ", "yo ",
    "now ", "quick question: ", "hi! ", "Hello. ", "Hey! ", "excuse me, ", "tell me, ", "i wonder, ",
    "can you tell me: ", "sorry, ", "hi topkapi, ", "question: ",
)  # fmt: skip
_AFTER = (
    " please", " pls", " thanks", " plz", " lol", " :)", " ;)", " thx", " haha", " bro", " mate", " dear", " topkapi",
    " then", " now", " for me", " if you can", " ok", " xd", " man", " 🙂", " my friend", ", please", " hm",
)  # fmt: skip
_ENDS = ("", "", "", "?", "!", ".", "..", "...", "!!", "??", "?!", " ?", " !", "!!!", "???")
_QUESTION = re.compile(
    r"(?:\w+,? )?(?:what|whats|what's|who|whos|who's|how|hows|how's|why|when|where|which"
    r"|are|is|can|could|do|does|did|will|would|should|have|may)\b",
    re.IGNORECASE,
)
_KEYS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
# What lies left and right of a key.
_NEIGHBOURS = {key: (row[:at] + row[at + 1 :])[max(at - 1, 0) : at + 1] for row in _KEYS for at, key in enumerate(row)}


def written(text: str, random: Random, slots: Mapping[str, Sequence[str]]) -> str:
    """One wording of `text`: of {a|b} one, of <name> one of `slots`, a letter before ~ drawn out."""
    while found := _CHOICE.search(text):
        text = text[: found.start()] + random.choice(found[1].split("|")) + text[found.end() :]
    while found := _SLOT.search(text):
        text = text[: found.start()] + random.choice(slots[found[1]]) + text[found.end() :]
    text = _LENGTHENED.sub(lambda letter: letter[1] * random.choice((1, 1, 2, 3, 4, 6)), text)
    return _SPACES.sub("", text).strip(" ,")


def spelling(text: str) -> str:
    """A text without case, white space and punctuation; one that is nothing else as it stands."""
    return "".join(re.findall(r"\w", text.casefold())) or text.strip()


def hasty(text: str, random: Random) -> str:
    """`text` with one to three slips more than it may have."""
    for _ in range(random.choice((1, 1, 2, 2, 3))):
        text = _slip(text, random)
    return text


def drawn_out(word: str, random: Random) -> str:
    """`word` with a vowel or its last letter said longer; one without letters there as it is."""
    places = [at for at, letter in enumerate(word) if letter.isalpha() and (letter in "aeiouy" or at == len(word) - 1)]
    if not places:
        return word
    at = random.choice(places)
    return word[:at] + word[at] * random.choice((2, 2, 3, 3, 4, 5, 7)) + word[at + 1 :]


def typed(text: str, random: Random, *, decorate: bool = True, slips: bool = True) -> str:
    """`text` as somebody may type it: its case, what ends it, words before and after with `decorate`, `slips`."""
    if decorate and random.random() < 0.12:
        text = random.choice(_BEFORE) + text
    if decorate and random.random() < 0.1:
        text += random.choice(_AFTER)
    if random.random() < 0.08:
        text = " ".join(_SHORT.get(word, word) for word in text.split(" "))
    if slips and random.random() < 0.2:
        text = _slip(text, random)
        if random.random() < 0.5:
            text = _slip(text, random)
    if text[-1:] not in ".?!)":
        asks = _QUESTION.match(text) is not None
        if asks and random.random() < 0.45:
            text += "?"
        elif random.random() < 0.5:
            text += random.choice(_ENDS)
    case = random.random()
    if case < 0.4:
        return text[:1].upper() + text[1:]
    return text.upper() if case > 0.96 else text if case > 0.6 else text.lower()


def _slip(text: str, random: Random) -> str:
    """One letter left out, doubled, swapped with the next or taken for its neighbour; text of few letters as it is."""
    places = [at for at in range(1, len(text) - 1) if text[at].isalpha() and text[at + 1].isalpha()]
    if len(text) < 4 or not places:
        return text
    at = random.choice(places)
    kind = random.random()
    if kind < 0.08 and text[-1].isalpha():
        return text[:-1]
    if kind < 0.4:
        return text[:at] + text[at + 1] + text[at] + text[at + 2 :]
    if kind < 0.65:
        return text[:at] + text[at + 1 :]
    if kind < 0.85:
        return text[:at] + text[at] + text[at:]
    return text[:at] + random.choice(_NEIGHBOURS.get(text[at], text[at])) + text[at + 1 :]
