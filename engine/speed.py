"""How fast an engine has been of late, and how long what it has before it will take."""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from topkapi.engine.submitted import Submitted

FORGETTING = 0.99
"""What a step leaves of the weight of those before it, so that the last hundred or so count."""

WORTH_LEARNING = 0.5
"""Seconds from which on a wait that was foretold tells how right such foretelling is."""

MOST_WRONG = 4.0
"""How far off foretelling is taken to be at most."""


class Speed:
    """Seconds per token of a prompt and per step that only generates, as measured; None where nothing was yet."""

    def __init__(self) -> None:
        self._reading = [0.0, 0.0]
        self._generating = [0.0, 0.0]
        self._used = [0.0, 0.0]
        self._waited = [0.0, 0.0]

    def step(self, seconds: float, prompt_tokens: int, *, generated: bool = False) -> None:
        """Take in a step that read so many tokens of prompts or texts, and generated beside that if it says so.

        A step that does both takes as long as one that generates, and what is left is for the tokens that are read:
        with many short requests nearly every step does, and counted twice they would seem to take twice as long.
        """
        if prompt_tokens and generated:
            seconds = max(0.0, seconds - (_rate(self._generating) or 0.0))
        kind, amount = (self._reading, prompt_tokens) if prompt_tokens else (self._generating, 1)
        kind[:] = [kind[0] * FORGETTING + seconds, kind[1] * FORGETTING + amount]

    def began(self, foretold: float | None, waited: float) -> None:
        """Take in how long a job has waited that was foretold (by `start`) to wait so long."""
        if foretold is not None and foretold >= WORTH_LEARNING:
            self._waited[:] = [
                self._waited[0] * FORGETTING + waited,
                self._waited[1] * FORGETTING + foretold,
            ]

    def ended(self, job: Submitted) -> None:
        """Take in how much of what a job might have generated it has."""
        for sequence in job.sequences:
            if sequence.most:
                left = sequence.work_left()[1]
                used = self._used[0] * FORGETTING + sequence.most - left, self._used[1] * FORGETTING + sequence.most
                self._used[:] = used

    def wait(self, jobs: Iterable[Submitted], together: int) -> float | None:
        """Seconds until all of `jobs` are done, `together` sequences at a time; None before anything was measured.

        Of the tokens that they may generate, the share counts that jobs before them have used of theirs.
        """
        reading, generating, used = self._rates()
        if reading is None and generating is None:
            return None
        left = [sequence.work_left() for job in jobs for sequence in job.sequences if not sequence.done]
        prompts = sum(tokens for tokens, _ in left)
        answers = sum(tokens for _, tokens in left) * (1.0 if used is None else used)
        # What was not measured yet is taken to cost as little as it may.
        return self.corrected(prompts * (reading or 0.0) + answers / together * (generating or reading or 0.0))

    def start(self, running: Iterable[Submitted], before: Iterable[Submitted], together: int) -> float | None:
        """Seconds until a job would begin that comes after all of `before`; None before anything was measured.

        Of what is measured alone, so that it can be compared with how long it took: `corrected` makes of it what is
        to be expected. Each of the `together` places goes to the next sequence when what it holds is written. Until a
        job has ended nobody knows what part of what they may write jobs do write, and it is taken to be none.
        """
        reading, generating, used = self._rates()
        if reading is None and generating is None:
            return None
        prompts, steps = 0, [0.0] * together
        for job in (*running, *before):
            for sequence in job.sequences:
                if not sequence.done:
                    tokens, answer = sequence.work_left()
                    prompts += tokens
                    heapq.heapreplace(steps, steps[0] + answer * (used or 0.0))
        if steps[0] == 0.0 and not prompts:
            return 0.0
        return prompts * (reading or 0.0) + steps[0] * (generating or reading or 0.0)

    def corrected(self, seconds: float) -> float:
        """Of what was foretold, what is to be expected: by what jobs have waited of late beside what was foretold of
        them. Some of what is before a job goes away, begins elsewhere or is in the cache; other programs take turns."""
        waited, foretold = self._waited
        return seconds * min(MOST_WRONG, max(1 / MOST_WRONG, waited / foretold)) if foretold else seconds

    def _rates(self) -> tuple[float | None, float | None, float | None]:
        return _rate(self._reading), _rate(self._generating), _rate(self._used)


def _rate(sums: list[float]) -> float | None:
    return sums[0] / sums[1] if sums[1] else None
