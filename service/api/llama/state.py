"""What llama.cpp's clients ask a server about itself: `/props`, `/slots`, `/v1/health`, and its chat template."""

from __future__ import annotations

from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from topkapi.engine.request import GenerateJob
from topkapi.model.conversation.tool_calls import ToolCallForm
from topkapi.model.errors import InvalidRequest, TopkapiError
from topkapi.service.api.http.answering import apart
from topkapi.service.api.http.describing import Responses
from topkapi.service.api.http.registration import Routes
from topkapi.service.api.http.template_variables import template_variables
from topkapi.service.api.llama import schemas
from topkapi.service.api.llama.parameters import DEFAULTS, SAMPLERS
from topkapi.service.api.openai.conversation import conversation
from topkapi.service.models import LoadedModel, Models
from topkapi.service.prompting import check_conversation
from topkapi.service.slots import SlotView, slot_views
from topkapi.service.version import VERSION


class NotReady(TopkapiError):
    """Every slot is in use, or no checkpoint is loaded yet."""

    status = 503
    kind = "not_ready"


def add_state(routes: Routes, models: Models) -> None:
    """The routes, over the loaded checkpoints; `model` chooses one of them."""
    errors = routes.errors
    unknown: Responses = {404: errors[404]}
    not_ready: Responses = {503: errors[503]}
    busy: Responses = {400: errors[400], 422: errors[400], **unknown, **not_ready}

    @routes.answering("/props", "llama.cpp: what is served", schemas.LlamaProps, method="GET", errors=unknown)
    async def props(model: str | None = None) -> Response:
        return JSONResponse(_props(models.get(model)))

    shapes = list[schemas.LlamaSlot]

    @routes.answering("/slots", "llama.cpp: what each slot is doing", shapes, method="GET", errors=busy)
    async def slots(model: str | None = None, fail_on_no_slot: int = 0) -> Response:
        loaded = models.get(model)
        views = [_slot(loaded, view) for view in slot_views(loaded.engine)]
        if fail_on_no_slot and all(view["is_processing"] for view in views):
            raise NotReady("no slot is available", hint="try again in a moment")
        return JSONResponse(views)

    summary = "llama.cpp: whether the server is ready"

    @routes.answering("/v1/health", summary, schemas.LlamaHealth, method="GET", errors=not_ready)
    async def health() -> Response:
        if models.draining:
            raise NotReady("the server is stopping", hint="try another one")
        if not len(models):
            raise NotReady("no checkpoint is loaded yet", hint="try again in a moment")
        if models.trouble is not None:
            who, error = models.trouble
            raise NotReady(f"{who}: {error.message}", hint="try again in a moment")
        return JSONResponse({"status": "ok"})

    summary = "llama.cpp: a conversation as the prompt that is read for it"

    @routes.answering("/apply-template", summary, schemas.LlamaPrompt)
    async def apply_template(request: Request, body: schemas.LlamaTemplateRequest) -> Response:
        return JSONResponse({"prompt": await apart(request, _rendered, models.get(body.model), body)})


def _props(model: LoadedModel) -> dict[str, Any]:
    tokenizer = model.checkpoint.tokenizer
    spelled = {
        name: "" if token_id is None else tokenizer.decode([token_id])
        for name, token_id in (("bos_token", tokenizer.begin_token_id), ("eos_token", tokenizer.end_token_id))
    }
    chat = model.checkpoint.chat
    return {
        "default_generation_settings": {
            "id": 0,
            "id_task": -1,
            "n_ctx": model.context_length,
            "speculative": False,
            "is_processing": False,
            "params": DEFAULTS | {"max_tokens": DEFAULTS["n_predict"], "samplers": list(SAMPLERS)},
            "prompt": "",
            "next_token": _next_token(SlotView(0)),
        },
        "total_slots": model.engine.network.slots,
        "model_alias": model.name,
        "model_path": str(model.checkpoint.path),
        "modalities": {"vision": False, "audio": False},
        "chat_template": "" if chat is None else chat.source,
        "chat_template_caps": {} if chat is None else {"supports_tools": chat.takes_tools},
        **spelled,
        "build_info": f"topkapi-{VERSION}",
        "dtype": model.dtype,
        "dtype_why": model.why,
        "kernels": model.kernels,
        "is_sleeping": False,
    }


def _slot(model: LoadedModel, view: SlotView) -> dict[str, Any]:
    return {
        "id": view.slot,
        "id_task": -1,
        "n_ctx": model.context_length,
        "speculative": False,
        "is_processing": view.busy,
        "next_token": _next_token(view),
    }


def _next_token(view: SlotView) -> dict[str, Any]:
    remaining = -1
    if isinstance(view.job, GenerateJob):
        remaining = (view.job.parameters.max_tokens or 0) - view.generated_tokens
    return {"has_next_token": view.busy, "n_remain": remaining, "n_decoded": view.generated_tokens}


def _rendered(model: LoadedModel, body: schemas.LlamaTemplateRequest) -> str:
    chat, tokenizer = model.checkpoint.chat, model.checkpoint.tokenizer
    if chat is None:
        message = f"{model.name} is a base checkpoint without a chat template"
        raise InvalidRequest(message, field="messages", hint="choose a chat checkpoint with model")
    named = {"bos_token": tokenizer.begin_token_id, "eos_token": tokenizer.end_token_id}
    spelled = {name: tokenizer.decode([token_id]) for name, token_id in named.items() if token_id is not None}
    tools: list[dict[str, Any]] | None = None
    if body.tools:
        ToolCallForm.of(chat, tokenizer)
        tools = [tool.model_dump(exclude_none=True) for tool in body.tools]
    turns = conversation(body.messages)
    check_conversation(model, turns, tools)
    ends_open = body.add_generation_prompt is not False
    variables = template_variables(model, body.chat_template_kwargs)
    return chat.render(turns, add_generation_prompt=ends_open, tools=tools, **spelled, **variables)
