"""What a decoding stage is, and what it works on: rows, each a sequence at one step, and the tokens that can be chosen.

A stage is a pure function of the candidates (logits `[B, V]`, or the few that a truncation left), its parameters as
`[B]` tensors and the rows' histories. `@stage` declares one above its function, and rows of the table give it its
parameters.

Every number computed here for a row is bitwise the same whatever rows stand beside it. Over the whole vocabulary only
operations are used whose order is fixed by the row's own width (softmax, maxima, sums over fixed pieces); over a
truncated row, whose padding depends on its neighbours, sums run in order from the first token to the last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from topkapi.model.decoding.scan import Found, Scan
from topkapi.model.decoding.table import PARAMETERS, DecodingParameters

if TYPE_CHECKING:
    from topkapi.model.decoding.grammar import Constraint


Ids = NDArray[np.int64]


@dataclass
class Row:
    """One sequence at one step: its effective parameters and the tokens so far.

    `sequence` is the index within the request (n > 1); `end_token_ids` cannot be chosen before `min_tokens`. Tokens
    are appended to `tokens`, or taken back from its end; what the row remembers follows. A row of mirostat needs its
    tokens chosen one after another (`sequential`), for each choice moves the bound of the next. `constraint` is told
    of each token that is appended, by whoever appends it. At each step whoever runs the network gives a row of guidance
    the logits after its negative prompt, `guide [V]`, and a row of DoLa those of the earlier layers, `early [J, V]`.
    """

    parameters: DecodingParameters
    tokens: list[int]
    prompt_length: int
    sequence: int = 0
    end_token_ids: Sequence[int] = field(default_factory=tuple)
    surprise_bounds: list[float] = field(default_factory=list)
    constraint: Constraint | None = None
    guide: Tensor | None = field(default=None, repr=False, compare=False)
    early: Tensor | None = field(default=None, repr=False, compare=False)
    plan: Any = field(default=None, init=False, repr=False, compare=False)
    numbers: Any = field(default=None, init=False, repr=False, compare=False)
    recipe: Any = field(default=None, init=False, repr=False, compare=False)

    @property
    def position(self) -> int:
        """How many tokens have been generated."""
        return len(self.tokens) - self.prompt_length

    @property
    def generated(self) -> list[int]:
        return self.tokens[self.prompt_length :]

    @property
    def greedy(self) -> bool:
        return self.parameters.temperature == 0

    @property
    def sequential(self) -> bool:
        """Whether a token can only be chosen once those before it have been."""
        return self.parameters.mirostat != 0

    @property
    def searching(self) -> bool:
        """Whether a search takes the tokens, not a draw."""
        return self.parameters.num_beams > 1 or self.parameters.penalty_alpha > 0

    def history(self, last: int = 0) -> Ids:
        """The `last` tokens (0: all) as an array `[n]`."""
        tokens = self._history.update(self.tokens)
        return tokens[-last:] if last else tokens

    def context_counts(self, last: int = 0) -> tuple[Ids, Ids]:
        """Token ids and how often each occurs among the `last` tokens (0: all) of prompt and answer."""
        return self._context_counts.update(self.tokens, max(0, len(self.tokens) - last) if last else 0)

    def answer_counts(self) -> tuple[Ids, Ids]:
        """Token ids and how often each was generated."""
        return self._answer_counts.update(self.tokens, self.prompt_length)

    @cached_property
    def _history(self) -> _History:
        return _History()

    @cached_property
    def _context_counts(self) -> _Counts:
        return _Counts()

    @cached_property
    def _answer_counts(self) -> _Counts:
        return _Counts()


class _History:
    """A growing copy of a list of token ids as an array."""

    def __init__(self) -> None:
        self._seen: list[int] = []
        self._array: Ids = np.empty(256, dtype=np.int64)

    def update(self, tokens: list[int]) -> Ids:
        """All of `tokens`; a view that is valid until the next update."""
        seen = self._seen
        if tokens[: len(seen)] != seen:
            seen.clear()
        if len(tokens) > len(self._array):
            grown = np.empty(2 * len(tokens), dtype=np.int64)
            grown[: len(seen)] = self._array[: len(seen)]
            self._array = grown
        fresh = tokens[len(seen) :]
        self._array[len(seen) : len(tokens)] = fresh
        seen += fresh
        return self._array[: len(tokens)]


class _Counts:
    """How often each token occurs in `tokens[start:]`, kept up to date as both grow."""

    def __init__(self) -> None:
        self._seen: list[int] = []
        self._start = 0
        self._clear(0)

    def update(self, tokens: list[int], start: int) -> tuple[Ids, Ids]:
        """The ids that occur and how often, `[k]` each."""
        if start < self._start or tokens[: len(self._seen)] != self._seen:
            self._clear(start)
        fresh = tokens[max(len(self._seen), self._start) :]
        for token_id in fresh:
            self._add(token_id, 1)
        for token_id in tokens[self._start : start]:
            self._add(token_id, -1)
        self._seen += tokens[len(self._seen) :]
        self._start = start
        ids, counts = self._ids[: len(self._slots)], self._counts[: len(self._slots)]
        present = counts > 0
        return ids[present], counts[present]

    def _clear(self, start: int) -> None:
        self._seen.clear()
        self._start = start
        self._slots: dict[int, int] = {}
        self._ids: Ids = np.empty(64, dtype=np.int64)
        self._counts: Ids = np.empty(64, dtype=np.int64)

    def _add(self, token_id: int, change: int) -> None:
        slot = self._slots.get(token_id)
        if slot is None:
            slot = self._slots[token_id] = len(self._slots)
            if slot == len(self._ids):
                self._ids = np.concatenate([self._ids, np.empty_like(self._ids)])
                self._counts = np.concatenate([self._counts, np.empty_like(self._counts)])
            self._ids[slot], self._counts[slot] = token_id, 0
        self._counts[slot] += change


Flat = NDArray[np.int64]
Floats = NDArray[np.float32]

NOT_CHOSEN = float("-inf")
LOWEST = torch.finfo(torch.float32).min
PIECES = 64
PIECE = 128
# Sets this narrow are cheaper to mark than to pack together again.
NARROW = 256


class Candidates:
    """B rows of logits.

    `logits [B, K]` float32 holds -inf for what is ruled out. `ids` is None while column and token are the same
    (K = V), else int64 `[B, K]` on the CPU, ascending in each row and padded with V. What has been truncated lives
    on the CPU, so a device only ever sees whole vocabularies. Nothing here is changed in place but by `put`, which
    copies first if the logits are the network's own (`owned` is False). Of a `scan` the logits are written out only
    where somebody needs all of them.
    """

    def __init__(
        self,
        logits: Tensor | Scan,
        vocab_size: int,
        ids: Tensor | None = None,
        *,
        owned: bool = True,
    ) -> None:
        self._logits = logits if isinstance(logits, Tensor) else None
        self.scan = None if isinstance(logits, Tensor) else logits
        self.vocab_size, self.ids = vocab_size, ids
        self._owned = owned

    def __len__(self) -> int:
        return len(self.logits) if self.scan is None else len(self.scan)

    @property
    def logits(self) -> Tensor:
        """`[B, K]` float32."""
        if self._logits is None:
            assert self.scan is not None
            self._logits = torch.from_numpy(self.scan.written())
        return self._logits

    @property
    def on_cpu(self) -> bool:
        """Whether the logits are in the memory of the CPU."""
        return self.scan is not None or self.logits.device.type == "cpu"

    @cached_property
    def best(self) -> Tensor:
        """The largest logit of each row, `[B]` float32."""
        return maxima(self.logits) if self.scan is None else torch.from_numpy(self.scan.best)

    @cached_property
    def probabilities(self) -> Tensor:
        """`[B, K]`: float32 over the whole vocabulary, float64 after a truncation."""
        if self.ids is None and self.logits.device.type == "cpu":
            # Row by row, which wakes no other thread: that takes longer than it saves.
            found = torch.empty_like(self.logits)
            for row, out in zip(self.logits, found, strict=True):
                torch.softmax(row, dim=-1, out=out)
            return found
        if self.ids is None:
            return self.logits.softmax(dim=-1)
        return (self.logits.double() - self.log_total.unsqueeze(-1)).exp()

    @cached_property
    def log_total(self) -> Tensor:
        """The log of the sum of the exponentiated logits, `[B]` float64 on the CPU."""
        best = self.best.double().cpu()
        if self._totals is not None:
            return best + torch.from_numpy(np.log(self._totals[0]))
        if self.ids is None:
            # The most likely token's probability is 1 / sum(exp(logits - best)).
            return best - maxima(self.probabilities).double().cpu().log()
        weights = (self.logits.double() - best.unsqueeze(-1)).exp()
        return best + weights.cumsum(dim=-1)[:, -1].log()

    @cached_property
    def _totals(self) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
        return None if self.scan is None else self.scan.totals()

    @cached_property
    def entropy(self) -> Tensor:
        """In nats, `[B]` float64 on the CPU."""
        if self._totals is not None:
            total, weighted = self._totals
            return torch.from_numpy(np.maximum(np.log(total) + weighted / total, 0.0))
        below = self.best.unsqueeze(-1) - self.logits
        if not self.whole:
            below.clamp_(max=1e4)
        mean = self.sum(below.mul_(self.probabilities) if self.ids is None else below * self.probabilities)
        return (self.log_total - self.best.double().cpu() + mean).clamp(min=0)

    @cached_property
    def count(self) -> Tensor:
        """How many tokens are left, int64 `[B]` on the CPU."""
        if self.scan is not None:
            return torch.tensor(self.scan.above(np.full(len(self), NOT_CHOSEN, dtype=np.float32)))
        if self.whole:
            return torch.full((len(self.logits),), self.logits.shape[-1])
        return (self.logits > NOT_CHOSEN).sum(dim=-1).cpu()

    @cached_property
    def whole(self) -> bool:
        """Whether no row has anything ruled out."""
        return bool(self.logits.amin() > NOT_CHOSEN)

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the tokens of each row of `values [B, K]`, which is 0 where a token is ruled out; `[B]` float64."""
        if self.ids is not None:
            return values.double().cumsum(dim=-1)[:, -1]
        # One sum per row may be split among threads, as its neighbours decide; sums of many pieces are not.
        pieces = pad(values, (0, -values.shape[-1] % PIECES)).view(len(values), PIECES, -1)
        return pieces.sum(dim=-1, dtype=torch.float64).cpu().cumsum(dim=-1)[:, -1]

    @staticmethod
    def together(parts: Sequence[Candidates]) -> Candidates:
        """The rows of several truncated sets as one."""
        if len(parts) == 1:
            return parts[0]
        width = max(part.logits.shape[-1] for part in parts)
        shape = (sum(map(len, parts)), width)
        logits = torch.full(shape, NOT_CHOSEN)
        ids = torch.full(shape, parts[0].vocab_size)
        row = 0
        for part in parts:
            height, used = part.logits.shape
            assert part.ids is not None
            logits[row : row + height, :used] = part.logits
            ids[row : row + height, :used] = part.ids
            row += height
        return Candidates(logits, parts[0].vocab_size, ids)

    def host(self) -> Floats:
        """The logits `[B, K]` in the memory of the CPU."""
        found: Floats = self.logits.cpu().numpy()
        return found

    def largest(self, k: Tensor) -> Candidates:
        """The `k [B]` (int64, at least 1) largest logits of each row, and those equal to the last of them."""
        if self.scan is not None:
            return self.found(self.scan.largest(k.numpy()))
        found: Candidates = self
        most = int(k.max())
        if self.ids is None and most < self.vocab_size // PIECE:
            # The k-th largest of the pieces' maxima is a lower bound, and far cheaper to have than a partial sort.
            # A piece is every so-many-th token: whole runs of pieces are then compared at once.
            whole = self.vocab_size // PIECE * PIECE
            pieces = maxima(self.logits[:, :whole].view(len(self.logits), PIECE, -1), axis=1)
            if whole < self.vocab_size:
                pieces = torch.cat((pieces, maxima(self.logits[:, whole:]).unsqueeze(-1)), dim=-1)
            found = self.at_least(_largest_but(pieces, k - 1))
        return found.at_least(_largest_but(found.logits, k.clamp(max=found.logits.shape[-1]) - 1))

    def at_least(self, floor: Tensor) -> Candidates:
        """The tokens whose logit is at least `floor [B]`; the most likely one always stays."""
        # Converted by torch, which takes what is beyond float32 for infinite without a warning.
        wanted = floor.to(torch.float32).numpy()
        lowest = np.maximum(np.minimum(wanted, self.best.cpu().numpy()), np.float32(LOWEST))
        if self.scan is not None:
            return self.found(self.scan.at_least(lowest))
        if self.ids is not None and self.logits.shape[-1] <= NARROW:
            return self.where(torch.from_numpy(self.logits.numpy() >= lowest[:, None]))
        return self._take(find(self.logits, lowest))

    def where(self, keep: Tensor) -> Candidates:
        """The tokens of a truncated set for which `keep [B, K]` is true."""
        if keep.shape[-1] <= NARROW:
            left = np.where(keep.numpy(), self.logits.numpy(), np.float32(NOT_CHOSEN))
            return Candidates(torch.from_numpy(left), self.vocab_size, self.ids)
        flat = np.flatnonzero(keep.numpy() & (self.logits > NOT_CHOSEN).numpy())
        return self._take(flat)

    def put(self, flat: Flat, values: NDArray[Any] | float) -> Candidates:
        """With the logits at flattened positions `flat` set to `values`."""
        if not len(flat):
            return self
        logits = self.logits if self._owned else self.logits.clone(memory_format=torch.contiguous_format)
        source = torch.as_tensor(values, dtype=logits.dtype).to(logits.device)
        logits.view(-1)[torch.as_tensor(flat, device=logits.device)] = source
        return self.changed(logits, self.ids)

    def changed(self, logits: Tensor, ids: Tensor | None = None) -> Candidates:
        """The same rows with other logits, scanned anew if these were."""
        found = Candidates(logits, self.vocab_size, ids)
        if self.scan is not None:
            found.scan = self.scan.again(logits)
        return found

    def get(self, flat: Flat) -> Floats:
        """The logits at flattened positions."""
        if self.scan is not None and self._logits is None and len(flat) <= len(self):
            return self.scan.get(*np.divmod(flat, self.vocab_size))
        if self.on_cpu:
            found: Floats = self.logits.numpy().reshape(-1)[flat]
        else:
            found = self.logits.view(-1)[torch.as_tensor(flat, device=self.logits.device)].cpu().numpy()
        return found

    def locate(self, rows: Flat, token_ids: Flat) -> tuple[Flat, Flat]:
        """Flattened positions of these tokens of these rows, `[n]` each, and the indexes of those that are there."""
        if self.ids is None:
            return rows * self.vocab_size + token_ids, np.arange(len(rows))
        # Ids ascend in each row and end in padding, so numbered row after row they ascend throughout.
        stride = self.vocab_size + 1
        keys = (np.arange(len(self.ids))[:, None] * stride + self.ids.numpy()).ravel()
        wanted = rows * stride + token_ids
        flat = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        present = np.flatnonzero(keys[flat] == wanted)
        return flat[present], present

    def only(self, rows: Flat, token_ids: Flat) -> Candidates:
        """Just these tokens of these rows, `[n]` each, in ascending order."""
        return self._take(self.locate(rows, token_ids)[0])

    def dense(self) -> Tensor:
        """The logits over the whole vocabulary, `[B, V]`."""
        if self.ids is None:
            return self.logits
        whole = torch.full((len(self.ids), self.vocab_size + 1), NOT_CHOSEN)
        return whole.scatter_(-1, self.ids, self.logits)[:, :-1]

    def token_ids(self) -> list[Flat]:
        """The token ids of each row of a truncated set, without padding."""
        assert self.ids is not None
        lengths = (self.ids < self.vocab_size).sum(dim=-1).tolist()
        return [row[:length] for row, length in zip(self.ids.numpy(), lengths, strict=True)]

    def row(self, index: int) -> Candidates:
        """One of the rows."""
        if self.scan is not None:
            return Candidates(self.scan.some([index]), self.vocab_size)
        ids = None if self.ids is None else self.ids[index : index + 1]
        return Candidates(self.logits[index : index + 1], self.vocab_size, ids, owned=False)

    def found(self, found: Found) -> Candidates:
        """What a scan has found as a truncated set."""
        return Candidates(torch.from_numpy(found[0]), self.vocab_size, torch.from_numpy(found[1]))

    def outstanding(self, masks: Sequence[NDArray[np.bool_]], floors: Sequence[float]) -> Candidates:
        """The tokens that their row's mask marks, or whose logit is at least their row's floor."""
        logits, width = self.logits.numpy(), self.logits.shape[-1]
        found = [
            np.flatnonzero(mask | (row[: len(mask)] >= np.float32(floor))) + index * width
            for index, (row, mask, floor) in enumerate(zip(logits, masks, floors, strict=True))
        ]
        return self._take(np.concatenate(found))

    def _take(self, flat: Flat) -> Candidates:
        """The tokens at flattened positions `flat`, which ascend, as a truncated set."""
        height, width = self.logits.shape
        borders = np.searchsorted(flat, np.arange(height + 1) * width).tolist()
        shape = (height, max(1, *(end - start for start, end in pairwise(borders))))
        logits, ids = np.full(shape, NOT_CHOSEN, dtype=np.float32), np.full(shape, self.vocab_size, dtype=np.int64)
        values = self.get(flat)
        known = flat if self.ids is None else self.ids.numpy().ravel()[flat]
        for row, (start, end) in enumerate(pairwise(borders)):
            logits[row, : end - start] = values[start:end]
            np.subtract(known[start:end], row * width if self.ids is None else 0, out=ids[row, : end - start])
        return Candidates(torch.from_numpy(logits), self.vocab_size, torch.from_numpy(ids))


