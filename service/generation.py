"""One `/generate` request from parameters to texts, the same for every dialect, the studio and the terminal."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from topkapi.engine.request import (
    Completed,
    Finished,
    FinishReason,
    GenerateJob,
    PromptProgress,
    StopCheck,
    Timings,
    Token,
)
from topkapi.model.decoding.grammar import Constraint, compile_constraint
from topkapi.model.decoding.parameters import (
    BY_NAME,
    DecodingParameters,
    decoding_defaults,
    grammar_parameter,
    resolve,
)
from topkapi.model.decoding.stopping import Stopper, check_prompt, token_limit
from topkapi.model.errors import Cancelled, DeadlineExceeded, EngineError, InvalidRequest
from topkapi.service.jobs import EngineWork, JobGroup
from topkapi.service.limits import MOST_ANSWERS
from topkapi.service.models import LoadedModel
from topkapi.service.prompting import thinks, tokens_of, without_thinking


@dataclass(frozen=True)
class Plan:
    """A checked request: prompts as token ids, the effective parameters of each, and the structure of the answers."""

    model: LoadedModel
    prompts: Sequence[list[int]]
    parameters: Sequence[DecodingParameters]
    constraint: Callable[[int], Constraint] | None = None
    negative: Sequence[int] = ()
    answered: Sequence[int] = ()
    """The tokens that the one answer to the one prompt begins with, and is gone on with."""


@dataclass
class CompletionOutput:
    """One continuation as it grows. Its text is complete once `finish_reason` is set."""

    index: int
    prompt_index: int
    pieces: list[str] = field(default_factory=list, repr=False)
    """The text so far, in the pieces it came in: to add to a text would copy all of it for each token."""
    tokens: list[Token] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    score: float | None = None
    cancellation: Cancelled | None = None
    """Why it was cancelled, if it was."""

    @property
    def text(self) -> str:
        """The text so far."""
        if len(self.pieces) > 1:
            self.pieces[:] = ["".join(self.pieces)]
        return self.pieces[0] if self.pieces else ""


def no_answer(output: CompletionOutput) -> EngineError:
    """What an output is reported as that was broken off, where a part of an answer can't be said to be one."""
    if output.finish_reason == "deadline":
        return DeadlineExceeded("the answer was not written in the time that it was given", hint="give it more time")
    return output.cancellation or EngineError("the answer broke off", hint="send the request again")


@dataclass(frozen=True)
class Delta:
    """What one step added to an output. The text may be empty; `token` is None for text released at the end.

    Where it was asked for, `progress` tells how much of the prompt has been read; then nothing was added.
    """

    output: CompletionOutput
    text: str
    token: Token | None
    progress: PromptProgress | None = None


def defaults_of(model: LoadedModel, *, chat: bool | None = None) -> dict[str, Any]:
    """The checkpoint's defaults for conversations with `chat`, for other prompts without; None: for what it is for."""
    chat = model.checkpoint.chat is not None if chat is None else chat
    return decoding_defaults(model.checkpoint.generation, chat=chat)


def plan(
    model: LoadedModel,
    prompts: Sequence[list[int]],
    parameters: Mapping[str, Any],
    *,
    chat: bool = False,
    stored: bool = True,
    answered: Sequence[int] = (),
) -> Plan:
    """Check a request before anything is computed. Compiling a grammar takes a while: not for the event loop.

    With `chat` the prompts are conversations, which have defaults of their own; without `stored` the checkpoint's
    defaults have no say. The effective `max_tokens` of a prompt
    is at most what the context has room for. `answered` are tokens that the answer has already: what comes are those
    that would have come after them. A conversation whose template has begun to think is not thought about
    where the answer is to be JSON, a choice or the like. Raises `InvalidRequest` naming the field for a parameter, or
    for a prompt that does not fit.
    """
    config = model.checkpoint.config
    effective = resolve(
        parameters,
        defaults_of(model, chat=chat) if stored else {},
        vocab_size=config.vocab_size,
        end_token_ids=config.end_token_ids,
        vocabulary=model.checkpoint.tokenizer,
    )
    for name, count in (("n", effective.n), ("best_of", effective.best_of or 1)):
        if len(prompts) * count > MOST_ANSWERS:
            asked = f"{count} answers to each of {len(prompts):,} prompts"
            message = f"{name}: {asked} are more than {MOST_ANSWERS:,} together"
            raise InvalidRequest(message, field=name, hint="send several requests")
    if effective.thinking_budget is not None and not thinks(model):
        message = f"thinking_budget can't be used: {model.name} has no chat template that knows of thinking"
        raise InvalidRequest(message, field="thinking_budget", hint="leave it out")
    structure = grammar_parameter(effective)
    if chat and structure not in (None, "grammar"):
        prompts = [without_thinking(model, prompt) for prompt in prompts]
    negative = effective.negative_prompt or []
    negative = tokens_of(model, negative, "negative_prompt") if negative else negative
    if negative:
        check_prompt(negative, config, "negative_prompt")
    if answered:
        _check_answered(answered, prompts, effective)
    each = []
    for position, prompt in enumerate(prompts):
        try:
            for read in (prompt, negative or prompt) if answered else (prompt,):
                check_prompt([*read, *answered], config)
        except InvalidRequest as error:
            if len(prompts) > 1:
                error.field = f"prompt[{position}]"
                error.message = f"{error.field}: {error.message}"
            raise
        each.append(replace(effective, max_tokens=token_limit(len(prompt), effective, config)))
    checkpoint = model.checkpoint
    constraint = None
    if structure is not None:
        constraint = compile_constraint(effective, checkpoint.tokenizer, config.vocab_size, config.end_token_ids)
    return Plan(model, prompts, each, _after(answered, constraint), negative, answered)


