"""How one text is handed to the libraries that encode it: checked, without holding others up, cut where its pieces have
the ids of the whole, and with what they do where they fail told as an error."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Set
from contextlib import contextmanager

import tokenizers

from topkapi.model.errors import InvalidRequest, TopkapiError

_LONG_RUN = 16_384
"""tiktoken's regular expressions run out of stack on runs of about a million characters; `tokenizers` does not."""

_SHORT = 2048
"""Characters that `tokenizers` encodes in a few milliseconds."""

_LOCAL_NORMALIZERS = {
    "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Nmt", "Precompiled", "BertNormalizer", "ByteLevel",
    "Prepend", "Replace",
}  # fmt: skip
"""Normalizers that change a piece of a text as they change it within the whole, but for its beginning."""

_ACROSS_BORDER = re.compile(rb"[A-Za-z] |\n[A-Za-z\x80-\xff]")
"""What no entry of the vocabulary may hold: then nothing is merged across a border."""


def backend_ids(backend: tokenizers.Tokenizer, text: str) -> list[int]:
    """The ids by `tokenizers`. What encodes several texts lets go of the interpreter, what encodes one does not."""
    if len(text) < _SHORT:
        return list(backend.encode(text, add_special_tokens=False).ids)
    (encoded,) = backend.encode_batch_fast([text], add_special_tokens=False)
    return list(encoded.ids)


@contextmanager
def panics_refused() -> Iterator[None]:
    """Turn what the libraries raise where a pattern fails on a text into an error: their panics are no `Exception`."""
    try:
        yield
    except (TopkapiError, KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        if "Missing [UNK]" in str(error):
            raise InvalidRequest(
                "the text has characters that the checkpoint's vocabulary lacks, and it has no token for those",
                hint="leave out what it was not trained on",
            ) from error
        raise InvalidRequest(
            f"the checkpoint's tokenizer fails on this text: {' '.join(str(error).split())[:200]}",
            hint="its pattern cannot be matched there; send another text or use another checkpoint",
        ) from error


def check_unicode(text: str) -> None:
    """Raise `InvalidRequest` for a text with half a character, which has no bytes in UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"the text holds a lone surrogate, U+{ord(text[error.start]):04X}, at character {error.start}",
            hint="send valid Unicode; a lone surrogate is half of a character, usually cut in two",
        ) from None


def has_long_run(text: str) -> bool:
    """Whether `text` may hold a run of over 2 * _LONG_RUN characters with or without white space throughout.

    Such a run covers one aligned block, and a block is judged without a scan of its own.
    """
    if len(text) < 2 * _LONG_RUN:
        return False
    blocks = (text[start : start + _LONG_RUN] for start in range(0, len(text), _LONG_RUN))
    return any(block.isspace() or len(block.split(None, 1)) == 1 for block in blocks if len(block) == _LONG_RUN)


def keeps_borders(normalizers: Set[str], entries: Iterable[bytes]) -> bool:
    """Whether these kinds of normalizers look no further than a piece, and no entry lies across a border."""
    return normalizers <= _LOCAL_NORMALIZERS and not any(map(_ACROSS_BORDER.search, entries))


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


def cut(text: str, size: int) -> Iterator[str]:
    """`text` in pieces, each cut at the first place after `size` characters of it."""
    start = 0
    while start < len(text):
        end = next_border(text, start + size) if len(text) > start + size else None
        yield text[start:end]
        start = len(text) if end is None else end
