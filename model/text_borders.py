"""Where a long text may be cut so that its pieces, encoded one by one, have the ids of the whole."""

import re

LOCAL_NORMALIZERS = {
    "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Nmt", "Precompiled", "BertNormalizer", "ByteLevel",
    "Prepend", "Replace",
}  # fmt: skip
"""Normalizers that change a piece of a text as they change it within the whole, but for its beginning."""

ACROSS_BORDER = re.compile(rb"[A-Za-z] |\n[A-Za-z\x80-\xff]")
"""What no entry of the vocabulary may hold: then nothing is merged across a border."""

_BREAK = re.compile("[ \\n]")


def next_border(text: str, start: int) -> int | None:
    """The next place from `start` on where a text may be cut, if there is one.

    That is between two words of ASCII letters, before the space, and where a line begins with a letter. Each place is
    looked at by itself: one expression for it all would hold the interpreter for a second on a text without any.
    """
    while found := _BREAK.search(text, start):
        at = found.start()
        before, after = text[at - 1 : at], text[at + 1 : at + 2]
        if found[0] == " " and before.isascii() and before.isalpha() and after.isascii() and after.isalpha():
            return at
        if found[0] == "\n" and before and not before.isspace() and after.isalpha():
            return at + 1
        start = at + 1
    return None