def _check_answered(answered: Sequence[int], prompts: Sequence[list[int]], effective: DecodingParameters) -> None:
    """Raise `InvalidRequest` where an answer can't be gone on with from its tokens alone."""
    if len(prompts) > 1 or effective.n > 1 or (effective.best_of or 1) > 1:
        message = "answer_prefix is the beginning of one answer to one prompt, and several are asked for"
        raise InvalidRequest(message, field="answer_prefix", hint="send a request for each")
    for name in ("num_beams", "penalty_alpha", "mirostat"):
        if effective.asks_for(name):
            message = f"{name} can't be combined with answer_prefix: it remembers more of an answer than its tokens"
            hint = f"set {name} to {BY_NAME[name].off}, or send the tokens as the end of a prompt of token ids"
            raise InvalidRequest(message, field=name, hint=hint)
    if effective.max_tokens is not None and effective.max_tokens <= len(answered):
        message = f"answer_prefix has {len(answered):,} tokens, and max_tokens ({effective.max_tokens:,}) counts them"
        raise InvalidRequest(message, field="max_tokens", hint=f"send a max_tokens above {len(answered):,}")


def _after(
    answered: Sequence[int], constraint: Callable[[int], Constraint] | None
) -> Callable[[int], Constraint] | None:
    """The constraint of an answer that has these tokens. Raises `InvalidRequest` where they don't keep to it."""
    if constraint is None or not answered:
        return constraint
    begun = constraint(0)
    for position, token_id in enumerate(answered):
        try:
            begun.advance(token_id)
        except EngineError:
            at = f"answer_prefix[{position}]"
            message = f"{at} is a token that the structure which is asked for does not allow there"
            raise InvalidRequest(
                message, field=at, hint="go on with the structure that the answer began with"
            ) from None
    if begun.finished:
        message = "answer_prefix is complete: nothing can follow it in the structure that is asked for"
        raise InvalidRequest(message, field="answer_prefix", hint="leave it as it is")
    return lambda index: begun.copy()


@dataclass(frozen=True)
class Latencies:
    """Seconds between two tokens of one output, over all outputs: mean, median, 95th percentile and the longest."""

    mean: float
    p50: float
    p95: float
    max: float

    @classmethod
    def of(cls, gaps: Sequence[float]) -> Latencies | None:
        """Those of the gaps between tokens; None without any. Percentiles by the nearest rank."""
        if not gaps:
            return None
        ordered = sorted(gaps)
        p50, p95 = (ordered[math.ceil(share * len(ordered)) - 1] for share in (0.5, 0.95))
        return cls(math.fsum(ordered) / len(ordered), p50, p95, ordered[-1])


