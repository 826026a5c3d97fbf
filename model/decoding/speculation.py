"""Guessing the next tokens, so that one pass of the network settles several.

A guess is kept exactly when it is the token that would have been drawn anyway, so guessing changes how fast the
tokens come and nothing else (checking several tokens in one pass: Leviathan et al. 2022). Guesses are what followed
the last tokens where they occurred before (prompt lookup: Saxena 2023), or what a smaller network of the same
vocabulary would choose.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from topkapi.model.cache import NetworkOutput, Work
from topkapi.model.decoding.choosing import choose
from topkapi.model.decoding.stage import Row

logger = logging.getLogger(__name__)

# An earlier occurrence of this many last tokens is looked for, the longer first.
MATCHED = (3, 2)
# A sequence whose guesses were all wrong guesses again after this many tokens.
PAUSE = 16
# How many tokens a draft network guesses at a time unless a request says otherwise.
DRAFT_TOKENS = 4


class DraftLength:
    """How many tokens to guess at a time, at most `most`: more after guesses that were right, fewer after wrong ones,
    none for a while when nothing was right."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._length = min(most, 4)
        self._pause = 0

    def length(self, room: int) -> int:
        """Tokens to guess now, at most `room`."""
        if self._pause:
            self._pause -= 1
            return 0
        return max(0, min(self._length, room))

    def learn(self, guessed: int, accepted: int) -> None:
        """Take in how many of the tokens guessed last were right."""
        if not guessed:
            return
        if accepted == guessed:
            self._length = min(self._most, 2 * self._length)
        elif accepted:
            self._length = accepted
        else:
            self._length = max(1, self._length // 2)
            self._pause = PAUSE if self._length == 1 else 0


def looked_up(tokens: NDArray[np.int64], length: int) -> list[int]:
    """Up to `length` tokens that followed the last of `tokens [n]` where they occurred before."""
    for matched in MATCHED:
        if len(tokens) <= matched:
            continue
        starts = np.arange(len(tokens) - matched)
        for offset in range(matched):
            starts = starts[tokens[starts + offset] == tokens[len(tokens) - matched + offset]]
        if len(starts):
            after = int(starts[-1]) + matched
            return [int(token) for token in tokens[after : after + length]]
    return []


@dataclass
class Draft:
    """A row whose next `length` tokens are to be guessed, its cache slot, and the guesses."""

    slot: int
    row: Row
    length: int
    guesses: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        # The row's own history must not see what is only guessed.
        row = self.row
        constraint = row.constraint.copy() if row.constraint is not None else None
        self.row = replace(
            row, tokens=list(row.tokens), surprise_bounds=list(row.surprise_bounds), constraint=constraint
        )


class Reader(Protocol):
    """A network over a cache of `slots` sequences of up to `capacity` tokens."""

    slots: int
    capacity: int

    def run(self, works: Sequence[Work]) -> list[NetworkOutput]:
        """Read every work's tokens; what each asked for."""
        ...


class Drafter:
    """Guesses for the sequences of a step, together, by a draft `network` with a cache of its own.

    It chooses as the sequence's own parameters say and with the same noise, so that where the two networks agree on
    the distribution they agree on what is drawn from it. At most `budget` tokens are read to catch up in one step; a
    sequence that needs more waits for its first guess.
    """

    def __init__(self, network: Reader, budget: int) -> None:
        self.network, self.budget = network, budget
        self._held: list[list[int]] = [[] for _ in range(network.slots)]

    def guess(self, drafts: Iterable[Draft]) -> None:
        """Fill in the guesses, as far as they are worth it."""
        left = self.budget
        active = []
        for draft in drafts:
            tokens = draft.row.tokens
            if draft.slot < self.network.slots and len(tokens) + draft.length <= self.network.capacity and left > 0:
                # The last token is read even if it was read before: its logits are needed.
                held = self._held[draft.slot]
                same = (at for at, (old, new) in enumerate(zip(held, tokens, strict=False)) if old != new)
                read = min(next(same, len(held)), len(tokens) - 1)
                behind = len(tokens) - read
                held[read:] = tokens[read : read + min(behind, left)]
                active.append((draft, read, behind <= left))
                left -= min(behind, left)
        try:
            self._guess(active)
        except Exception:
            # Guesses are worth having, never worth failing for.
            logger.exception("the draft network failed; this step goes without it")
            for draft, _, _ in active:
                self._held[draft.slot].clear()
                draft.guesses.clear()

    def _guess(self, active: list[tuple[Draft, int, bool]]) -> None:
        while active:
            works = [
                Work(draft.slot, read, self._held[draft.slot][read:], wanted=int(ready))
                for draft, read, ready in active
            ]
            outputs = self.network.run(works)
            caught_up = [
                (draft, output.logits[-1]) for (draft, _, ready), output in zip(active, outputs, strict=True) if ready
            ]
            if not caught_up:
                return
            choices = choose([logits for _, logits in caught_up], [draft.row for draft, _ in caught_up])
            active = []
            for (draft, _), choice in zip(caught_up, choices, strict=True):
                draft.guesses.append(choice.token_id)
                draft.row.tokens.append(choice.token_id)
                if draft.row.constraint is not None:
                    draft.row.constraint.advance(choice.token_id)
                    if draft.row.constraint.finished:
                        continue
                if len(draft.guesses) < draft.length:
                    held = self._held[draft.slot]
                    held.append(choice.token_id)
                    active.append((draft, len(held) - 1, True))
