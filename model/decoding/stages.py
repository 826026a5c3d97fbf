"""The stages that turn a network's logits into the distribution a token is drawn from, and how rows pass them.

A stage is a pure function of the candidates (logits `[B, V]`, or the few that a truncation left), its parameters as
`[B]` tensors and the rows' histories. Rows that need the same stages pass them together; a row meets no stage that
it does not need, and its numbers do not depend on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from operator import is_

import numpy as np
import torch
from torch import Tensor

from topkapi.model.decoding import constraints, contrast, penalties, truncation  # noqa: F401  they declare stages
from topkapi.model.decoding.candidates import NOT_CHOSEN, Candidates
from topkapi.model.decoding.parameters import DEFAULT_ORDER, in_force
from topkapi.model.decoding.rows import Row
from topkapi.model.decoding.scan import Scan
from topkapi.model.decoding.stage import STAGES, Stage

__all__ = [
    "DEFAULT_ORDER", "NOT_CHOSEN", "STAGES", "Candidates", "Row", "Stage", "apply", "grouped", "process", "scannable",
]  # fmt: skip

# Logits that are worked on at a time: 1 MiB of float32.
IN_CACHE = 1 << 18

Observe = Callable[[str, Candidates], None]


def plan(row: Row) -> tuple[Stage, ...]:
    """The stages that the row's parameters ask for, in the row's order.

    A greedy row leaves out temperature, and what comes last and keeps the most likely token.
    """
    wanted = in_force(row.parameters)
    stages = [STAGES[name] for name in row.parameters.order if name in wanted]
    if row.greedy:
        stages = [stage for stage in stages if stage.name != "temperature"]
        while stages and stages[-1].keeps_best:
            stages.pop()
    return tuple(stages)


def scannable(stages: Sequence[Stage]) -> bool:
    """Whether compiled code can tell these stages what they ask of the network's logits."""
    return all(stage.scans for stage in stages)


def grouped(
    logits: Sequence[Tensor], rows: Sequence[Row], *, scanned: bool = False
) -> Iterator[tuple[tuple[Stage, ...], list[int]]]:
    """The stages needed at this step, and the indexes of rows of `logits`, a `[V]` each, that need just these.

    On a CPU a group is no larger than its logits stay in the cache, unless they are `scanned` and that is enough.
    """
    most = max(1, IN_CACHE // len(logits[0])) if logits[0].device.type == "cpu" else len(rows)
    groups: dict[tuple[tuple[Stage, ...], bool], list[int]] = {}
    for index, row in enumerate(rows):
        if row.plan is None:
            stages = plan(row)
            row.plan = stages, any(stage.needed is not None for stage in stages)
        stages, depends = row.plan
        if depends:
            stages = tuple(stage for stage in stages if stage.needed is None or stage.needed(row))
        groups.setdefault((stages, row.greedy), []).append(index)
    for (stages, _), indexes in groups.items():
        size = len(rows) if scanned and scannable(stages) else most
        for start in range(0, len(indexes), size):
            yield stages, indexes[start : start + size]


def apply(
    candidates: Candidates, stages: Sequence[Stage], rows: Sequence[Row], observe: Observe | None = None
) -> Candidates:
    """`candidates` of `rows` through `stages`; `observe(stage name, what it left)` is told of each."""
    for stage, values in zip(stages, _numbers(stages, rows), strict=True):
        candidates = stage.apply(candidates, values, rows)
        if observe is not None:
            observe(stage.name, candidates)
    return candidates


def _numbers(stages: Sequence[Stage], rows: Sequence[Row]) -> list[dict[str, Tensor]]:
    """The parameters of each stage. The same rows mostly pass the same stages again at the next step, so the first one
    remembers them."""
    key = [*stages, *(row.parameters for row in rows)]
    known = rows[0].numbers
    if known is None or len(known[0]) != len(key) or not all(map(is_, known[0], key)):
        found = [
            {
                name: torch.tensor([getattr(row.parameters, name) for row in rows], dtype=torch.float64)
                for name in stage.parameters
            }
            for stage in stages
        ]
        known = rows[0].numbers = key, found
    values: list[dict[str, Tensor]] = known[1]
    return values


def select(logits: Sequence[Tensor] | Scan, indexes: list[int]) -> Candidates:
    """Some rows of the network's logits, a float32 `[V]` each, copied unless it is a single one or they are scanned."""
    if not isinstance(logits, Sequence):
        return Candidates(logits.some(indexes), logits.size)
    rows = [logits[index] for index in indexes]
    if len(rows) == 1:
        return Candidates(rows[0].unsqueeze(0), len(rows[0]), owned=False)
    if rows[0].device.type == "cpu":
        # Half the time of torch 2.13.
        return Candidates(torch.from_numpy(np.stack([row.numpy() for row in rows])), len(rows[0]))
    return Candidates(torch.stack(rows), len(rows[0]))


def process(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """`logits [B, V]` float32 through every stage its rows need, in order; the input is left as it is.

    Removed tokens have logit -inf. `choose` draws from the same candidates without ever writing them out.
    """
    logits = logits.detach().float().contiguous()
    result = torch.empty_like(logits)
    each = logits.unbind()
    for stages, indexes in grouped(each, rows):
        done = apply(select(each, indexes), stages, [rows[index] for index in indexes])
        result[indexes] = done.dense().to(result.device)
    return result


assert STAGES.keys() == set(DEFAULT_ORDER), "every stage that rows name is declared, and no other one"
