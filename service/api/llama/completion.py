"""llama.cpp's own routes for text: `/completion` with its streams, and the errors of its clients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from topkapi.engine.request import Token
from topkapi.model.decoding.aliases import translated
from topkapi.model.errors import ContextExceeded, InvalidRequest, TextTooLong, TopkapiError
from topkapi.service.api.http.answering import Answer, Event, apart, respond
from topkapi.service.api.http.describing import STREAM, errors_of
from topkapi.service.api.http.dialect import Dialect, with_hint
from topkapi.service.api.http.registration import Routes
from topkapi.service.api.http.timings import Stopwatch
from topkapi.service.api.llama import schemas
from topkapi.service.api.llama.parameters import generation_settings, parameters_of, settings_of
from topkapi.service.api.llama.prompts import add_texts, read_prompts
from topkapi.service.api.llama.state import add_state
from topkapi.service.api.openai import chat
from topkapi.service.api.openai.tgi_client import chosen
from topkapi.service.generation import CompletionOutput, Delta, Generation, Plan, no_answer, plan
from topkapi.service.models import LoadedModel, Models
from topkapi.service.scoring import finite

_KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "unavailable_error",
          501: "not_supported_error", 503: "unavailable_error"}  # fmt: skip


def _error(error: TopkapiError) -> tuple[int, dict[str, Any]]:
    # llama.cpp says 400 of a wrong field.
    status = 400 if error.status == 422 else error.status
    kind = _KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    content = {"code": status, "message": with_hint(error), "type": kind}
    if isinstance(error, ContextExceeded):
        least = "at least " if isinstance(error, TextTooLong) else ""
        available = f"the available context size ({error.context_length} tokens)"
        message = f"the request ({least}{error.tokens} tokens) exceeds {available}"
        content |= {"message": message, "type": "exceed_context_size_error"}
        content |= {"n_prompt_tokens": error.tokens, "n_ctx": error.context_length}
    return status, {"error": content}


LLAMA = Dialect("llama.cpp", _error, fields={"/tokenize": ("content", "prompt"), "/detokenize": ("tokens",)})

ERRORS = errors_of(schemas.LlamaError, 404, 408, 413, 415, 429, 500, more={
    400: "The body is not valid JSON, or a field is wrong",
    503: "The checkpoint is being unloaded, or every slot is in use",
})  # fmt: skip


def router(models: Models) -> Routes:
    """llama.cpp's routes over the loaded checkpoints."""
    routes = Routes(ERRORS, tags=["llama.cpp"])
    one: dict[str, Any] = {"stream": STREAM, "description": "The answer"}

    shapes = schemas.LlamaCompletion | list[schemas.LlamaCompletion]

    @routes.answering("/completion", "llama.cpp: continue a prompt", shapes, stream=STREAM, name="completion")
    @routes.answering("/completions", "llama.cpp: continue a prompt", shapes, stream=STREAM, name="completions")
    async def complete(request: Request, body: schemas.LlamaRequest) -> Response:
        return await respond(request, _Answer, models.get(body.model), body)

    add_texts(routes, models)
    add_state(routes, models)
    for prefix, continues in (("", True), ("/v1", False)):
        _add_count(routes, models, prefix, continues)

    # Of OpenAI's routes without /v1, the others have other meanings there, or none. As there, an answer goes on with
    # what the assistant said last.
    @routes.answering(
        "/chat/completions", "llama.cpp: OpenAI's chat without /v1", chat.ChatResponse, name="chat", **one
    )
    async def unversioned(request: Request, body: chat.ChatRequest) -> Response:
        return await respond(request, chat.ChatAnswer, chosen(models, body.model), body, continues=True)

    return routes


def _add_count(routes: Routes, models: Models, prefix: str, continues: bool) -> None:
    summary = "llama.cpp: how many tokens a conversation has"

    @routes.answering(f"{prefix}/chat/completions/input_tokens", summary, schemas.LlamaCount)
    async def count(request: Request, body: chat.ChatRequest) -> Response:
        return JSONResponse({"input_tokens": await apart(request, _count, models.get(body.model), body, continues)})


def _count(model: LoadedModel, body: chat.ChatRequest, continues: bool) -> int:
    """Tokens of the prompt that the body asks to continue, also where it is too long to be. Refuses what chat does."""
    try:
        (prompt,) = chat.checked(model, body, continues)[0].prompts
    except ContextExceeded as error:
        if error.field != "messages" or isinstance(error, TextTooLong):
            raise
        return error.tokens
    return len(prompt)


def _plan(model: LoadedModel, body: schemas.LlamaRequest, settings: dict[str, Any]) -> Plan:
    prompts = read_prompts(model, body.prompt)
    with translated(parameters_of(model, body, settings)) as parameters:
        return plan(model, prompts, parameters, stored=False)


