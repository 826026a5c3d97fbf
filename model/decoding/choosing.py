"""From logits to the next token of every row: through the stages that it needs, then a draw, with the log-probabilities
and the trace a caller asked for.

Rows that need the same stages pass them together; a row meets no stage that it does not need, and its numbers do not
depend on the rows beside it. What is drawn is the largest sum of logit and noise (`model.decoding.noise`), found
without giving every token its noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from operator import is_

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from topkapi.model.decoding import constraints, contrast, penalties, truncation  # noqa: F401  they declare stages
from topkapi.model.decoding.noise import gumbel_of_keys, loud_from, loud_tokens, row_keys, row_places
from topkapi.model.decoding.parameters import DEFAULT_ORDER, in_force
from topkapi.model.decoding.scan import CUTS, MOST_LIKELY, NO_CUT, Doubles, Drawing, Floats, Scan, Scanner
from topkapi.model.decoding.stage import LOWEST, NOT_CHOSEN, STAGES, Candidates, Row, Stage, maxima
from topkapi.model.decoding.trace import TokenTrace, Tracer
from topkapi.model.decoding.truncation import observe_surprise
from topkapi.model.errors import EngineError

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


def _planned(row: Row) -> tuple[tuple[Stage, ...], bool]:
    """The plan, and whether some of it is needed at some steps only."""
    stages = plan(row)
    return stages, any(stage.needed is not None for stage in stages)


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
    groups: dict[tuple[tuple[Stage, ...], bool, bool], list[int]] = {}
    for index, row in enumerate(rows):
        if row.plan is None:
            row.plan = _planned(row)
        stages, depends = row.plan
        if depends:
            stages = tuple(stage for stage in stages if stage.needed is None or stage.needed(row))
        groups.setdefault((stages, row.greedy, _is_simple(row)), []).append(index)
    for (stages, _, _), indexes in groups.items():
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


@dataclass(frozen=True)
class Choice:
    """A chosen token; the rest is filled where the row's `logprobs` or `trace` parameter asks for it.

    `raw_logprob` is the network's own, `logprob` the one of the distribution the token was drawn from; `rank` counts
    from 1 for the network's most likely token; `top` holds `(token id, raw log-probability)`, most likely first.
    """

    token_id: int
    logprob: float | None = None
    raw_logprob: float | None = None
    rank: int | None = None
    top: tuple[tuple[int, float], ...] = ()
    trace: TokenTrace | None = None


class UnusableLogits(EngineError):
    """Some rows of a step have no token to choose; the others may be chosen without them."""

    def __init__(self, message: str, rows: Sequence[int], *, hint: str) -> None:
        super().__init__(message, hint=hint)
        self.rows = tuple(rows)


class NothingLeft(UnusableLogits):
    """The parameters rule every token out: their sender can mend that, so it is no failure of the server."""

    status = 422
    kind = "invalid_request"


def check_logits(logits: Tensor) -> None:
    """Raise `UnusableLogits` for rows of `logits [B, V]` that hold NaN or infinity."""
    if bad := _overflowing(maxima(logits)):
        raise _unusable(bad)


def _overflowing(best: Tensor) -> list[int]:
    """The rows whose largest logit, of `best [B]`, is NaN or infinite."""
    usable = best.cpu().numpy() < math.inf
    return [] if usable.all() else np.flatnonzero(~usable).tolist()


def _unusable(rows: Sequence[int]) -> UnusableLogits:
    hint = "the checkpoint is damaged or overflows in its dtype"
    return UnusableLogits("the network produced NaN or infinite logits", rows, hint=hint)


def nothing_left(rows: Sequence[int]) -> NothingLeft:
    """The parameters rule every token of these rows out."""
    hint = "loosen the parameters that rule tokens out"
    return NothingLeft("no token is left to choose", rows, hint=hint)


def choose(
    logits: Tensor | Sequence[Tensor],
    rows: Sequence[Row],
    found: Sequence[int] | None = None,
    scanner: Scanner | None = None,
) -> list[Choice]:
    """Choose one token per row from the network's logits, `[B, V]` or a `[V]` for each row.

    The token is `argmax(log-probability + gumbel(seed, sequence, position, token))`, greedy rows without the noise;
    or the one that a search has `found [B]`, which is then only explained. A `scanner` looks through logits on the CPU
    faster than numpy does.
    Raises `UnusableLogits` naming the rows whose logits hold NaN or infinity or lose every token to the parameters.
    """
    logits = [row if _plain(row) else row.detach().float().contiguous() for row in logits]
    scan = scanner(logits) if scanner is not None and logits[0].device.type == "cpu" else None
    choices: list[Choice] = [Choice(-1)] * len(rows)
    drawn: list[tuple[list[int], Candidates, Tracer | None]] = []
    overflowing: list[int] = []
    for stages, indexes in grouped(logits, rows, scanned=scan is not None):
        group = [rows[index] for index in indexes]
        if scan is not None and found is None and np.isfinite(scan.best[indexes]).all():
            token_ids = _at_once(scan.some(indexes), stages, group)
            if token_ids is not None:
                for index, token_id in zip(indexes, token_ids, strict=True):
                    choices[index] = Choice(token_id)
                continue
        candidates = select(scan if scan is not None and scannable(stages) else logits, indexes)
        if bad := _overflowing(candidates.best):
            overflowing += [indexes[at] for at in bad]
            continue
        tracer = Tracer(candidates, group) if any(row.parameters.trace for row in group) else None
        candidates = apply(candidates, stages, group, tracer.observe if tracer else None)
        empty = candidates.best.cpu() == NOT_CHOSEN
        if bool(empty.any()):
            raise nothing_left([indexes[at] for at in empty.nonzero().view(-1).tolist()])
        if found is not None:
            _settle(choices, rows, indexes, candidates, tracer, [found[index] for index in indexes])
        elif group[0].greedy:
            _settle(choices, rows, indexes, candidates, tracer, _most_likely(candidates))
        else:
            drawn.append((indexes, candidates, tracer))
    if overflowing:
        raise _unusable(sorted(overflowing))
    if drawn:
        order = [rows[index] for indexes, _, _ in drawn for index in indexes]
        every = iter(draw([candidates for _, candidates, _ in drawn], order))
        for indexes, candidates, tracer in drawn:
            _settle(choices, rows, indexes, candidates, tracer, list(islice(every, len(indexes))))
    for index, row in enumerate(rows):
        if row.sequential:
            logprob = choices[index].logprob
            assert logprob is not None
            observe_surprise(row, logprob)
    return _explained(choices, logits if scan is None else scan, rows)


def _is_simple(row: Row) -> bool:
    """Whether it wants no more than a token, at a temperature that stays."""
    parameters = row.parameters
    return parameters.logprobs is None and not parameters.trace and not parameters.dynamic_temperature_range


def drawing(rows: Sequence[Row]) -> Drawing | None:
    """How compiled code chooses a token for each of the rows by itself, at this step and at every one to come but for
    their positions; None where one of them needs it to know more."""
    found = []
    for row in rows:
        if row.plan is None:
            row.plan = _planned(row)
        stages, depends = row.plan
        if depends:
            return None
        found.append(stages)
    return _drawing(found, rows)


def _drawing(stages: Sequence[Sequence[Stage]], rows: Sequence[Row]) -> Drawing | None:
    """For the stages that each row passes now."""
    found = []
    for passed, row in zip(stages, rows, strict=True):
        if row.recipe is None or row.recipe[0] != passed:
            row.recipe = passed, _recipe(passed, row)
        if row.recipe[1] is None:
            return None
        found.append(row.recipe[1])
    divisors, cuts, values = (np.concatenate(each) for each in zip(*found, strict=True))
    return Drawing(divisors, cuts, values, row_places(rows), LOUD_FROM)


def _recipe(stages: Sequence[Stage], row: Row) -> tuple[Floats, NDArray[np.int32], Doubles] | None:
    """A row's part of a `Drawing`, but for its place."""
    tempered = bool(stages) and stages[0].name == "temperature"
    names = [stage.name for stage in stages[tempered:]]
    if not _is_simple(row) or not CUTS.keys() >= set(names) or (row.greedy and names):
        return None
    left, parameters = len(CUTS) - len(names), row.parameters
    cuts = [MOST_LIKELY, NO_CUT, NO_CUT] if row.greedy else [*(CUTS[name] for name in names), *[NO_CUT] * left]
    values = [*(float(getattr(parameters, name)) for name in names), *[0.0] * left]
    divisors = truncation.divisors(np.array([parameters.temperature if tempered else 1.0]))
    return divisors, np.array([cuts], dtype=np.int32), np.array([values])


