"""What `topkapi.Model.score` takes beside a text, as keywords."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

Ids = Sequence[int]


class ScoreFields(TypedDict, total=False):
    """What `score` takes beside a text; fields of `POST /score`."""

    token_ids: Ids | Sequence[Ids] | None
    pairs: Sequence[tuple[str | Ids, str | Ids]] | None
    prompt: str | Ids | None
    choices: Sequence[str | Ids] | None
    window: int | None
    stride: int | None
    top: int
    per_token: bool
    segments: int
    surprising: int
    normalize: Literal["byte", "token", "none"] | None
    timeout_s: float | None
    priority: int


DEFAULTS: Mapping[str, Any] = {"top": 0, "per_token": True, "segments": 0, "surprising": 0, "priority": 0}
"""Those that are not None."""


def score_keywords() -> dict[str, tuple[str, Any]]:
    """Type and default of each."""
    return {
        name: (getattr(kind, "__forward_arg__", str(kind)), DEFAULTS.get(name))
        for name, kind in ScoreFields.__annotations__.items()
    }
