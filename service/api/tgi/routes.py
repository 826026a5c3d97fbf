"""The routes of text-generation-inference (TGI), which the clients `text-generation` and `huggingface_hub` call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from topkapi.engine.request import Token
from topkapi.model.decoding.aliases import translated
from topkapi.model.errors import EngineError, InvalidRequest, Overloaded, TopkapiError
from topkapi.service.api.http.answering import Answer, Event, respond
from topkapi.service.api.http.body import schema_in
from topkapi.service.api.http.describing import STREAM, errors_of
from topkapi.service.api.http.dialect import Dialect, with_hint
from topkapi.service.api.http.errors import InapplicableField
from topkapi.service.api.http.registration import Routes
from topkapi.service.api.tgi import schemas
from topkapi.service.generation import CompletionOutput, Delta, Generation, Plan, no_answer, plan
from topkapi.service.models import LoadedModel, Models
from topkapi.service.prompting import raw_tokens
from topkapi.service.scoring import Item, Scoring, finite
from topkapi.service.version import VERSION

SAMPLING = ("temperature", "top_k", "top_p", "typical_p")
"""Parameters that make the answer a sampled one even without `do_sample`."""

_KINDS = {401: "authentication", 403: "permission", 429: "overloaded"}
"""What is no fault of the request's: TGI itself has no keys, and its clients know `overloaded` alone."""


def _error(error: TopkapiError) -> tuple[int, dict[str, Any]]:
    if isinstance(error, Overloaded):
        status, kind = 429, "overloaded"
    elif isinstance(error, EngineError):
        status, kind = 424, "generation"
    elif error.status in _KINDS:
        status, kind = error.status, _KINDS[error.status]
    else:
        status, kind = error.status, "validation" if error.status < 500 else "incomplete_generation"
    return status, {"error": with_hint(error), "error_type": kind}


TGI = Dialect("tgi", _error, fields={"/generate": ("inputs",)}, data_mark="data:")

ERRORS = errors_of(schemas.TGIError, 400, 408, 413, 415, 429, more={
    404: "No checkpoint is loaded",
    422: "A field is wrong",
    424: "A step of the engine failed",
    500: "The server met an unexpected error",
})  # fmt: skip


def router(models: Models) -> Routes:
    """TGI's routes. Its requests name no checkpoint: the default one answers."""
    routes = Routes(ERRORS, tags=["text-generation-inference"])

    @routes.answering("/generate", "TGI: continue inputs", schemas.TGIResponse, stream=STREAM)
    async def generate(request: Request, body: schemas.TGIRequest) -> Response:
        return await respond(request, _Answer, models.get(), body, stream=body.stream)

    @routes.answering("/", "TGI: continue inputs, answering a list", list[schemas.TGIResponse], stream=STREAM)
    async def compatible(request: Request, body: schemas.TGIRequest) -> Response:
        return await respond(request, _Answer, models.get(), body, stream=body.stream, listed=True)

    @routes.answering(
        "/generate_stream",
        "TGI: continue inputs, token by token",
        stream=STREAM,
        description="Server-sent events",
        response_class=Response,
    )
    async def generate_stream(request: Request, body: schemas.TGIStreamRequest) -> Response:
        return await respond(request, _Answer, models.get(), body, stream=True)

    @routes.answering("/info", "TGI: what is served", schemas.TGIInfo, method="GET", errors={404: ERRORS[404]})
    async def info() -> Response:
        return JSONResponse(_info(models.get()))

    return routes