class _Answer(Answer[Delta]):
    dialect = LLAMA

    def __init__(self, model: LoadedModel, body: schemas.LlamaRequest) -> None:
        body.refuse_inapplicable()
        settings = settings_of(body)
        settings["return_tokens"] = bool(body.return_tokens)
        slot = 0 if body.id_slot is None or body.id_slot < 0 else body.id_slot
        if slot >= model.engine.max_running:
            message = f"id_slot is {slot}, but there are the slots 0 to {model.engine.max_running - 1}"
            raise InvalidRequest(message, field="id_slot", hint="leave it out, or send -1")
        self._generation = Generation(_plan(model, body, settings))
        self._model, self._settings, self._slot = model, settings, slot
        self._fields = body.response_fields or ()
        self._stopwatch = Stopwatch(self._generation)
        self._held: dict[int, str] = {}
        super().__init__(self._generation, stream=body.stream)

    def whole(self) -> Any:
        answers = [self._completion(output) for output in self._generation.outputs]
        return answers[0] if len(answers) == 1 else answers

    def told(self, step: Delta) -> Iterator[Event]:
        if step.token is None:
            self._held[step.output.index] = step.text
        else:
            yield None, self._chunk(step, step.token)

    def ending(self) -> Iterator[Event]:
        """Each output's whole answer, with the text that was held back for a stop."""
        for output in self._generation.outputs:
            yield None, self._completion(output, self._held.get(output.index, ""))

    def _completion(self, output: CompletionOutput, streamed: str | None = None) -> dict[str, Any]:
        """The whole answer of one output; at the end of a stream, with `streamed` as the text not sent yet."""
        model, generation = self._model, self._generation
        stop_type = _stop_type(output)
        prompt = generation.plan.prompts[output.prompt_index]
        effective = generation.plan.parameters[output.prompt_index]
        total = len(prompt) + len(output.tokens)
        keep = self._settings["return_tokens"] and streamed is None
        content = {
            "index": output.index,
            "content": output.text if streamed is None else streamed,
            "tokens": [token.token_id for token in output.tokens] if keep else [],
            "id_slot": self._slot,
            "stop": True,
            "model": model.name,
            "tokens_predicted": len(output.tokens),
            "tokens_evaluated": len(prompt),
            "generation_settings": generation_settings(model, self._settings, effective),
            "prompt": model.checkpoint.tokenizer.decode(prompt),
            "has_new_line": "\n" in output.text,
            "truncated": output.finish_reason == "length" and total >= model.context_length,
            "stop_type": stop_type,
            "stopping_word": output.stop_reason if stop_type == "word" else "",
            "tokens_cached": total,
            "timings": self._stopwatch.of(output),
        }
        if self._settings["n_probs"] and streamed is None:
            content["completion_probabilities"] = [self._probabilities(token) for token in output.tokens]
        return _selected(content, self._fields)

    def _chunk(self, delta: Delta, token: Token) -> dict[str, Any]:
        output = delta.output
        self._stopwatch.token(output)
        content: dict[str, Any] = {
            "index": output.index,
            "content": delta.text,
            "tokens": [token.token_id],
            "stop": False,
            "id_slot": self._slot,
            "tokens_predicted": len(output.tokens),
            "tokens_evaluated": len(self._generation.plan.prompts[output.prompt_index]),
        }
        if self._settings["n_probs"]:
            content["completion_probabilities"] = [self._probabilities(token)]
        if self._settings["timings_per_token"]:
            content["timings"] = self._stopwatch.of(output)
        return content

    def _probabilities(self, token: Token) -> dict[str, Any]:
        if self._settings["post_sampling_probs"]:
            return self._after_sampling(token)
        assert token.raw_logprob is not None
        return self._token(token.token_id) | {
            "logprob": finite(token.raw_logprob),
            "top_logprobs": [self._token(each.token_id) | {"logprob": finite(each.logprob)} for each in token.top],
        }

    def _after_sampling(self, token: Token) -> dict[str, Any]:
        assert token.trace is not None
        chosen = (token.token_id, token.trace.probability)
        others = [(each.token_id, each.probability) for each in token.trace.runners_up if token.trace.how != "greedy"]
        likeliest = sorted([chosen, *others], key=lambda pair: -pair[1])[: self._settings["n_probs"]]
        return self._token(token.token_id) | {
            "prob": token.trace.probability,
            "top_probs": [self._token(token_id) | {"prob": probability} for token_id, probability in likeliest],
        }

    def _token(self, token_id: int) -> dict[str, Any]:
        raw = self._model.checkpoint.tokenizer.token_bytes(token_id)
        return {"id": token_id, "token": raw.decode("utf-8", "replace"), "bytes": list(raw)}


def _stop_type(output: CompletionOutput) -> str:
    if output.finish_reason in ("length", "deadline"):
        return "limit"
    if output.finish_reason == "stop":
        return "word" if isinstance(output.stop_reason, str) else "eos"
    raise no_answer(output)


def _selected(content: dict[str, Any], fields: Sequence[str]) -> dict[str, Any]:
    """Only the named fields; `a/b` is field b of a, under that whole name. A name that is none is left out."""
    if not fields:
        return content
    chosen: dict[str, Any] = {}
    for name in fields:
        value: Any = content
        for part in name.split("/"):
            value = value.get(part, _MISSING) if isinstance(value, dict) else _MISSING
        if value is not _MISSING:
            chosen[name] = value
    return chosen


_MISSING = object()
