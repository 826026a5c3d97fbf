"""Other systems' names for decoding parameters, from the table: the one place where a dialect's names become ours."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from topkapi.model.decoding.parameters import BY_NAME, PARAMETERS
from topkapi.model.errors import InvalidRequest

BY_ALIAS: dict[str, str] = {alias: parameter.name for parameter in PARAMETERS for alias in parameter.aliases}

ELSEWHERE: dict[str, float | None] = {
    "top_k": 0, "top_n_sigma": 0, "repetition_range": 0, "dry_range": 0, "seed": None,
}  # fmt: skip
"""What -1 stands for in vLLM and llama.cpp, as we say it: all tokens, or nothing asked."""


def own_name(name: str) -> str | None:
    """What the table calls `name`; None for a name that is neither in it nor an alias."""
    return name if name in BY_NAME else BY_ALIAS.get(name)


_NONE_BY_ZERO = ("repeat_last_n", "dry_penalty_last_n")


@contextmanager
def translated(given: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """`given`, under any system's names, as parameters of the table; names of no parameter are kept as they are.

    An `InvalidRequest` raised inside, by `resolve` say, goes on under the name that was given. Raises one itself where
    two names of one parameter are given, and for a range of no tokens, which `repeat_last_n` and `dry_penalty_last_n`
    have where ours has all; None counts as absent, and -1 as vLLM and llama.cpp mean it.
    """
    spoken: dict[str, str] = {}
    parameters: dict[str, Any] = {}
    for name, value in given.items():
        own = own_name(name) or name
        if own in ELSEWHERE and not isinstance(value, bool) and value == -1:
            value = ELSEWHERE[own]
        elif name in _NONE_BY_ZERO and not isinstance(value, bool) and value == 0:
            message = f"{name}: with 0 no token counts, so the penalty would do nothing"
            raise InvalidRequest(message, field=name, hint="leave the penalty out; -1 counts all tokens")
        if value is None:
            continue
        if own in spoken:
            message = f"{name} and {spoken[own]} are two names of one parameter"
            raise InvalidRequest(message, field=name, hint="send one of them")
        spoken[own], parameters[own] = name, value
    try:
        yield parameters
    except InvalidRequest as error:
        said = spoken.get(error.field or "")
        if said is not None and error.field is not None and said != error.field:
            error.message = re.sub(rf"\b{error.field}\b", said, error.message)
            error.field = said
        raise
