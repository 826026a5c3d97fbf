"""`POST /v1/completions`: continue prompts, with echo and log-probabilities as evaluation harnesses read them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field

from topkapi.engine.request import Token
from topkapi.service.api.http.answering import Event, json_string
from topkapi.service.api.native.schemas import Prompt
from topkapi.service.api.openai import answers
from topkapi.service.api.openai.fields import ChunkedFields, CommonFields, body, with_default
from topkapi.service.api.openai.logprobs import (
    CompletionLogprobs,
    CompletionLogprobsWriter,
    Scored,
    of_answer,
    of_prompt,
    prompt_logprobs,
)
from topkapi.service.generation import CompletionOutput, Delta
from topkapi.service.models import LoadedModel
from topkapi.service.prompting import prompt_tokens

MAX_TOKENS = 16


class CompletionFields(ChunkedFields):
    """The fields of `POST /v1/completions` beside the decoding parameters."""

    HARMLESS: ClassVar[Mapping[str, tuple[Any, ...]]] = {**CommonFields.HARMLESS, "suffix": ("",)}
    REASONS: ClassVar[Mapping[str, str]] = {"suffix": "these checkpoints only continue a text, they fill no gaps"}

    prompt: Annotated[Prompt, Field(description="A text, a list of token ids, or a list of either.")]
    echo: Annotated[bool | None, Field(description="Repeat the prompt before each answer.")] = None


if TYPE_CHECKING:
    CompletionRequest = CompletionFields
else:
    CompletionRequest = body(
        CompletionFields, "CompletionRequest", "The body of `POST /v1/completions`, with any decoding parameter."
    )


class CompletionChoice(BaseModel):
    """One answer. `stop_reason` is the stop text or stop token that ended it, as in vLLM."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[dict[str, Any] | None] | None = None


class CompletionResponse(BaseModel):
    """The answer of `POST /v1/completions`; `seed` and `deterministic` say how to get it again."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: answers.CompletionUsage
    system_fingerprint: str
    seed: int
    deterministic: bool


class CompletionAnswer(answers.ChunkedAnswer):
    """The answers to the prompts."""

    kind = chunk_kind = "text_completion"

    def __init__(self, model: LoadedModel, body: CompletionRequest) -> None:
        body.refuse_inapplicable()
        self._body, self._prompts = body, prompt_tokens(model, body.prompt)
        given = with_default(body.decoding(), "max_tokens", MAX_TOKENS)
        plan = answers.planned(model, self._prompts, given)
        # The alternatives to tell, where log-probabilities are asked for; of a repeated prompt's tokens as well.
        self._top: int | None = None if given.get("logprobs") is None else plan.parameters[0].logprobs
        self._texts = _texts(model, body.prompt, self._prompts) if body.echo else []
        wanted = [body.prompt_logprobs, self._top if body.echo else None]
        prompt_top = max((each for each in wanted if each is not None), default=None)
        super().__init__(body, plan, "cmpl", prompt_top)
        self._writers = [CompletionLogprobsWriter(model, self._top or 0) for _ in self.generation.outputs]

    def choice(self, output: CompletionOutput) -> dict[str, Any]:
        logprobs = self._echoed_logprobs(output)
        if logprobs is not None:
            for name, values in self._writers[output.index].write(of_answer(output.tokens)).items():
                logprobs[name] = None if values is None else [*logprobs[name], *values]
        choice = self._choice(output, self._echoed(output) + output.text, logprobs) | self._how_it_ended(output)
        return choice | self._token_ids(output.tokens) | self._about_prompt(output)

    def opening(self) -> Iterator[Event]:
        for output in self.generation.outputs:
            if self._body.echo or self._body.return_token_ids:
                choice = self._choice(output, self._echoed(output), self._echoed_logprobs(output))
                yield self.chunk(output, choice | self._about_prompt(output))

    def added(self, delta: Delta) -> Iterator[dict[str, Any] | str]:
        if self._top is None and not self._body.return_token_ids:
            if delta.text:
                yield self._text_alone(delta)
            return
        output, tokens = delta.output, [] if delta.token is None else [delta.token]
        logprobs = None if self._top is None else self._writers[output.index].write(of_answer(tokens))
        if delta.text or logprobs or self._body.return_token_ids:
            yield self._choice(output, delta.text, logprobs) | self._token_ids(tokens)

    def _text_alone(self, delta: Delta) -> str:
        """A choice that says nothing but a text, as most do, without making a dictionary of it first."""
        text = json_string(delta.text)
        return (
            f'{{"index": {delta.output.index}, "text": {text}, "logprobs": null, "finish_reason": null, '
            '"stop_reason": null}'
        )

    def ended(self, output: CompletionOutput) -> Iterator[dict[str, Any]]:
        yield self._choice(output, "", None) | self._how_it_ended(output)

    def _choice(self, output: CompletionOutput, text: str, logprobs: Any) -> dict[str, Any]:
        return {"index": output.index, "text": text, "logprobs": logprobs, "finish_reason": None, "stop_reason": None}

    def _how_it_ended(self, output: CompletionOutput) -> dict[str, Any]:
        reason = answers.finish_reason(output)
        return {"finish_reason": reason, "stop_reason": answers.stop_reason(self.model, output)}

    def _token_ids(self, tokens: Sequence[Token]) -> dict[str, Any]:
        return {"token_ids": [token.token_id for token in tokens]} if self._body.return_token_ids else {}

    def _echoed(self, output: CompletionOutput) -> str:
        return self._texts[output.prompt_index] if self._body.echo else ""

    def _echoed_logprobs(self, output: CompletionOutput) -> dict[str, Any] | None:
        """Of the repeated prompt's tokens, those of the answer's to follow; None if none are asked for."""
        if self._top is None:
            return None
        scored: list[Scored] = []
        if self._body.echo and self.scoring is not None:
            scored = of_prompt(self._prompts[output.prompt_index], self.scoring.scores[output.prompt_index])
        return self._writers[output.index].write(scored, spelled=True)

    def _about_prompt(self, output: CompletionOutput) -> dict[str, Any]:
        """What vLLM's fields tell of an answer's prompt."""
        token_ids = self._prompts[output.prompt_index]
        told: dict[str, Any] = {"prompt_token_ids": token_ids} if self._body.return_token_ids else {}
        if self._body.prompt_logprobs is not None and self.scoring is not None:
            scores = self.scoring.scores[output.prompt_index]
            told["prompt_logprobs"] = prompt_logprobs(self.model, token_ids, scores)
        return told


def _texts(model: LoadedModel, prompt: Any, prompts: Sequence[list[int]]) -> list[str]:
    """The prompts as they were sent, or as their tokens spell them."""
    sent = prompt if isinstance(prompt, list) and len(prompt) == len(prompts) else [prompt]
    decode = model.checkpoint.tokenizer.decode
    return [each if isinstance(each, str) else decode(ids) for each, ids in zip(sent, prompts, strict=True)]
