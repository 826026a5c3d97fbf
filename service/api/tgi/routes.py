"""The routes of text-generation-inference (TGI), which the clients `text-generation` and `huggingface_hub` call."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from topkapi.engine.request import Token
from topkapi.model.decoding.aliases import translated
from topkapi.model.errors import EngineError, InvalidRequest, Overloaded, TopkapiError
from topkapi.service.api.http.answering import answered
from topkapi.service.api.http.apart import apart, unless_disconnected
from topkapi.service.api.http.body import JSONRoute
from topkapi.service.api.http.dialect import Dialect, with_hint
from topkapi.service.api.http.errors import INTERNAL, InapplicableField
from topkapi.service.api.http.json_reader import schema_in
from topkapi.service.api.http.streaming import STREAM, EventStream
from topkapi.service.api.tgi import schemas
from topkapi.service.generation import Delta, Generation, Output, Plan, no_answer, plan
from topkapi.service.models import LoadedModel, Models
from topkapi.service.prompting import raw_tokens
from topkapi.service.scoring import Item, finite, score_items
from topkapi.service.version import VERSION

SAMPLING = ("temperature", "top_k", "top_p", "typical_p")
"""Parameters that make the answer a sampled one even without `do_sample`."""


def _error(error: TopkapiError) -> tuple[int, dict[str, Any]]:
    if isinstance(error, Overloaded):
        status, kind = 429, "overloaded"
    elif isinstance(error, EngineError):
        status, kind = 424, "generation"
    else:
        status, kind = error.status, "validation" if error.status < 500 else "incomplete_generation"
    return status, {"error": with_hint(error), "error_type": kind}


TGI = Dialect("tgi", _error, fields={"/generate": ("inputs",)})

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": schemas.TGIError, "description": meaning}
    for status, meaning in {
        400: "The body is not valid JSON",
        404: "No checkpoint is loaded",
        413: "The body is too large",
        415: "The body is not declared as JSON",
        422: "A field is wrong",
        424: "A step of the engine failed",
        429: "The queue is full; wait Retry-After seconds",
        500: "The server met an unexpected error",
    }.items()
}


def router(models: Models) -> APIRouter:
    """TGI's routes. Its requests name no checkpoint: the default one answers."""
    routes = APIRouter(route_class=JSONRoute, tags=["text-generation-inference"])

    @routes.post(
        "/generate",
        summary="TGI: continue inputs",
        responses={**ERRORS, 200: {"model": schemas.TGIResponse, "content": STREAM}},
        response_model=None,
    )
    async def generate(request: Request, body: schemas.TGIRequest) -> Response:
        asked = await apart(request, _Asked, models.get(), body)
        return asked.stream() if body.stream else await asked.answer(request)

    @routes.post(
        "/",
        summary="TGI: continue inputs, answering a list",
        responses={**ERRORS, 200: {"model": list[schemas.TGIResponse], "content": STREAM}},
        response_model=None,
    )
    async def compatible(request: Request, body: schemas.TGIRequest) -> Response:
        asked = await apart(request, _Asked, models.get(), body)
        return asked.stream() if body.stream else await asked.answer(request, listed=True)

    @routes.post(
        "/generate_stream",
        summary="TGI: continue inputs, token by token",
        responses={**ERRORS, 200: {"content": STREAM, "description": "Server-sent events"}},
        response_class=Response,
        response_model=None,
    )
    async def generate_stream(request: Request, body: schemas.TGIStreamRequest) -> Response:
        return (await apart(request, _Asked, models.get(), body, streamed=True)).stream()

    @routes.get("/info", summary="TGI: what is served", response_model=schemas.TGIInfo, responses={404: ERRORS[404]})
    async def info() -> Response:
        return JSONResponse(_info(models.get()))

    return routes


