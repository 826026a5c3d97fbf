"""A stranger's tokenizer is tried in a process of its own before it is used.

Its patterns may backtrack for hours, its steps make gigabytes of one letter, and it may bring the library down: none of
that can be stopped from within a process. `python -m topkapi.model.text.trial` reads a definition from standard input and says what
became of it on standard output.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from topkapi.model.errors import CheckpointError

_SECONDS = 20
_BYTES = 1 << 33
_MOST_GROWTH = 256
"""How many times longer the steps of a normalizer may make a text."""
_RUN = 300
_GROWTH = 20
"""Most tokens per byte of a text. A byte is one token; what precedes or surrounds a text adds a few."""


def try_tokenizer(definition: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Use a tokenizer in another process. Raises `CheckpointError` where that fails or does not end."""
    if growth(definition.get("normalizer")) > _MOST_GROWTH:
        raise _refused(f"its normalizer makes texts more than {_MOST_GROWTH} times longer")
    environment = os.environ | {"RUST_BACKTRACE": "0", "TOKENIZERS_PARALLELISM": "false"}
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, (str(Path(__file__).parents[3]), environment.get("PYTHONPATH")))
    )
    told = json.dumps({"definition": definition, "config": config}).encode()
    try:
        ended = subprocess.run(
            [sys.executable, "-P", "-m", "topkapi.model.text.trial"],
            input=told,
            capture_output=True,
            timeout=2 * _SECONDS,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise _refused(f"it takes longer than {_SECONDS} s on a short text") from None
    if ended.returncode:
        reason = f"it takes longer than {_SECONDS} s, or more than {_BYTES >> 30} GiB, on a short text"
        raise _refused(reason if ended.returncode < 0 else "the process that tried it failed")
    problem = json.loads(ended.stdout)
    if problem is not None:
        raise CheckpointError(str(problem["message"]), field=problem["field"], hint=problem["hint"])


def _refused(reason: str) -> CheckpointError:
    return CheckpointError(
        f"the tokenizer definition cannot be used: {reason}",
        hint="tokenizer.json must be a file written by the tokenizers library",
    )


def growth(step: Any) -> float:
    """How many times longer a text may become by a step of a normalizer, or by all steps of a sequence."""
    if isinstance(step, list):
        return math.prod(map(growth, step))
    if not isinstance(step, Mapping):
        return 1
    if step.get("type") == "Sequence":
        return growth(step.get("normalizers"))
    if step.get("type") == "Replace":
        content, pattern = step.get("content"), step.get("pattern")
        added = len(content) if isinstance(content, str) else 1
        replaced = pattern.get("String") if isinstance(pattern, Mapping) else None
        # An expression may match nothing at all, between any two characters.
        return max(1, added / len(replaced)) if isinstance(replaced, str) and replaced else 1 + added
    return _EXPANSIONS.get(str(step.get("type")), 1)


_EXPANSIONS = {"ByteLevel": 2, "NFKC": 1, "NFKD": 1, "Precompiled": 3}
"""For a few characters more; those of composed forms do not expand again."""


def texts(definition: Mapping[str, Any]) -> Iterator[str]:
    """Texts on which its patterns are likely to be slow: each character that they name in a row, and what ends them."""
    named = set(json.dumps([definition.get("normalizer"), definition.get("pre_tokenizer")], ensure_ascii=False))
    for character in sorted({*named, *"aA1 \n\t!é中"}):
        yield character * _RUN + "\0"
        yield (character + " ") * _RUN
        yield (character + "a1") * _RUN


def main() -> None:
    """Try what standard input holds; write null, or what is wrong with it, to standard output."""
    import resource

    with contextlib.suppress(OSError, ValueError):  # macOS has limits that can't be set
        resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (_BYTES, _BYTES))
    told = json.load(sys.stdin.buffer)
    print(json.dumps(_problem(told["definition"], told["config"])))


def _problem(definition: dict[str, Any], config: dict[str, Any]) -> dict[str, Any] | None:
    from topkapi.model.text.tokenizer import Tokenizer

    try:
        tokenizer = Tokenizer(definition, config)
        for text in texts(definition):
            if len(tokenizer.encode(text)) > _GROWTH * len(text.encode()):
                raise _refused("it makes more tokens of a text than the text has bytes")
    except CheckpointError as error:
        return {"message": error.message, "field": error.field, "hint": error.hint}
    except BaseException as error:  # a panic of the library is no Exception
        refused = _refused(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        return {"message": refused.message, "field": None, "hint": refused.hint}
    return None


if __name__ == "__main__":
    main()