def _at_once(scan: Scan, stages: Sequence[Stage], rows: Sequence[Row]) -> list[int] | None:
    """The tokens of some alike rows of a scan, of which something is left, where compiled code finds them; None where
    it does not. What finds them otherwise would be a tenth of a single stream's step."""
    if rows[0].greedy and not stages and _is_simple(rows[0]):
        first: list[int] = scan.first.tolist()
        return first
    found = _drawing([stages] * len(rows), rows)
    # A logit may become infinite where it is divided by next to nothing.
    token_ids = [-1] if found is None else scan.drawn(found)
    return token_ids if min(token_ids) >= 0 else None


def _plain(row: Tensor) -> bool:
    """Whether a row can be read as it is."""
    return row.dtype is torch.float32 and row.is_contiguous() and not row.requires_grad


def _settle(
    choices: list[Choice],
    rows: Sequence[Row],
    indexes: list[int],
    candidates: Candidates,
    tracer: Tracer | None,
    token_ids: list[int],
) -> None:
    """Note the tokens of a group, how likely each was in the end, and its trace."""
    for index, token_id in zip(indexes, token_ids, strict=True):
        choices[index] = Choice(token_id)
    if any(rows[index].parameters.logprobs is not None or rows[index].sequential for index in indexes):
        for index, final in zip(indexes, _log_probabilities(candidates, token_ids), strict=True):
            certain = rows[index].greedy and not rows[index].searching
            choices[index] = replace(choices[index], logprob=0.0 if certain else final)
    if tracer is not None:
        for at, trace in tracer.traces(token_ids).items():
            choices[indexes[at]] = replace(choices[indexes[at]], trace=trace)


