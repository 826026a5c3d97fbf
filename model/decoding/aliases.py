"""Other systems' names for decoding parameters, from the table: the one place where a dialect's names become ours."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from model.decoding.parameters import BY_NAME, PARAMETERS
from model.errors import InvalidRequest

BY_ALIAS: dict[str, str] = {alias: parameter.name for parameter in PARAMETERS for alias in parameter.aliases}


def own_name(name: str) -> str | None:
    """What the table calls `name`; None for a name that is neither in it nor an alias."""
    return name if name in BY_NAME else BY_ALIAS.get(name)


@contextmanager
def translated(given: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """`given`, under any system's names, as parameters of the table; names of no parameter are kept as they are.

    An `InvalidRequest` raised inside, by `resolve` say, goes on under the name that was given. Raises one itself where
    two names of one parameter are given; None counts as absent.
    """
    spoken: dict[str, str] = {}
    parameters: dict[str, Any] = {}
    for name, value in given.items():
        own = own_name(name) or name
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
