"""What goes into the engine and what comes out of it: token ids, parameters and events, no text and no HTTP.

The interface is the same for every engine behind it: `Engine.submit(job, deliver)` returns at once, `deliver` is
called on the engine's thread with the events of one step, and each submitted job ends with exactly one `Finished`
per sequence followed by one `Completed`, or with one `Failed`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from topkapi.model.decoding.grammar import Constraint
from topkapi.model.decoding.parameters import DecodingParameters
from topkapi.model.decoding.trace import TokenTrace
from topkapi.model.errors import TopkapiError
from topkapi.model.live_adapter import LiveAdapter
from topkapi.model.scoring import Scores

FinishReason = Literal["stop", "length", "deadline", "cancelled", "error"]


class StopCheck(Protocol):
    """Told each token of one sequence in order; returns the reason to stop after it, or None to go on."""

    def __call__(self, token_id: int) -> str | int | None: ...

    def copy(self) -> StopCheck:
        """The same place in the sequence, to go on from independently (a search has many ways to go on)."""
        ...


@dataclass(frozen=True)
class Caller:
    """On whose behalf a job is done. Callers get room in turn, after all those of a higher `precedence`."""

    name: str = ""
    precedence: int = 0


NOBODY = Caller()
"""The caller of whatever names none."""


@dataclass(frozen=True)
class GenerateJob:
    """Continue one prompt.

    `parameters` are effective ones, from `model.decoding.parameters.resolve`. `stop_check(index)` makes the stop
    check of sequence `index`; it is how stop strings reach an engine that knows no text. `constraint(index)` makes its
    constraint, where the parameters ask for structured output. `negative` are the tokens of the negative prompt (empty:
    the prompt's last token). `deadline` is in `time.monotonic()` seconds. `priority` orders the jobs of one `caller`.

    The last `answered` tokens of `prompt` are the answer's own beginning, as if the job had generated them: what comes
    has the noise, the penalties and the limit of an answer that began there. `stop_check` and `constraint` have been
    told of them; a search or mirostat, which remember more than tokens, can't go on so.
    """

    prompt: Sequence[int]
    parameters: DecodingParameters
    stop_check: Callable[[int], StopCheck] | None = None
    deadline: float | None = None
    priority: int = 0
    constraint: Callable[[int], Constraint] | None = None
    negative: Sequence[int] = ()
    answered: int = 0
    progress: bool = False
    """Whether it is told how much of the prompt has been read."""
    caller: Caller = NOBODY
    adapter: LiveAdapter | None = None
    """What the network's matrices have beside them for it."""


@dataclass(frozen=True)
class ScoreJob:
    """Log-probabilities of `token_ids` from position `first` on, in strided windows above `window` tokens.

    The tokens before `first` are context only: as of a prompt, what of them is cached is not read again.
    """

    token_ids: Sequence[int]
    window: int | None = None
    stride: int | None = None
    top: int = 0
    deadline: float | None = None
    priority: int = 0
    first: int = 1
    caller: Caller = NOBODY
    adapter: LiveAdapter | None = None


Job = GenerateJob | ScoreJob


@dataclass(frozen=True)
class Candidate:
    """A token and its log-probability."""

    token_id: int
    logprob: float


@dataclass(frozen=True)
class Token:
    """One generated token of sequence `index`.

    `raw_logprob` is the network's own log-probability in nats; `logprob` the one after every decoding stage, from
    which the token was drawn (0.0 for greedy); `rank` is 1 for the network's most likely token. The four are filled
    only where the job asked for log-probabilities, `trace` only where it asked for a trace.
    """

    index: int
    token_id: int
    logprob: float | None = None
    raw_logprob: float | None = None
    rank: int | None = None
    top: tuple[Candidate, ...] = ()
    trace: TokenTrace | None = None
    at: float | None = field(default=None, compare=False)
    """When it was chosen, in `time.monotonic()` seconds, if that was earlier than it was handed out."""


@dataclass(frozen=True)
class Finished:
    """Sequence `index` ended. `stop_reason` is the stop string or the token id that ended it, if one did.

    `score` is what a beam search ranked it by: log-probability / length ^ length penalty, in nats.
    """

    index: int
    reason: FinishReason
    stop_reason: str | int | None = None
    score: float | None = None


@dataclass(frozen=True)
class PromptProgress:
    """A generating job that asked for its progress has `read` of the `total` tokens of its prompt in the cache."""

    read: int
    total: int


@dataclass(frozen=True)
class ScoreProgress:
    """A scoring job has `scored` of `total` tokens done."""

    scored: int
    total: int


@dataclass(frozen=True)
class Timings:
    """Seconds a job waited, read its prompt, and generated."""

    queue_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0


@dataclass(frozen=True)
class Completed:
    """The job is over. `scores` is set for a scoring job, `cached_tokens` counts prompt tokens not computed again.

    Of `guessed_tokens` that were read ahead, `accepted_tokens` were what would have been chosen.
    """

    timings: Timings = field(default_factory=Timings)
    scores: Scores | None = None
    cached_tokens: int = 0
    deterministic: bool = True
    guessed_tokens: int = 0
    accepted_tokens: int = 0


@dataclass(frozen=True)
class Failed:
    """The job could not be finished; its sequences are over."""

    error: TopkapiError


Event = Token | Finished | PromptProgress | ScoreProgress | Completed | Failed
Deliver = Callable[[list[Event]], None]
Starting = Callable[[], None]
"""Called on the engine's thread, too: a job leaves the queue."""


class Handle(Protocol):
    """A submitted job."""

    @property
    def over(self) -> bool:
        """Whether nothing is done for it any more."""
        ...

    def cancel(self) -> None:
        """End the job within one step; its sequences finish with reason `cancelled`. Safe from any thread."""
        ...
