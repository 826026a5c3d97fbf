"""llama.cpp's own routes for text: `/completion` with its streams, and the errors of its clients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from topkapi.model.decoding.aliases import translated
from topkapi.model.errors import ContextExceeded, InvalidRequest, TextTooLong, TopkapiError
from topkapi.service.api.http.answering import Answer, Event, respond
from topkapi.service.api.http.apart import apart
from topkapi.service.api.http.describing import STREAM, errors_of
from topkapi.service.api.http.dialect import Dialect, with_hint
from topkapi.service.api.http.registration import Routes
from topkapi.service.api.llama import schemas
from topkapi.service.api.llama.parameters import parameters_of, settings_of
from topkapi.service.api.llama.prompts import add_texts, read_prompts
from topkapi.service.api.llama.render import Renderer
from topkapi.service.api.llama.state import add_state
from topkapi.service.api.openai import chat
from topkapi.service.generation import Delta, Generation, Plan, plan
from topkapi.service.models import LoadedModel, Models

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

ERRORS = errors_of(
    schemas.LlamaError,
    {
        400: "The body is not valid JSON, or a field is wrong",
        404: "The checkpoint is not loaded",
        413: "The body is too large",
        415: "The body is not declared as JSON",
        429: "The queue is full; wait Retry-After seconds",
        500: "A step of the engine failed",
        503: "The checkpoint is being unloaded, or every slot is in use",
    },
)


def router(models: Models) -> Routes:
    """llama.cpp's routes over the loaded checkpoints."""
    routes = Routes(ERRORS, tags=["llama.cpp"])

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
    summary = "llama.cpp: OpenAI's chat without /v1"
    chat.add_routes(routes, models, path="/chat/completions", summary=summary, continues=True)
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
        self._renderer = Renderer(self._generation, settings, slot, body.response_fields or ())
        self._held: dict[int, str] = {}
        super().__init__(self._generation, stream=body.stream)

    def whole(self) -> Any:
        answers = [self._renderer.completion(output) for output in self._generation.outputs]
        return answers[0] if len(answers) == 1 else answers

    def told(self, step: Delta) -> Iterator[Event]:
        if step.token is None:
            self._held[step.output.index] = step.text
        else:
            yield None, self._renderer.chunk(step, step.token)

    def ending(self) -> Iterator[Event]:
        """Each output's whole answer, with the text that was held back for a stop."""
        for output in self._generation.outputs:
            yield None, self._renderer.completion(output, self._held.get(output.index, ""))
