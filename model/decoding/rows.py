"""One sequence at one step, and what the stages need to know of its history."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from topkapi.model.decoding.table import DecodingParameters

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
