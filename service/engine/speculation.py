"""Guessing the next tokens from what a sequence already holds, so that one pass of the network settles several.

A guess is kept exactly when it is the token that would have been drawn anyway, so guessing changes how fast the
tokens come and nothing else. Guesses are what followed the last tokens where they occurred before (prompt lookup:
Saxena 2023; checking several tokens in one pass: Leviathan et al. 2022).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# An earlier occurrence of this many last tokens is looked for, the longer first.
MATCHED = (3, 2)
# A sequence whose guesses were all wrong guesses again after this many tokens.
PAUSE = 16


class PromptLookup:
    """Guesses for one sequence, at most `most` tokens at a time: more after guesses that were right, fewer after wrong
    ones, none for a while when nothing was right."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._length = min(most, 4)
        self._pause = 0

    def guess(self, tokens: NDArray[np.int64], room: int) -> list[int]:
        """Up to `room` tokens that may follow `tokens [n]`."""
        length = min(self._length, room)
        if self._pause or length < 1:
            self._pause = max(0, self._pause - 1)
            return []
        for matched in MATCHED:
            starts = np.arange(len(tokens) - matched)
            for offset in range(matched):
                starts = starts[tokens[starts + offset] == tokens[len(tokens) - matched + offset]]
            if len(starts):
                after = int(starts[-1]) + matched
                return [int(token) for token in tokens[after : after + length]]
        return []

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
