"""`POST /v1/completions`: continue prompts, with echo and log-probabilities as evaluation harnesses read them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field

from topkapi.model.errors import InvalidRequest
from topkapi.model.scoring import Scores
from topkapi.service.api.http.answering import answered
from topkapi.service.api.http.apart import apart, on_thread, unless_disconnected
from topkapi.service.api.http.errors import InapplicableField
from topkapi.service.api.http.streaming import STREAM, EventStream
from topkapi.service.api.native import render
from topkapi.service.api.native.schemas import Prompt
from topkapi.service.api.openai import answers
from topkapi.service.api.openai.errors import ERRORS
from topkapi.service.api.openai.fields import CommonFields, StreamOptions, body, with_default
from topkapi.service.api.openai.logprobs import (
    CompletionLogprobs,
    CompletionLogprobsWriter,
    Scored,
    of_answer,
    of_prompt,
    prompt_logprobs,
)
from topkapi.service.api.openai.tgi_client import chosen
from topkapi.service.generation import Generation, Output, Plan
from topkapi.service.models import LoadedModel, Models
from topkapi.service.prompting import prompt_tokens

MAX_TOKENS = 16


class CompletionFields(CommonFields):
    """The fields of `POST /v1/completions` beside the decoding parameters."""

    HARMLESS: ClassVar[Mapping[str, tuple[Any, ...]]] = {**CommonFields.HARMLESS, "suffix": ("",)}
    REASONS: ClassVar[Mapping[str, str]] = {"suffix": "these checkpoints only continue a text, they fill no gaps"}

    prompt: Annotated[Prompt, Field(description="A text, a list of token ids, or a list of either.")]
    echo: Annotated[bool | None, Field(description="Repeat the prompt before each answer.")] = None
    stream_options: StreamOptions | None = None
    prompt_logprobs: Annotated[
        int | None, Field(ge=0, le=1000, description="As in vLLM: report so many most likely tokens at each place.")
    ] = None
    return_token_ids: Annotated[bool | None, Field(description="As in vLLM: tell the token ids too.")] = None


if TYPE_CHECKING:

    class CompletionRequest(CompletionFields):
        """The body of `POST /v1/completions`."""

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
    usage: answers.Usage
    system_fingerprint: str
    seed: int
    deterministic: bool


@dataclass
class Completion:
    """A checked request. `texts` are the prompts to echo, `top` the alternatives to tell, `scores` of each prompt."""

    model: LoadedModel
    body: CompletionRequest
    prompts: list[list[int]]
    texts: list[str]
    plan: Plan
    top: int | None
    scores: Sequence[Scores] | None = None

    @property
    def scored_top(self) -> int | None:
        """How many alternatives are wanted for each token of the prompts; None if they needn't be scored."""
        wanted = [self.body.prompt_logprobs, self.top if self.body.echo else None]
        return max((each for each in wanted if each is not None), default=None)

    def choice(self, output: Output, text: str, logprobs: Any) -> dict[str, Any]:
        """A choice, or part of one in a stream."""
        return {"index": output.index, "text": text, "logprobs": logprobs, "finish_reason": None, "stop_reason": None}

    def ended(self, output: Output) -> dict[str, Any]:
        """How a choice ended."""
        reasons = {"finish_reason": answers.finish_reason(output)}
        return reasons | {"stop_reason": answers.stop_reason(self.model, output)}

    def echoed(self, output: Output) -> str:
        """What is repeated before an answer."""
        return self.texts[output.prompt_index] if self.body.echo else ""

    def echoed_tokens(self, output: Output) -> list[Scored]:
        """The repeated prompt's tokens."""
        if not self.body.echo or self.scores is None:
            return []
        return of_prompt(self.prompts[output.prompt_index], self.scores[output.prompt_index])

    def about_prompt(self, output: Output) -> dict[str, Any]:
        """What vLLM's fields tell of an answer's prompt."""
        token_ids = self.prompts[output.prompt_index]
        told: dict[str, Any] = {"prompt_token_ids": token_ids} if self.body.return_token_ids else {}
        if self.body.prompt_logprobs is not None and self.scores is not None:
            told["prompt_logprobs"] = prompt_logprobs(self.model, token_ids, self.scores[output.prompt_index])
        return told


def add_routes(routes: APIRouter, models: Models) -> None:
    """Add the route."""

    @routes.post(
        "/v1/completions",
        summary="Continue prompts",
        responses={**ERRORS, 200: {"model": CompletionResponse, "content": STREAM, "description": "The answers"}},
        response_model=None,
    )
    async def completions(request: Request, body: CompletionRequest) -> Response:
        completion = await apart(request, _checked, chosen(models, body.model), body)
        identifier, created = render.new_id("cmpl"), render.timestamp()
        if completion.scored_top is not None:
            work = answers.scored(body, completion.model, completion.prompts, completion.scored_top)
            completion.scores = await unless_disconnected(request, work)
        generation = answers.started(body, completion.plan)
        if body.stream:
            generation.start()
            chunks = _chunks(completion, generation, identifier, created)
            return EventStream(generation, answers.chunk_events(chunks))
        async with generation:
            await unless_disconnected(request, generation.finish())
        return await answered(lambda: _response(completion, generation, identifier, created))


