"""What calls of the Python API return: texts that know how they came about, and the scores of texts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from html import escape
from typing import Any, Self

from topkapi.python.table import html_table

Bytes = bytes


class _FromAnswer:
    """What is made of a part of an answer of the routes: fields of the same names."""

    @classmethod
    def of(cls, part: Mapping[str, Any]) -> Self:
        """`part`, its parts made of theirs, and bytes of lists of numbers."""
        kinds: Mapping[str, type[_FromAnswer]] = _PARTS.get(cls, {})

        def made(name: str, value: Any) -> Any:
            if name in kinds and value is not None:
                return [kinds[name].of(each) for each in value]
            return Bytes(value) if name == "bytes" and isinstance(value, list) else value

        make: Any = cls
        result: Self = make(**{name: made(name, value) for name, value in part.items()})
        return result


@dataclass(frozen=True)
class Candidate(_FromAnswer):
    """A token that could have been chosen, and its log-probability in nats."""

    token_id: int
    text: str
    bytes: Bytes
    logprob: float


@dataclass(frozen=True)
class Token(_FromAnswer):
    """One generated token: its id, its text (a part of a character shows as U+FFFD) and its bytes.

    With `logprobs` also the log-probability after every decoding stage, `raw_logprob` and `rank` as the network gave
    it, and the likeliest tokens in `top`. One of minus infinity is -9999.
    """

    token_id: int
    text: str
    bytes: Bytes
    logprob: float | None = None
    raw_logprob: float | None = None
    rank: int | None = None
    top: Sequence[Candidate] = ()


@dataclass(frozen=True)
class StageTrace(_FromAnswer):
    """What a stage did: candidates left, the probability it removed, and the entropy (nats) after it.

    `probabilities` are those of the token's `contenders` after it, in their order; 0 for what is ruled out.
    """

    stage: str
    kept: int
    cut: float
    entropy: float
    probabilities: Sequence[float]


@dataclass(frozen=True)
class RunnerUp(_FromAnswer):
    """Another token that could have been chosen, with its probability before and after the stages."""

    token_id: int
    text: str
    bytes: Bytes
    raw_probability: float
    probability: float


@dataclass(frozen=True)
class Contender(_FromAnswer):
    """A token that is followed through the stages, with the network's own probability of it."""

    token_id: int
    text: str
    bytes: Bytes
    raw_probability: float


@dataclass(frozen=True)
class TokenTrace(_FromAnswer):
    """How one token was decided; `str` of it is a line.

    `how` is sampled, greedy, forced or searched; `noise` the Gumbel noise of a sampled token, `entropy` (nats) the
    network's, `guessed` whether it was read ahead and turned out right. `contenders` are the chosen token and those
    that were likeliest before the stages or after them.
    """

    token_id: int
    text: str
    how: str
    candidates: int
    entropy: float
    stages: Sequence[StageTrace]
    rank: int
    raw_probability: float
    probability: float
    noise: float | None
    runners_up: Sequence[RunnerUp]
    contenders: Sequence[Contender]
    guessed: bool = False

    def cells(self) -> list[str]:
        """The line, as cells under `Trace.HEADING`."""
        stages = ", ".join(f"{each.stage} {each.kept:,}" for each in self.stages)
        others = "  ".join(f"{each.text!r} {each.probability:.3f}" for each in self.runners_up[:3])
        return [
            repr(self.text), self.how, f"{self.raw_probability:.4f}", str(self.rank), f"{self.probability:.4f}",
            f"{self.entropy:.2f}", f"{self.candidates:,}" + (f" → {stages}" if stages else ""), others,
        ]  # fmt: skip

    def __str__(self) -> str:
        return "  ".join(self.cells())


class Trace(list[TokenTrace]):
    """How each token was decided, in order. Printed, and in a notebook, it is a table."""

    HEADING = ("token", "how", "raw", "rank", "final", "entropy", "candidates → left by stage", "runners-up")

    def __str__(self) -> str:
        rows = [list(self.HEADING), *(each.cells() for each in self)]
        widths = [max(len(row[at]) for row in rows) for at in range(len(self.HEADING))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        )

    def _repr_html_(self) -> str:
        return html_table(self.HEADING, (each.cells() for each in self))


