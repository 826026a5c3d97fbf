"""The process in which a stranger's tokenizer is tried, started by `model.text.trial`.

Its definition comes on standard input, and what is wrong with it goes to standard output.
"""

from __future__ import annotations

import contextlib
import json
import resource
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from topkapi.model.errors import CheckpointError
from topkapi.model.text.tokenizer import Tokenizer
from topkapi.model.text.trial import BYTES, SECONDS, refused

_RUN = 300
_GROWTH = 20
"""Most tokens per byte of a text. A byte is one token; what precedes or surrounds a text adds a few."""


def texts(definition: Mapping[str, Any]) -> Iterator[str]:
    """Texts on which its patterns are likely to be slow: each character that they name in a row, and what ends them."""
    named = set(json.dumps([definition.get("normalizer"), definition.get("pre_tokenizer")], ensure_ascii=False))
    for character in sorted({*named, *"aA1 \n\t!é中"}):
        yield character * _RUN + "\0"
        yield (character + " ") * _RUN
        yield (character + "a1") * _RUN


def main() -> None:
    """Try what standard input holds; write null, or what is wrong with it, to standard output."""
    with contextlib.suppress(OSError, ValueError):  # macOS has limits that can't be set
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    told = json.load(sys.stdin.buffer)
    print(json.dumps(_problem(told["definition"], told["config"])))


def _problem(definition: dict[str, Any], config: dict[str, Any]) -> dict[str, Any] | None:
    try:
        tokenizer = Tokenizer(definition, config)
        for text in texts(definition):
            if len(tokenizer.encode(text)) > _GROWTH * len(text.encode()):
                raise refused("it makes more tokens of a text than the text has bytes")
    except CheckpointError as error:
        return {"message": error.message, "field": error.field, "hint": error.hint}
    except BaseException as error:  # a panic of the library is no Exception
        error = refused(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        return {"message": error.message, "field": None, "hint": error.hint}
    return None


if __name__ == "__main__":
    main()
