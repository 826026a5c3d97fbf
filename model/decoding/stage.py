"""What a decoding stage is; `@stage` declares one above its function, and rows of the table give it its parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from topkapi.model.decoding.candidates import Candidates
from topkapi.model.decoding.rows import Row
from topkapi.model.decoding.table import PARAMETERS

Values = Mapping[str, Tensor]
Apply = Callable[[Candidates, Values, Sequence[Row]], Candidates]

STAGES: dict[str, Stage] = {}
"""Every stage by its name, once the modules that declare them are imported (`stages` imports them all)."""


@dataclass(frozen=True, eq=False)
class Stage:
    """A named stage; its numeric `parameters` are handed over as float64 `[B]` tensors.

    `needed(row)` says whether it has anything to do at this step. `keeps_best` says that the most likely token always
    survives it and stays the most likely, so that greedy rows can pass it over. `scans` says that it looks at no whole
    vocabulary where compiled code can tell what it needs.
    """

    name: str
    apply: Apply
    parameters: tuple[str, ...]
    keeps_best: bool
    needed: Callable[[Row], bool] | None
    scans: bool


def stage(
    *, keeps_best: bool = False, needed: Callable[[Row], bool] | None = None, scans: bool = False
) -> Callable[[Apply], Apply]:
    """Declares a function as the stage of its name, which rows of the table name as theirs."""

    def declare(apply: Apply) -> Apply:
        name = apply.__name__
        numbers = tuple(p.name for p in PARAMETERS if p.stage == name and p.kind in ("integer", "number"))
        STAGES[name] = Stage(name, apply, numbers, keeps_best, needed, scans)
        return apply

    return declare