def _checked(model: LoadedModel, body: CompletionRequest) -> Completion:
    body.refuse_inapplicable()
    if body.stream_options is not None and not body.stream:
        raise InapplicableField("stream_options go with stream", field="stream_options", hint="set stream to true")
    if body.stream and body.prompt_logprobs is not None:
        raise InvalidRequest("prompt_logprobs can't be streamed", field="prompt_logprobs", hint="leave out stream")
    given = with_default(body.decoding(), "max_tokens", MAX_TOKENS)
    prompts = prompt_tokens(model, body.prompt)
    top = given.get("logprobs")
    plan = answers.planned(model, prompts, given)
    texts = _texts(model, body.prompt, prompts) if body.echo else []
    return Completion(model, body, prompts, texts, plan, top if top is None else plan.parameters[0].logprobs)


def _texts(model: LoadedModel, prompt: Any, prompts: Sequence[list[int]]) -> list[str]:
    """The prompts as they were sent, or as their tokens spell them."""
    sent = prompt if isinstance(prompt, list) and len(prompt) == len(prompts) else [prompt]
    decode = model.checkpoint.tokenizer.decode
    return [each if isinstance(each, str) else decode(ids) for each, ids in zip(sent, prompts, strict=True)]


def _response(completion: Completion, generation: Generation, identifier: str, created: int) -> dict[str, Any]:
    choices = []
    for output in generation.outputs:
        logprobs = None
        if completion.top is not None:
            writer = CompletionLogprobsWriter(completion.model, completion.top)
            logprobs = writer.write(completion.echoed_tokens(output), spelled=True)
            for name, values in writer.write(of_answer(output.tokens)).items():
                logprobs[name] = None if values is None else [*logprobs[name], *values]
        choice = completion.choice(output, completion.echoed(output) + output.text, logprobs) | completion.ended(output)
        if completion.body.return_token_ids:
            choice["token_ids"] = [token.token_id for token in output.tokens]
        choices.append(choice | completion.about_prompt(output))
    content = _head(generation, identifier, created) | {"choices": choices, "usage": answers.usage(generation)}
    return content | answers.reproducible(generation)


def _head(generation: Generation, identifier: str, created: int) -> dict[str, Any]:
    return {"id": identifier, "object": "text_completion", "created": created, "model": generation.plan.model.name}


async def _chunks(
    completion: Completion, generation: Generation, identifier: str, created: int
) -> AsyncIterator[dict[str, Any]]:
    """The chunks of a stream: the echoed prompts, what each step adds, how each answer ended, and the counts."""
    body, model = completion.body, completion.model
    count_tokens = body.stream_options is not None and bool(body.stream_options.include_usage)
    head = _head(generation, identifier, created) | {"system_fingerprint": answers.FINGERPRINT}
    writers = [CompletionLogprobsWriter(model, completion.top or 0) for _ in generation.outputs]
    ended: set[int] = set()

    def chunk(choices: list[dict[str, Any]]) -> dict[str, Any]:
        return head | {"choices": choices} | ({"usage": None} if count_tokens else {})

    def endings() -> list[dict[str, Any]]:
        new = [output for output in generation.outputs if output.finish_reason and output.index not in ended]
        ended.update(output.index for output in new)
        return [chunk([completion.choice(output, "", None) | completion.ended(output)]) for output in new]

    def before(output: Output) -> dict[str, Any] | None:
        """What is told of an answer's prompt, which may be long."""
        told = completion.about_prompt(output)
        if not body.echo and not told:
            return None
        logprobs = None
        if completion.top is not None:
            logprobs = writers[output.index].write(completion.echoed_tokens(output), spelled=True)
        return chunk([completion.choice(output, completion.echoed(output), logprobs) | told])

    for output in generation.outputs:
        first = await on_thread(partial(before, output)) if body.echo or body.return_token_ids else None
        if first is not None:
            yield first
    async for delta in generation.deltas():
        tokens = [] if delta.token is None else [delta.token]
        logprobs = None
        if completion.top is not None:
            logprobs = writers[delta.output.index].write(of_answer(tokens))
        choice = completion.choice(delta.output, delta.text, logprobs)
        if body.return_token_ids:
            choice["token_ids"] = [token.token_id for token in tokens]
        if delta.text or logprobs or body.return_token_ids:
            yield chunk([choice])
        for ending in endings():
            yield ending
    for ending in endings():
        yield ending
    if count_tokens:
        last = {"choices": [], "usage": answers.usage(generation)}
        yield head | last | answers.reproducible(generation)
