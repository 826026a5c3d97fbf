"""What OpenAI's answers have in common: plans, ends, counts, and the chunks of chat and completions."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from pydantic import BaseModel

from topkapi.model.decoding.aliases import translated
from topkapi.model.errors import InvalidRequest
from topkapi.service.api.http.answering import Answer, Event, text_of
from topkapi.service.api.native.generate import new_id, timestamp
from topkapi.service.api.openai.errors import DIALECT
from topkapi.service.api.openai.fields import ChunkedFields, CommonFields
from topkapi.service.generation import CompletionOutput, Delta, Generation, Plan, no_answer, plan
from topkapi.service.models import LoadedModel
from topkapi.service.prompting import thinking_tokens, thinks
from topkapi.service.scoring import Item, Scoring
from topkapi.service.version import VERSION

FINGERPRINT = f"topkapi-{VERSION}"


class PromptTokensDetails(BaseModel):
    """Of the prompt's tokens, those that were not computed again."""

    cached_tokens: int


class CompletionTokensDetails(BaseModel):
    """Of the generated tokens, those that were thought before an answer."""

    reasoning_tokens: int


class CompletionUsage(BaseModel):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None
    completion_tokens_details: CompletionTokensDetails | None = None


def planned(model: LoadedModel, prompts: Sequence[list[int]], given: Mapping[str, Any], source: str = "prompt") -> Plan:
    """A checked request of parameters under any of their names, and of prompts made from the field `source`: unless
    that is `prompt`, they are conversations.

    Raises `InvalidRequest` in those names.
    """
    try:
        with translated(given) as parameters:
            return plan(model, prompts, parameters, chat=source != "prompt")
    except InvalidRequest as error:
        if error.field == "prompt":
            error.field = source
        raise


def finish_reason(output: CompletionOutput) -> str:
    """Why an output ended, in OpenAI's words. Raises `EngineError` for one that was broken off."""
    if output.finish_reason in ("cancelled", "error") or (output.finish_reason == "deadline" and not output.tokens):
        raise no_answer(output)
    return "stop" if output.finish_reason == "stop" else "length"


def stop_reason(model: LoadedModel, output: CompletionOutput) -> str | int | None:
    """As in vLLM: the stop text or stop token that ended an output, nothing for one that ended by itself."""
    reason = output.stop_reason
    return None if reason in model.checkpoint.config.end_token_ids else reason


def usage(generation: Generation) -> dict[str, Any]:
    """Token counts of a generation so far."""
    prompt, completion = generation.prompt_tokens, generation.completion_tokens
    counts: dict[str, Any] = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": generation.cached_tokens},
    }
    if thinks(generation.plan.model):
        counts["completion_tokens_details"] = {"reasoning_tokens": reasoning_tokens(generation)}
    return counts


def reasoning_tokens(generation: Generation) -> int:
    """How many of the generated tokens were thought before an answer."""
    prompts, model = generation.plan.prompts, generation.plan.model
    return sum(
        thinking_tokens(model, prompts[output.prompt_index], [token.token_id for token in output.tokens])
        for output in generation.outputs
    )


def reproducible(generation: Generation) -> dict[str, Any]:
    """What it takes to get the same answer again: the seed, drawn or given, and whether it is enough."""
    return {
        "system_fingerprint": FINGERPRINT,
        "seed": generation.parameters.seed,
        "deterministic": generation.deterministic,
    }


class OpenAIAnswer(Answer[Delta]):
    """An answer of one of OpenAI's routes. Where `prompt_top` is not None, the prompts are scored before it begins,
    with so many most likely tokens at each place."""

    dialect = DIALECT

    def __init__(self, body: CommonFields, plan: Plan, kind: str, prompt_top: int | None = None) -> None:
        # vLLM's priorities count downwards, the engine's upwards.
        priority = -(body.priority or 0)
        self.model, self.identifier, self.created = plan.model, new_id(kind), timestamp()
        self.generation = Generation(plan, priority)
        self.scoring: Scoring | None = None
        if prompt_top is not None:
            items = [Item(token_ids) for token_ids in plan.prompts]
            self.scoring = Scoring(plan.model, items, top=prompt_top, priority=priority)
        super().__init__(self.generation, stream=body.stream, before=self.scoring)


class ChunkedAnswer(OpenAIAnswer):
    """Chat's or completions' answers. A stream tells them in chunks of one choice: what each step adds to it, and how
    it ended; then, where that is wanted, the counts."""

    kind: ClassVar[str]
    """What a whole answer says it is."""

    chunk_kind: ClassVar[str]
    last: tuple[Event, ...] = ((None, "[DONE]"),)
    """The end of a stream that did not break off."""

    def __init__(self, body: ChunkedFields, plan: Plan, kind: str, prompt_top: int | None = None) -> None:
        super().__init__(body, plan, kind, prompt_top)
        self._count_tokens = body.stream_options is not None and bool(body.stream_options.include_usage)
        self._ended: set[int] = set()
        # What all chunks begin with is written once: a chunk has little more than its token.
        self._begun = text_of(self._head(self.chunk_kind)).removesuffix("}")

    @abstractmethod
    def choice(self, output: CompletionOutput) -> dict[str, Any]:
        """A whole choice."""

    @abstractmethod
    def added(self, delta: Delta) -> Iterator[dict[str, Any] | str]:
        """What a step adds to a choice, as values or as their JSON."""

    @abstractmethod
    def ended(self, output: CompletionOutput) -> Iterator[dict[str, Any]]:
        """The end of a choice."""

    def more(self, output: CompletionOutput) -> dict[str, Any]:
        """What a chunk says beside its choice."""
        return {}

    def whole(self) -> dict[str, Any]:
        """The choices and the counts."""
        choices = [self.choice(output) for output in self.generation.outputs]
        return self._head(self.kind) | {"choices": choices} | self._counts()

    def told(self, step: Delta) -> Iterator[Event]:
        """What a step added, and which answers it ended."""
        for choice in self.added(step):
            yield self.chunk(step.output, choice)
        yield from self._endings()

    def ending(self) -> Iterator[Event]:
        """How the other answers ended, the counts, and that this was all."""
        yield from self._endings()
        if self._count_tokens:
            last = {"choices": []} | self._counts() | self.more(self.generation.outputs[0])
            yield None, self._head(self.chunk_kind) | last
        yield from self.last

    def chunk(self, output: CompletionOutput, choice: dict[str, Any] | str, **told: Any) -> Event:
        """A chunk of one choice, and what else is told in it."""
        counts: dict[str, Any] = {"usage": None} if self._count_tokens else {}
        rest = counts | self.more(output) | told
        end = f", {text_of(rest)[1:]}" if rest else "}"
        return None, f'{self._begun}, "choices": [{text_of(choice)}]{end}'

    def _endings(self) -> Iterator[Event]:
        for output in self.generation.outputs:
            if output.finish_reason is not None and output.index not in self._ended:
                self._ended.add(output.index)
                for choice in self.ended(output):
                    yield self.chunk(output, choice)

    def _counts(self) -> dict[str, Any]:
        return {"usage": usage(self.generation)} | reproducible(self.generation)

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.identifier, "object": kind, "created": self.created, "model": self.model.name,
            "system_fingerprint": FINGERPRINT,
        }  # fmt: skip