def maxima(rows: Tensor, axis: int = -1) -> Tensor:
    """The largest number of each row of `rows [..., K]`, `[...]`, or along another axis; NaN if it holds one."""
    # A third of what torch 2.13 takes on a CPU, whose threads have to be woken for it.
    return torch.from_numpy(rows.numpy().max(axis=axis)) if rows.device.type == "cpu" else rows.amax(dim=axis)


def find(logits: Tensor, floor: Floats) -> Flat:
    """Flattened positions of the logits `[B, K]` that are at least `floor [B]`, in order."""
    if logits.device.type != "cpu":
        marked = logits >= torch.from_numpy(floor).to(logits.device).unsqueeze(-1)
        found: Flat = marked.view(-1).nonzero().view(-1).cpu().numpy()
        return found
    # Comparing and finding in numpy takes a fifth of the time it takes in torch 2.13.
    return np.flatnonzero(logits.numpy() >= floor[:, None])


def _largest_but(rows: Tensor, count: Tensor) -> Tensor:
    """The largest number of each row of `rows [B, K]` but for `count [B]` larger ones, `[B]` on the CPU."""
    if rows.device.type != "cpu":
        return rows.topk(int(count.max()) + 1).values.cpu().gather(-1, count.unsqueeze(-1)).squeeze(-1)
    at = rows.shape[-1] - 1 - count.numpy()
    parted = np.partition(rows.numpy(), np.unique(at), axis=-1)
    return torch.from_numpy(parted[np.arange(len(at)), at])


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
