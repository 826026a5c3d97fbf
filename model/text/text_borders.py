"""Where a long text may be cut so that its pieces, encoded one by one, have the ids of the whole."""

import re

LOCAL_NORMALIZERS = {
    "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Nmt", "Precompiled", "BertNormalizer", "ByteLevel",
    "Prepend", "Replace",
}  # fmt: skip
"""Normalizers that change a piece of a text as they change it within the whole, but for its beginning."""

ACROSS_BORDER = re.compile(rb"[A-Za-z] |\n[A-Za-z\x80-\xff]")
"""What no entry of the vocabulary may hold: then nothing is merged across a border."""


def next_border(text: str, start: int) -> int | None:
    """The next place from `start` on where a text may be cut, if there is one.

    That is between two words of ASCII letters, before the space, and where a line begins with a letter. Each place is
    looked at by itself: one expression for it all would hold the interpreter for a second on a text without any.
    """
    space, line = text.find(" ", start), text.find("\n", start)
    while max(space, line) >= 0:
        at = min(each for each in (space, line) if each >= 0)
        before, after = text[at - 1 : at], text[at + 1 : at + 2]
        if at == space:
            if before.isascii() and before.isalpha() and after.isascii() and after.isalpha():
                return at
            space = text.find(" ", at + 1)
        else:
            if before and not before.isspace() and after.isalpha():
                return at + 1
            line = text.find("\n", at + 1)
    return None