class _Answer(Answer[Delta]):
    dialect = TGI

    def __init__(
        self, model: LoadedModel, body: schemas.TGIStreamRequest, *, stream: bool | None, listed: bool = False
    ) -> None:
        asked = body.parameters or schemas.TGIParameters()
        _refuse(asked, bool(stream))
        # What is cut to its end is read as a whole, so it need not fit.
        prompt = raw_tokens(model, body.inputs, "inputs", fits=asked.truncate is None)
        if asked.truncate is not None:
            prompt = prompt[-asked.truncate :]
        self._plan = _plan(model, prompt, asked)
        self._model, self._inputs, self._parameters, self._listed = model, body.inputs, asked, listed
        self._generation = Generation(self._plan)
        self._scoring = Scoring(model, [Item(prompt)]) if asked.decoder_input_details and len(prompt) > 1 else None
        self._held: dict[str, Any] | None = None
        super().__init__(self._generation, stream=stream, before=self._scoring)

    def whole(self) -> Any:
        # The likeliest per token first, as TGI ranks them.
        best, *others = sorted(self._generation.outputs, key=_mean_logprob, reverse=True)
        content: dict[str, Any] = {"generated_text": self._text(best)}
        if self._parameters.details or self._parameters.decoder_input_details:
            prefill = self._prefill() if self._parameters.decoder_input_details else []
            content["details"] = self._details(best, prefill)
            if others:
                content["details"]["best_of_sequences"] = [
                    {"generated_text": self._text(other)} | self._details(other, prefill) for other in others
                ]
        return [content] if self._listed else content

    def told(self, step: Delta) -> Iterator[Event]:
        """The token before: the last one's event also has the whole text, so each waits until it is known not to be."""
        if step.token is None:
            assert self._held is not None, "only what followed a token can be released"
            self._held["token"]["text"] += step.text
            return
        if self._held is not None:
            yield None, self._held
        self._held = self._token_event(step, step.token)

    def ending(self) -> Iterator[Event]:
        (output,) = self._generation.outputs
        # Raises where it was broken off, also before its first token.
        _finish_reason(output)
        if self._held is not None:
            details = self._summary(output) | {"input_length": self._generation.prompt_tokens}
            yield None, self._held | {"generated_text": self._text(output), "details": details}

    def _token_event(self, delta: Delta, token: Token) -> dict[str, Any]:
        event: dict[str, Any] = {
            "index": len(delta.output.tokens),
            "token": self._token(token) | {"text": delta.text},
            "generated_text": None,
            "details": None,
        }
        if self._parameters.top_n_tokens:
            event["top_tokens"] = self._top(token)
        return event

    def _prefill(self) -> list[dict[str, Any]]:
        (prompt,) = self._plan.prompts
        logprobs = [] if self._scoring is None else map(finite, self._scoring.scores[0].logprobs)
        return [
            {"id": token_id, "text": self._model.token_text(token_id), "logprob": logprob}
            for token_id, logprob in zip(prompt, [None, *logprobs], strict=True)
        ]

    def _text(self, output: CompletionOutput) -> str:
        return self._inputs + output.text if self._parameters.return_full_text else output.text

    def _summary(self, output: CompletionOutput) -> dict[str, Any]:
        effective = self._plan.parameters[0]
        seed = effective.seed if effective.temperature > 0 else None
        return {"finish_reason": _finish_reason(output), "generated_tokens": len(output.tokens), "seed": seed}

    def _details(self, output: CompletionOutput, prefill: list[dict[str, Any]]) -> dict[str, Any]:
        details = self._summary(output) | {"prefill": prefill, "tokens": list(map(self._token, output.tokens))}
        if self._parameters.top_n_tokens:
            details["top_tokens"] = [self._top(token) for token in output.tokens]
        return details

    def _token(self, token: Token) -> dict[str, Any]:
        assert token.raw_logprob is not None
        return self._named(token.token_id, token.raw_logprob)

    def _top(self, token: Token) -> list[dict[str, Any]]:
        return [self._named(each.token_id, each.logprob) for each in token.top]

    def _named(self, token_id: int, logprob: float) -> dict[str, Any]:
        text, special = self._model.token_text(token_id), token_id in self._model.control_ids
        return {"id": token_id, "text": text, "logprob": finite(logprob), "special": special}


def _refuse(parameters: schemas.TGIParameters, streamed: bool) -> None:
    if parameters.watermark:
        hint = "leave it out, or set it to false"
        raise InapplicableField("watermark: texts are not watermarked here", field="parameters.watermark", hint=hint)
    if parameters.adapter_id is not None:
        message = "adapter_id: an adapter is asked for by its name, as model in the other dialects"
        raise InapplicableField(message, field="parameters.adapter_id", hint="use /v1/completions")
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


def _mean_logprob(output: CompletionOutput) -> float:
    return sum(token.raw_logprob or 0.0 for token in output.tokens) / max(len(output.tokens), 1)


def _finish_reason(output: CompletionOutput) -> str:
    if output.finish_reason == "length":
        return "length"
    if output.finish_reason == "stop":
        return "stop_sequence" if isinstance(output.stop_reason, str) else "eos_token"
    raise no_answer(output)


def _info(model: LoadedModel) -> dict[str, Any]:
    return {
        "model_id": model.name,
        "model_sha": None,
        "model_dtype": model.dtype,
        "model_device_type": model.checkpoint.model.device.type,
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