def _most_likely(candidates: Candidates) -> list[int]:
    """The first of the tokens with the largest logit, of each row."""
    first: list[int]
    if candidates.scan is not None:
        first = candidates.scan.first.tolist()
        return first
    if candidates.ids is None and candidates.on_cpu:
        first = candidates.logits.numpy().argmax(axis=-1).tolist()
        return first
    top = candidates.at_least(candidates.best.cpu())
    assert top.ids is not None
    first = top.ids.gather(-1, top.logits.argmax(dim=-1, keepdim=True)).squeeze(-1).tolist()
    return first


def _log_probabilities(candidates: Candidates, token_ids: Sequence[int]) -> list[float]:
    """Of the chosen tokens, in the distribution they were drawn from."""
    flat, _ = candidates.locate(np.arange(len(token_ids)), np.asarray(token_ids, dtype=np.int64))
    result: list[float] = (candidates.get(flat).astype(np.float64) - candidates.log_total.numpy()).tolist()
    return result


def _explained(choices: list[Choice], logits: Sequence[Tensor] | Scan, rows: Sequence[Row]) -> list[Choice]:
    """With what the network itself thought, for the rows that asked for log-probabilities; bare for the others."""
    wanted = [index for index, row in enumerate(rows) if row.parameters.logprobs is not None]
    for index, row in enumerate(rows):
        if row.sequential and row.parameters.logprobs is None:
            choices[index] = replace(choices[index], logprob=None)
    if not wanted:
        return choices
    raw = select(logits, wanted)
    token_ids = [choices[index].token_id for index in wanted]
    counts = [min(rows[index].parameters.logprobs or 0, raw.vocab_size) for index in wanted]
    leaders = raw.largest(torch.tensor(counts).clamp(min=1))
    assert leaders.ids is not None
    values, columns = leaders.logits.sort(dim=-1, descending=True, stable=True)
    top_ids, totals = leaders.ids.gather(-1, columns), raw.log_total
    own = _log_probabilities(raw, token_ids)
    ranks = _ranks(raw, token_ids)
    for at, index in enumerate(wanted):
        best = (values[at, : counts[at]].double() - totals[at]).tolist()
        choices[index] = replace(
            choices[index],
            raw_logprob=own[at],
            rank=ranks[at],
            top=tuple(zip(top_ids[at, : counts[at]].tolist(), best, strict=True)),
        )
    return choices


