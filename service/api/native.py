"""Topkapi's own routes: generate, score, tokenize, detokenize, and what is loaded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.types import Receive, Scope, Send

from model.decoding.parameters import from_generation_config
from model.errors import InvalidRequest, TopkapiError
from service import scoring
from service.api import render, schemas
from service.api.body import JSONRoute
from service.api.errors import INTERNAL, ClientGone, error_body
from service.generation import Generation, Plan, plan
from service.models import LoadedModel, Models
from service.prompting import checked_ids, conversation_tokens, prompt_tokens, text_tokens, tokens_of
from service.version import VERSION

Result = TypeVar("Result")

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": schemas.ErrorBody, "description": meaning}
    for status, meaning in {
        400: "The body is not valid JSON",
        404: "The checkpoint is not loaded",
        413: "The body is too large",
        415: "The body is not declared as JSON",
        422: "A field is wrong; `field` names it",
        429: "The queue is full; wait Retry-After seconds",
        500: "A step of the engine failed",
    }.items()
}
STREAM: dict[str, Any] = {"text/event-stream": {"schema": {"type": "string"}}}
STREAM_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


def router(models: Models) -> APIRouter:
    """The native routes over the loaded checkpoints."""
    routes = APIRouter(route_class=JSONRoute)

    @routes.post(
        "/generate",
        tags=["text"],
        summary="Continue a prompt, or answer a conversation",
        responses={**ERRORS, 200: {"model": schemas.GenerateResponse, "content": STREAM, "description": "The answer"}},
        response_model=None,
    )
    async def generate(request: Request, body: schemas.GenerateRequest) -> Response:
        model = models.get(body.model)
        generation = Generation(await asyncio.to_thread(_plan, model, body))
        identifier, created = render.new_id("gen"), render.timestamp()
        if body.stream:
            generation.start()
            return _Stream(generation, identifier, created)
        async with generation:
            await _unless_disconnected(request, generation.finish())
        return JSONResponse(await asyncio.to_thread(render.generate_response, generation, identifier, created))

    @routes.post(
        "/score",
        tags=["text"],
        summary="Log-probabilities and perplexity of texts",
        responses={**ERRORS, 200: {"model": schemas.ScoreResponse}},
        response_model=None,
    )
    async def score(request: Request, body: schemas.ScoreRequest) -> Response:
        model = models.get(body.model)
        items = await asyncio.to_thread(_items, model, body)
        found = await _unless_disconnected(
            request, scoring.score_items(model, items, body.window, body.stride, body.top)
        )

        def respond() -> JSONResponse:
            summaries = [scoring.summarise(model, *pair) for pair in zip(items, found, strict=True)]
            results = [
                render.score_result(model, item, scores, summary, body.per_token, body.top)
                for item, scores, summary in zip(items, found, summaries, strict=True)
            ]
            content: dict[str, Any] = {"id": render.new_id("score"), "model": model.name, "results": results}
            if body.choices is not None:
                content["choice"] = scoring.best_choice(summaries)
            return JSONResponse(content | {"usage": render.usage(sum(len(item.token_ids) for item in items))})

        return await asyncio.to_thread(respond)

    @routes.post(
        "/tokenize",
        tags=["tokens"],
        summary="Token ids of a text or a conversation",
        responses={**ERRORS, 200: {"model": schemas.TokenizeResponse}},
        response_model=None,
    )
    async def tokenize(body: schemas.TokenizeRequest) -> Response:
        model = models.get(body.model)

        def respond() -> JSONResponse:
            kind = scoring.require_one(_given(body, "text", "messages"), "text and messages")
            if kind == "messages":
                token_ids = conversation_tokens(model, _messages(body.messages))
            else:
                token_ids = model.checkpoint.tokenizer.encode(body.text or "")
            pieces = [render.piece(model, token_id) for token_id in token_ids]
            return JSONResponse(
                {"model": model.name, "count": len(token_ids), "token_ids": token_ids, "pieces": pieces}
            )

        return await asyncio.to_thread(respond)

    @routes.post(
        "/detokenize",
        tags=["tokens"],
        summary="Text of token ids",
        responses={**ERRORS, 200: {"model": schemas.DetokenizeResponse}},
        response_model=None,
    )
    async def detokenize(body: schemas.DetokenizeRequest) -> Response:
        model = models.get(body.model)

        def respond() -> JSONResponse:
            token_ids = checked_ids(model, body.token_ids, "token_ids")
            return JSONResponse({"model": model.name, "text": model.checkpoint.tokenizer.decode(token_ids)})

        return await asyncio.to_thread(respond)

    @routes.get("/models", tags=["server"], summary="The loaded checkpoints", response_model=schemas.ModelsResponse)
    async def list_models() -> Response:
        return JSONResponse({"models": [describe(model, default=index == 0) for index, model in enumerate(models)]})

    @routes.get("/health", tags=["server"], summary="Whether the process answers", response_model=schemas.Health)
    async def health() -> Response:
        return JSONResponse({"status": "ok", "version": VERSION, "models": models.names})

    @routes.get(
        "/ready",
        tags=["server"],
        summary="Whether requests can be served",
        response_model=schemas.Health,
        responses={503: {"model": schemas.Health, "description": "No checkpoint is loaded"}},
    )
    async def ready() -> Response:
        status = "ready" if len(models) else "no checkpoint is loaded"
        content = {"status": status, "version": VERSION, "models": models.names}
        return JSONResponse(content, 200 if len(models) else 503)

    @routes.get(
        "/metrics",
        tags=["server"],
        summary="Prometheus metrics",
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
        response_class=Response,
    )
    async def metrics() -> Response:
        return Response(generate_latest(models.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return routes


def describe(model: LoadedModel, *, default: bool) -> dict[str, Any]:
    """What `/models` says of a checkpoint."""
    checkpoint = model.checkpoint
    return {
        "name": model.name,
        "default": default,
        "family": checkpoint.config.family,
        "parameters": checkpoint.config.parameter_count(),
        "context_length": checkpoint.config.context_length,
        "vocab_size": checkpoint.tokenizer.vocab_size,
        "dtype": model.dtype,
        "chat": checkpoint.chat is not None,
        "defaults": from_generation_config(checkpoint.generation),
        "created": model.created,
        "running": model.engine.running,
        "waiting": model.engine.waiting,
    }


def _plan(model: LoadedModel, body: schemas.GenerateRequest) -> Plan:
    kind = scoring.require_one(_given(body, "prompt", "messages"), "prompt and messages")
    if kind == "messages":
        prompts = [conversation_tokens(model, _messages(body.messages))]
    else:
        prompts = prompt_tokens(model, body.prompt)
    return plan(model, prompts, body.parameters())


def _items(model: LoadedModel, body: schemas.ScoreRequest) -> list[scoring.Item]:
    given = _given(body, "text", "token_ids", "pairs", "choices")
    kind = scoring.require_one(given, "text, token_ids, pairs, and prompt with choices")
    if (body.prompt is None) == (kind == "choices"):
        message = "choices need a prompt" if kind == "choices" else f"prompt goes with choices, not with {kind}"
        raise InvalidRequest(message, field="prompt", hint="send prompt and choices together, or pairs")
    if kind == "pairs":
        pairs = [(pair.prompt, f"pairs[{n}].prompt", pair.completion, f"pairs[{n}].completion")
                 for n, pair in enumerate(body.pairs or [])]  # fmt: skip
    elif kind == "choices":
        pairs = [(body.prompt, "prompt", choice, f"choices[{n}]") for n, choice in enumerate(body.choices or [])]
    else:
        items = [scoring.Item(token_ids) for token_ids in _texts(model, body, kind)]
        scoring.check_items(model, items, body.window, body.stride)
        return items
    if not pairs:
        raise InvalidRequest(f"{kind} is empty", field=kind, hint="send at least one")
    items = [
        scoring.item_of_pair(tokens_of(model, prompt, prompt_field), tokens_of(model, completion, completion_field))
        for prompt, prompt_field, completion, completion_field in pairs
    ]
    scoring.check_items(model, items, body.window, body.stride)
    return items


def _texts(model: LoadedModel, body: schemas.ScoreRequest, kind: str) -> list[list[int]]:
    if kind == "text":
        texts = body.text if isinstance(body.text, list) else None
        if texts is None:
            return [text_tokens(model, body.text, kind)]
        if not texts:
            raise InvalidRequest("text is empty", field=kind, hint="send at least one text")
        return [text_tokens(model, text, f"text[{position}]") for position, text in enumerate(texts)]
    lists = body.token_ids
    if isinstance(lists, list) and lists and isinstance(lists[0], list):
        return [checked_ids(model, each, f"token_ids[{position}]") for position, each in enumerate(lists)]
    return [checked_ids(model, lists, kind)]


def _given(body: schemas.Strict, *names: str) -> list[str]:
    return [name for name in names if getattr(body, name) is not None]


def _messages(messages: list[schemas.Message] | None) -> list[dict[str, str]]:
    return [message.model_dump() for message in messages or []]


class _Stream(StreamingResponse):
    """A generation as server-sent events. However the response ends, its jobs do not outlive it."""

    def __init__(self, generation: Generation, identifier: str, created: int) -> None:
        super().__init__(
            _events(generation, identifier, created), media_type="text/event-stream", headers=STREAM_HEADERS
        )
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until they end or the client leaves."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._generation.cancel()


async def _events(generation: Generation, identifier: str, created: int) -> AsyncIterator[bytes]:
    """The events of one stream."""
    try:
        async for delta in generation.deltas():
            yield render.server_sent_event("token", render.token_event(generation, delta))
        yield render.server_sent_event("done", render.generate_response(generation, identifier, created))
    except TopkapiError as error:
        yield render.server_sent_event("error", error_body(error))
    except Exception:
        # The response has begun, so the error handler can't answer any more.
        yield render.server_sent_event("error", error_body(INTERNAL))
        raise


async def _unless_disconnected(request: Request, work: Awaitable[Result]) -> Result:
    """Await `work`, and cancel it as soon as the client has gone."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone("the client went away before the answer was ready")
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