class _Asked:
    """A checked request. Reading it compiles grammars: not for the event loop."""

    def __init__(self, model: LoadedModel, body: schemas.TGIStreamRequest, streamed: bool = False) -> None:
        self.parameters = body.parameters or schemas.TGIParameters()
        self.full_text = bool(self.parameters.return_full_text)
        self.inputs = body.inputs
        self.model = model
        _refuse(self.parameters, streamed or bool(getattr(body, "stream", False)))
        # What is cut to its end is read as a whole, so it need not fit.
        prompt = raw_tokens(model, body.inputs, "inputs", fits=self.parameters.truncate is None)
        if self.parameters.truncate is not None:
            prompt = prompt[-self.parameters.truncate :]
        self.plan = _plan(model, prompt, self.parameters)
        self.sampled = self.plan.parameters[0].temperature > 0

    def stream(self) -> Response:
        """The answer token by token."""
        generation = Generation(self.plan)
        generation.start()
        return EventStream(generation, self._events(generation))

    async def answer(self, request: Request, *, listed: bool = False) -> Response:
        """The whole answer; `listed` puts it into a list."""
        prefill: list[dict[str, Any]] = []
        if self.parameters.decoder_input_details:
            prefill = await unless_disconnected(request, self._prefill())
        generation = Generation(self.plan)
        async with generation:
            await unless_disconnected(request, generation.finish())

        def made() -> Any:
            answer = self._answer(generation, prefill)
            return [answer] if listed else answer

        return await answered(made)

    def _answer(self, generation: Generation, prefill: list[dict[str, Any]]) -> dict[str, Any]:
        # The likeliest per token first, as TGI ranks them.
        best, *others = sorted(generation.outputs, key=_mean_logprob, reverse=True)
        content: dict[str, Any] = {"generated_text": self._text(best)}
        if self.parameters.details or self.parameters.decoder_input_details:
            content["details"] = self._details(best, prefill)
            if others:
                content["details"]["best_of_sequences"] = [
                    {"generated_text": self._text(other)} | self._details(other, prefill) for other in others
                ]
        return content

    async def _events(self, generation: Generation) -> AsyncIterator[bytes]:
        """One event per token. The last one also has the whole text, so each waits until it is known not to be it."""
        held: dict[str, Any] | None = None
        try:
            async for delta in generation.deltas():
                if delta.token is None:
                    assert held is not None, "only what followed a token can be released"
                    held["token"]["text"] += delta.text
                    continue
                if held is not None:
                    yield _event(held)
                held = self._token_event(delta, delta.token)
            (output,) = generation.outputs
            if held is not None:
                details = {key: self._summary(output)[key] for key in ("finish_reason", "generated_tokens", "seed")}
                details["input_length"] = generation.prompt_tokens
                yield _event(held | {"generated_text": self._text(output), "details": details})
        except TopkapiError as error:
            yield _event(_error(error)[1])
        except Exception:
            yield _event(_error(INTERNAL)[1])
            raise

    def _token_event(self, delta: Delta, token: Token) -> dict[str, Any]:
        event: dict[str, Any] = {
            "index": len(delta.output.tokens),
            "token": self._token(token) | {"text": delta.text},
            "generated_text": None,
            "details": None,
        }
        if self.parameters.top_n_tokens:
            event["top_tokens"] = self._top(token)
        return event

    async def _prefill(self) -> list[dict[str, Any]]:
        (prompt,) = self.plan.prompts
        logprobs: list[float | None] = [None]
        if len(prompt) > 1:
            (scores,) = await score_items(self.model, [Item(prompt)])
            logprobs += [finite(logprob) for logprob in scores.logprobs]
        return [
            {"id": token_id, "text": self.model.token_text(token_id), "logprob": logprob}
            for token_id, logprob in zip(prompt, logprobs, strict=True)
        ]

    def _text(self, output: Output) -> str:
        return self.inputs + output.text if self.full_text else output.text

    def _summary(self, output: Output) -> dict[str, Any]:
        seed = self.plan.parameters[0].seed if self.sampled else None
        return {"finish_reason": _finish_reason(output), "generated_tokens": len(output.tokens), "seed": seed}

    def _details(self, output: Output, prefill: list[dict[str, Any]]) -> dict[str, Any]:
        details = self._summary(output) | {"prefill": prefill, "tokens": list(map(self._token, output.tokens))}
        if self.parameters.top_n_tokens:
            details["top_tokens"] = [self._top(token) for token in output.tokens]
        return details

    def _token(self, token: Token) -> dict[str, Any]:
        assert token.raw_logprob is not None
        return self._named(token.token_id, token.raw_logprob)

    def _top(self, token: Token) -> list[dict[str, Any]]:
        return [self._named(each.token_id, each.logprob) for each in token.top]

    def _named(self, token_id: int, logprob: float) -> dict[str, Any]:
        text, special = self.model.token_text(token_id), token_id in self.model.control_ids
        return {"id": token_id, "text": text, "logprob": finite(logprob), "special": special}