def _ranks(raw: Candidates, token_ids: Sequence[int]) -> list[int]:
    """Of these tokens of whole vocabularies, 1 for the most likely."""
    flat, _ = raw.locate(np.arange(len(token_ids)), np.asarray(token_ids, dtype=np.int64))
    own = raw.get(flat)
    if raw.scan is not None:
        return [count + 1 for count in raw.scan.above(own)]
    return [int((row > value).sum()) + 1 for row, value in zip(raw.logits, own.tolist(), strict=True)]


# Of more tokens than these few, only those whose noise or whose logit stands out are given noise.
FEW = 256
LOUD = 5.5
LOUD_FROM = loud_from(LOUD)
MARGIN = 2.5
SAMPLE = 16


def draw(parts: Sequence[Candidates], rows: Sequence[Row]) -> list[int]:
    """The tokens of the rows of several sets of candidates, in order: argmax of logit and noise, in float64.

    A token with neither noise above `LOUD` nor a logit above `reach - LOUD` cannot have a sum above `reach`. So where
    the best sum of the others is above it, it is the best of all; in the rare row where it is not, all tokens are
    given their noise.
    """
    keys, finalists, reaches = row_keys(rows), [], []
    origin: list[tuple[Candidates, int]] = []
    for part in parts:
        own = keys[len(origin) : len(origin) + len(part)]
        if part.ids is not None and part.logits.shape[-1] <= FEW:
            reach = torch.full((len(own),), -math.inf, dtype=torch.float64)
            finalists.append(part)
        elif part.scan is not None:
            reach = part.log_total - MARGIN
            floors = (reach - LOUD).numpy().astype(np.float32)
            found = part.scan.outstanding(floors, own.numpy(), LOUD_FROM)
            finalists.append(part.found(found))
        elif not part.on_cpu:
            reach = torch.full((len(own),), -math.inf, dtype=torch.float64)
            finalists.append(_winners(part, own))
        else:
            reach = _reach(part)
            token_ids = None if part.ids is None else part.token_ids()
            loud = loud_tokens(own, part.vocab_size, token_ids, LOUD)
            finalists.append(part.outstanding(loud, (reach - LOUD).tolist()))
        reaches.append(reach)
        origin += [(part, row) for row in range(len(own))]
    chosen, sums = _loudest(Candidates.together(finalists), keys)
    # A hair's breadth, for logits were compared in float32.
    for at in (sums <= torch.cat(reaches) + 1e-3).nonzero().view(-1).tolist():
        part, row = origin[at]
        chosen[at] = _loudest(part.row(row).at_least(torch.tensor([LOWEST])), keys[at : at + 1])[0]
    result: list[int] = chosen.tolist()
    return result


def _reach(candidates: Candidates) -> Tensor:
    """What the sum of the winner of each row exceeds nearly always, `[B]` float64.

    It lies a little below the log of the sum of the exponentiated logits, here guessed from every sixteenth token;
    a bad guess costs time and never changes the outcome.
    """
    best = candidates.best.numpy()
    below = np.minimum(candidates.host()[:, ::SAMPLE] - best[:, None], -3.0)
    body = np.exp(below, out=below).sum(axis=-1, dtype=np.float64)
    return torch.from_numpy(best + np.log1p(SAMPLE * body) - MARGIN)


def _loudest(candidates: Candidates, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Token and sum of logit and noise of the winner of each row of a truncated set."""
    assert candidates.ids is not None
    sums = candidates.logits.double() + gumbel_of_keys(keys, candidates.ids)
    best, column = sums.max(dim=-1)
    return candidates.ids.gather(-1, column.unsqueeze(-1)).squeeze(-1), best


def _winners(candidates: Candidates, keys: Tensor) -> Candidates:
    """The winners of whole vocabularies on an accelerator, where noise for all of them costs nothing."""
    logits = candidates.logits
    noise = gumbel_of_keys(keys.to(logits.device), torch.arange(logits.shape[-1], device=logits.device))
    column = (logits.double() + noise).argmax(dim=-1, keepdim=True)
    return Candidates(logits.gather(-1, column).cpu(), candidates.vocab_size, column.cpu())