@dataclass(frozen=True)
class Usage(_FromAnswer):
    """Token counts. `cached_tokens` of the prompt were not computed again; of `guessed_tokens` read ahead,
    `accepted_tokens` were right."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    cached_tokens: int = 0
    guessed_tokens: int = 0
    accepted_tokens: int = 0


@dataclass(frozen=True)
class Timings:
    """Seconds of the whole call: waiting, reading the prompt, generating, and until the first token."""

    queue_s: float
    prefill_s: float
    decode_s: float
    first_token_s: float | None
    tokens_per_s: float | None


class Generated(str):
    """A generated text. It is a `str` in every respect, and knows how it came about.

    text            the same as a plain str
    tokens          each with id, text and bytes; with logprobs=k also log-probabilities, rank and k alternatives
    token_ids       their ids alone
    finish_reason   "stop", "length", "deadline" or "cancelled"
    stop_reason     the stop text or the token id that ended it, if one did
    usage           token counts of this prompt and all its answers
    parameters      every decoding parameter that was in force, the seed among them
    order           the stages in the order in which they were applied
    deterministic   whether the same call gives the same tokens whatever else is computed
    trace           with trace=True: how each token was decided; print it
    score           of a beam search: log-probability / length ^ length_penalty
    timings         how long the call took
    model           the name of the checkpoint
    prompt_index, output_index   which prompt of the call, and which of its answers
    choices         all `n` answers to the prompt, this one among them
    """

    tokens: list[Token]
    finish_reason: str
    stop_reason: str | int | None
    usage: Usage
    parameters: dict[str, Any]
    order: tuple[str, ...]
    deterministic: bool
    trace: Trace | None
    score: float | None
    timings: Timings
    model: str
    prompt_index: int
    output_index: int
    choices: list[Generated]

    @classmethod
    def of(cls, text: str, **facts: Any) -> Self:
        """`text` with what is known of it."""
        made = cls(text)
        vars(made).update(facts)
        return made

    @property
    def text(self) -> str:
        """The text as a plain str."""
        return str.__str__(self)

    @property
    def token_ids(self) -> list[int]:
        """The ids of the generated tokens, a final end token included."""
        return [token.token_id for token in self.tokens]

    @property
    def logprobs(self) -> list[float] | None:
        """Each token's log-probability in nats after every stage; None unless `logprobs` was asked for."""
        if self.parameters["logprobs"] is None:
            return None
        return [token.logprob for token in self.tokens if token.logprob is not None]


class Piece(str):
    """What one step added to an answer: text, which may be empty, and its token.

    `tokens` has the token (none where only text was held back until the end), `trace` how it was decided;
    `output_index` and `prompt_index` tell which answer it belongs to.
    """

    tokens: list[Token]
    trace: Trace | None
    output_index: int
    prompt_index: int

    @classmethod
    def of(cls, text: str, **facts: Any) -> Self:
        """`text` with what is known of it."""
        made = cls(text)
        vars(made).update(facts)
        return made

    @property
    def token_ids(self) -> list[int]:
        """The id of its token, in a list."""
        return [token.token_id for token in self.tokens]


@dataclass(frozen=True)
class ScoredToken(_FromAnswer):
    """One token of a scored text. `logprob`, `rank` and `entropy` (nats) are None for the first of a text."""

    token_id: int
    text: str
    bytes: Bytes
    logprob: float | None
    rank: int | None
    entropy: float | None
    top: Sequence[Candidate] = ()


@dataclass(frozen=True)
class SurprisingToken(ScoredToken):
    """One of the least probable tokens of a text: `position` counts its tokens from 0, `start_byte` its bytes."""

    position: int = 0
    start_byte: int = 0


@dataclass(frozen=True)
class Segment(_FromAnswer):
    """A stretch of a scored text: tokens from `start` and bytes from `start_byte`, each up to before its `end`.

    `nll` is in nats, summed over the `scored_tokens`.
    """

    start: int
    end: int
    start_byte: int
    end_byte: int
    scored_tokens: int
    nll: float


@dataclass(frozen=True)
class Score(_FromAnswer):
    """How probable a text is, or a completion after its prompt. `nll` is in nats over the `scored_tokens`.

    What is per something, and `perplexity`, is None where nothing could be scored (a text of one token). In a notebook
    the text is shown with its tokens, the less expected the darker.
    """

    tokens: int
    scored_tokens: int
    bytes: int
    nll: float
    nll_per_token: float | None
    nll_per_byte: float | None
    perplexity: float | None
    bits_per_byte: float | None
    greedy_match: bool | None = None
    per_token: Sequence[ScoredToken] | None = None
    segments: Sequence[Segment] | None = None
    surprising: Sequence[SurprisingToken] | None = None

    def __repr__(self) -> str:
        known = ", ".join(
            f"{each.name}={value:.6g}"
            if isinstance(value := getattr(self, each.name), float)
            else f"{each.name}={value}"
            for each in fields(self)
            if each.name not in ("per_token", "segments", "surprising") and getattr(self, each.name) is not None
        )
        return f"Score({known})"

    def _repr_html_(self) -> str:
        return f"<p>{escape(repr(self))}</p>" + "".join(map(_coloured, self.per_token or ()))


def _coloured(token: ScoredToken) -> str:
    """A token in HTML, the less probable the darker its ground: 10 nats are as dark as it gets."""
    surprise = 0.0 if token.logprob is None else min(1.0, -token.logprob / 10)
    said = "" if token.logprob is None else f"p {2.718281828459045**token.logprob:.4f}, rank {token.rank}"
    text = escape(token.text).replace("\n", "⏎<br>")
    return f'<span title="{said}" style="background:rgba(217,95,2,{surprise:.2f});white-space:pre-wrap">{text}</span>'


class Scores(list[Score]):
    """Scores of several texts, in order. Of choices, `ranking` has their indices, the likeliest first: `choice`."""

    choice: int | None = None
    ranking: list[int] | None = None

    @classmethod
    def of(cls, scores: Iterable[Score], choice: int | None, ranking: list[int] | None) -> Self:
        """`scores`, and what is best of them."""
        made = cls(scores)
        made.choice, made.ranking = choice, ranking
        return made


_PARTS: Mapping[type, Mapping[str, type[_FromAnswer]]] = {
    Token: {"top": Candidate},
    TokenTrace: {"stages": StageTrace, "runners_up": RunnerUp, "contenders": Contender},
    ScoredToken: {"top": Candidate},
    SurprisingToken: {"top": Candidate},
    Score: {"per_token": ScoredToken, "segments": Segment, "surprising": SurprisingToken},
}