class Generation(EngineWork[Delta]):
    """Runs a plan.

    Where requests wait or compete for room, those of higher `priority` go first. `timeout_s` counts from the start.
    With `progress` the steps also tell how much of the prompts has been read.
    """

    def __init__(self, plan: Plan, priority: int = 0, *, progress: bool = False) -> None:
        self.plan = plan
        self.parameters = max(plan.parameters, key=lambda each: each.max_tokens or 0)
        """The effective parameters; `max_tokens` is that of the prompt with most room."""
        self.deterministic = True
        self.cached_tokens = self.guessed_tokens = self.accepted_tokens = 0
        self.order: tuple[str, ...] = tuple(plan.parameters[0].order)
        self.first_token_s: float | None = None
        """Seconds from the start to the first token of any output."""
        self.completed: dict[int, Completed] = {}
        """How the engine did each prompt, by its index, once it is done."""
        self._last_token: dict[int, float] = {}
        self._gaps: list[float] = []
        self._count = plan.parameters[0].n
        self.outputs = [
            CompletionOutput(prompt_index * self._count + index, prompt_index)
            for prompt_index in range(len(plan.prompts))
            for index in range(self._count)
        ]
        self._stoppers = [self._stopper(output.prompt_index) for output in self.outputs]
        jobs = [
            GenerateJob(
                [*prompt, *plan.answered] if plan.answered else prompt,
                parameters,
                self._stop_checks(prompt_index),
                priority=priority,
                constraint=plan.constraint,
                negative=plan.negative,
                answered=len(plan.answered),
                progress=progress,
            )
            for prompt_index, (prompt, parameters) in enumerate(zip(plan.prompts, plan.parameters, strict=True))
        ]
        self._group = JobGroup(plan.model, jobs)

    def start(self) -> None:
        """Submit the first jobs. Raises `Overloaded` when the queue is full. Needs a running event loop."""
        timeout = self.plan.parameters[0].timeout_s
        self._group.start(None if timeout is None else time.monotonic() + timeout)

    async def steps(self) -> AsyncIterator[Delta]:
        """What each step adds, until every output is finished. Raises the error of a failed step."""
        async for prompt_index, event in self._group.events():
            if isinstance(event, Token):
                output = self._output(prompt_index, event.index)
                output.tokens.append(event)
                self._note(output.index, self._group.elapsed)
                yield self._add(output, self._stoppers[output.index].feed(event.token_id), event)
            elif isinstance(event, Finished):
                output = self._output(prompt_index, event.index)
                output.finish_reason, output.stop_reason = event.reason, event.stop_reason
                output.score = event.score
                if event.reason == "cancelled":
                    output.cancellation = self.plan.model.engine.cancellation()
                if rest := self._stoppers[output.index].flush():
                    yield self._add(output, rest, None)
            elif isinstance(event, PromptProgress):
                yield Delta(self._output(prompt_index, 0), "", None, event)
            elif isinstance(event, Completed):
                self.completed[prompt_index] = event
                self.cached_tokens += event.cached_tokens
                self.guessed_tokens += event.guessed_tokens
                self.accepted_tokens += event.accepted_tokens
                self.deterministic = self.deterministic and event.deterministic
        for output in self.outputs:
            # Of many prompts, those that the engine was not given before all were cancelled.
            if output.finish_reason is None:
                output.finish_reason, output.cancellation = "cancelled", self.plan.model.engine.cancellation()

    @property
    def prompt_tokens(self) -> int:
        """Tokens that are read: those of all prompts, and of an answer that is gone on with."""
        return sum(map(len, self.plan.prompts)) + len(self.plan.answered)

    @property
    def completion_tokens(self) -> int:
        """Tokens generated so far."""
        return sum(len(output.tokens) for output in self.outputs)

    @property
    def timings(self) -> Timings:
        """The longest of each among the prompts, which are computed side by side."""
        all_timings = [each.timings for each in self.completed.values()]
        return Timings(
            max((each.queue_s for each in all_timings), default=0.0),
            max((each.prefill_s for each in all_timings), default=0.0),
            max((each.decode_s for each in all_timings), default=0.0),
        )

    @property
    def tokens_per_s(self) -> float | None:
        """Generated tokens per second of decoding; None before there is anything to measure."""
        seconds = self.timings.decode_s
        return self.completion_tokens / seconds if seconds > 0 and self.completion_tokens else None

    @property
    def latencies(self) -> Latencies | None:
        """How long tokens took after the one before; None until an output has two."""
        return Latencies.of(self._gaps)

    def _note(self, output: int, elapsed: float) -> None:
        if self.first_token_s is None:
            self.first_token_s = elapsed
        if output in self._last_token:
            self._gaps.append(elapsed - self._last_token[output])
        self._last_token[output] = elapsed

    def _output(self, prompt_index: int, index: int) -> CompletionOutput:
        return self.outputs[prompt_index * self._count + index]

    def _add(self, output: CompletionOutput, text: str, token: Token | None) -> Delta:
        if text:
            output.pieces.append(text)
        return Delta(output, text, token)

    def _stopper(self, prompt_index: int) -> Stopper:
        stopper = Stopper.of(self.plan.model.answer_bytes, self.plan.parameters[prompt_index])
        # What they made certain has been told; what they left open comes with the next ones.
        for token_id in self.plan.answered:
            stopper.feed(token_id)
        if stopper.stopped is not None:
            message = f"answer_prefix holds {stopper.stopped!r}, which ends the answer"
            raise InvalidRequest(message, field="answer_prefix", hint="leave it as it is, or leave that out of stop")
        return stopper

    def _stop_checks(self, prompt_index: int) -> Callable[[int], StopCheck] | None:
        parameters = self.plan.parameters[prompt_index]
        if not parameters.stop and not parameters.stop_regex:
            return None
        stopper = self._stopper(prompt_index)
        return lambda index: _StopStrings(stopper.copy())


class _StopStrings:
    """Tells the engine, which knows no text, that a stop string has appeared."""

    def __init__(self, stopper: Stopper) -> None:
        self._stopper = stopper

    def __call__(self, token_id: int) -> str | None:
        self._stopper.feed(token_id)
        return self._stopper.stopped

    def copy(self) -> _StopStrings:
        return _StopStrings(self._stopper.copy())