def _refuse(parameters: schemas.TGIParameters, streamed: bool) -> None:
    if parameters.watermark:
        hint = "leave it out, or set it to false"
        raise InapplicableField("watermark: texts are not watermarked here", field="parameters.watermark", hint=hint)
    if parameters.adapter_id is not None:
        message = "adapter_id: no adapters are loaded here"
        raise InapplicableField(message, field="parameters.adapter_id", hint="leave it out")
    if streamed and (parameters.best_of or 1) > 1:
        message = "best_of: of several answers the best is only known at their end, so they can't be streamed"
        raise InvalidRequest(message, field="parameters.best_of", hint="set best_of to 1, or leave out stream")
    if streamed and parameters.decoder_input_details:
        message = "decoder_input_details: a stream has no place for the prompt's log-probabilities"
        raise InapplicableField(message, field="parameters.decoder_input_details", hint="leave out stream")


def _plan(model: LoadedModel, prompt: list[int], asked: schemas.TGIParameters) -> Plan:
    names = ("temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "frequency_penalty", "seed")
    given = {name: getattr(asked, name) for name in names}
    sampled = asked.do_sample or any(given[name] is not None for name in SAMPLING)
    if (asked.best_of or 1) > 1 and not sampled:
        message = "best_of: without sampling all answers would be the same"
        raise InvalidRequest(message, field="parameters.best_of", hint="set do_sample to true")
    if not sampled:
        given["temperature"] = 0.0
    given |= {"max_new_tokens": asked.max_new_tokens, "n": asked.best_of, "logprobs": asked.top_n_tokens or 0}
    if asked.stop:
        # TGI leaves the stop sequence at the end of the text.
        given |= {"stop": asked.stop, "include_stop": True}
    if asked.grammar is not None:
        given |= _structure(asked.grammar)
    with translated(given) as parameters:
        # TGI takes nothing from a checkpoint's generation_config.json: what a request leaves out is off.
        planned = plan(model, [prompt], parameters, stored=False)
    room = model.context_length - len(prompt)
    if "max_new_tokens" in asked.model_fields_set and (asked.max_new_tokens or 0) > room:
        raise InvalidRequest(
            f"max_new_tokens: {len(prompt)} tokens of inputs leave room for {room} in the context of "
            f"{model.context_length}, not for {asked.max_new_tokens}",
            field="parameters.max_new_tokens",
            hint="lower max_new_tokens, or cut the inputs with truncate",
        )
    return planned


def _structure(grammar: schemas.TGIGrammar) -> Mapping[str, Any]:
    if grammar.type == "regex":
        return {"regex": grammar.value}
    if isinstance(grammar.value, str):
        return {"json_schema": schema_in(grammar.value, "parameters.grammar.value", "grammar.value")}
    return {"json_schema": grammar.value}


def _mean_logprob(output: Output) -> float:
    return sum(token.raw_logprob or 0.0 for token in output.tokens) / max(len(output.tokens), 1)


def _finish_reason(output: Output) -> str:
    if output.finish_reason == "length":
        return "length"
    if output.finish_reason == "stop":
        return "stop_sequence" if isinstance(output.stop_reason, str) else "eos_token"
    raise no_answer(output)


def _event(data: Mapping[str, Any]) -> bytes:
    return f"data:{json.dumps(data, ensure_ascii=False, allow_nan=False)}\n\n".encode()


def _info(model: LoadedModel) -> dict[str, Any]:
    return {
        "model_id": model.name,
        "model_sha": None,
        "model_dtype": model.dtype,
        "model_device_type": model.checkpoint.model.embed_tokens.weight.device.type,
        "model_pipeline_tag": "text-generation",
        "max_concurrent_requests": model.engine.max_queue,
        "max_best_of": 128,
        "max_stop_sequences": 128,
        "max_input_tokens": model.context_length - 1,
        "max_total_tokens": model.context_length,
        "max_client_batch_size": 1,
        "router": "topkapi",
        "version": VERSION,
        "sha": None,
        "docker_label": None,
    }
