"""Topkapi's own routes: generate, score, tokens, streams, and what is loaded."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from topkapi.model.errors import InvalidRequest
from topkapi.service.api.http.answering import Event, apart, as_json, respond
from topkapi.service.api.http.describing import errors_of, stream_of
from topkapi.service.api.http.registration import Routes
from topkapi.service.api.native import schemas, score_schemas
from topkapi.service.api.native.checkpoints import add_adapters, add_checkpoints
from topkapi.service.api.native.generate import (
    generate_response,
    generation_of,
    new_id,
    piece,
    timestamp,
    token_event,
)
from topkapi.service.api.native.runs import add_runs
from topkapi.service.api.native.score import score_response, scoring_of
from topkapi.service.api.native.streams import KeptAnswer, Streams, add_streams, resumed
from topkapi.service.generation import Delta
from topkapi.service.models import LoadedModel, Models
from topkapi.service.prompting import check_size, checked_ids, conversation_tokens, require_one
from topkapi.service.version import VERSION

SECONDS_BETWEEN_PROGRESS = 0.1
"""Between two events that tell how much of the texts has been scored."""


def router(models: Models) -> Routes:
    """The native routes over the loaded checkpoints."""
    routes = Routes(schemas.ERRORS)
    streams = Streams(models.settings.stream_grace, models.settings.stream_bytes, models.replica)
    add_streams(routes, streams)
    add_checkpoints(routes, models)
    add_adapters(routes, models)
    add_runs(routes, models)

    @routes.answering(
        "/generate",
        "Continue a prompt, or answer a conversation",
        schemas.GenerateResponse,
        stream=stream_of(**schemas.GENERATE_EVENTS),
        description="The answer",
        tags=["text"],
    )
    async def generate(
        request: Request, body: schemas.GenerateRequest, last_event_id: schemas.LastEventId = None
    ) -> Response:
        if last_event_id is not None:
            return await resumed(streams, request, body.stream, last_event_id)
        return await respond(request, _GenerateAnswer, models.get(body.model), body, streams)

    @routes.answering(
        "/score",
        "Log-probabilities and perplexity of texts; choices ranked",
        score_schemas.ScoreResponse,
        stream=stream_of(**score_schemas.SCORE_EVENTS),
        description="The scores",
        errors=schemas.ERRORS | errors_of(schemas.ErrorBody, more={408: "It was not done within timeout_s"}),
        tags=["text"],
    )
    async def score(
        request: Request, body: score_schemas.ScoreRequest, last_event_id: schemas.LastEventId = None
    ) -> Response:
        if last_event_id is not None:
            return await resumed(streams, request, body.stream, last_event_id)
        return await respond(request, _ScoreAnswer, models.get(body.model), body, streams)

    @routes.answering("/tokenize", "Token ids of a text or a conversation", schemas.TokenizeResponse, tags=["tokens"])
    async def tokenize(request: Request, body: schemas.TokenizeRequest) -> Response:
        return await apart(request, _tokenized, models.get(body.model), body)

    @routes.answering("/detokenize", "Text of token ids", schemas.DetokenizeResponse, tags=["tokens"])
    async def detokenize(request: Request, body: schemas.DetokenizeRequest) -> Response:
        return await apart(request, _detokenized, models.get(body.model), body)

    def report(status: str, reason: str | None = None) -> dict[str, Any]:
        about = {"status": status, "version": VERSION, "models": models.names, "loading": models.loading}
        return about if reason is None else about | {"reason": reason}

    @routes.answering(
        "/health", "Whether the process answers", schemas.Health, method="GET", errors={}, tags=["server"]
    )
    async def health() -> Response:
        return JSONResponse(report("ok"))

    not_ready = errors_of(schemas.Health, more={503: "No checkpoint is loaded, or an engine has stopped"})

    @routes.answering(
        "/ready", "Whether requests can be served", schemas.Health, method="GET", errors=not_ready, tags=["server"]
    )
    async def ready() -> Response:
        if models.draining:
            return JSONResponse(report("stopping", "the server finishes what runs and takes nothing new"), 503)
        if (trouble := models.trouble) is not None:
            who, error = trouble
            return JSONResponse(report("failing", f"{who}: {error.message}"), 503)
        if len(models):
            return JSONResponse(report("ready"))
        return JSONResponse(report("loading" if models.loading else "no checkpoint is loaded"), 503)

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


def _tokenized(model: LoadedModel, body: schemas.TokenizeRequest) -> Response:
    if require_one(schemas.given(body, "text", "messages"), "text and messages") == "messages":
        token_ids = conversation_tokens(model, [message.model_dump() for message in body.messages or []])
    else:
        check_size(model, [body.text or ""], "text", fits=False)
        token_ids = model.checkpoint.tokenizer.encode(body.text or "")
    pieces = (piece(model, token_id) for token_id in token_ids)
    return as_json({"model": model.name, "count": len(token_ids), "token_ids": token_ids, "pieces": pieces})


def _detokenized(model: LoadedModel, body: schemas.DetokenizeRequest) -> Response:
    token_ids = checked_ids(model, body.token_ids, "token_ids", fits=False)
    return as_json({"model": model.name, "text": model.checkpoint.tokenizer.decode(token_ids)})


class _GenerateAnswer(KeptAnswer[Delta]):
    """The continuations of prompts, or of a conversation."""

    def __init__(self, model: LoadedModel, body: schemas.GenerateRequest, streams: Streams) -> None:
        if body.progress and not body.stream:
            message = "progress is told by the events of a stream, and the body does not ask for one"
            raise InvalidRequest(message, field="progress", hint="set stream to true, or leave progress out")
        self._generation = generation_of(model, body)
        self._created = timestamp()
        self._progress, engine = body.progress, model.engine
        self.at_once = bool(body.progress)
        self._others = engine.running + engine.waiting
        super().__init__(
            self._generation,
            stream=body.stream,
            streams=streams,
            identifier=new_id("gen"),
            resumable=body.resumable,
        )

    def whole(self) -> dict[str, Any]:
        return generate_response(self._generation, self.identifier, self._created)

    def opening(self) -> Iterator[Event]:
        if self._progress:
            plan = self._generation.plan
            for index, prompt in enumerate(plan.prompts):
                yield "progress", self._told_of_prompt("queued", index, 0, len(prompt) + len(plan.answered))

    def told(self, step: Delta) -> Iterator[Event]:
        if step.progress is None:
            yield "token", token_event(self._generation, step)
        else:
            read, total = step.progress.read, step.progress.total
            yield "progress", self._told_of_prompt("reading", step.output.prompt_index, read, total)

    def _told_of_prompt(self, state: str, index: int, read: int, total: int) -> dict[str, Any]:
        return {"state": state, "prompt_index": index, "read": read, "total": total, "others": self._others}

    def ending(self) -> Iterator[Event]:
        yield "done", self.whole()


class _ScoreAnswer(KeptAnswer[tuple[int, int]]):
    """The scores of texts, and what is best of choices."""

    def __init__(self, model: LoadedModel, body: score_schemas.ScoreRequest, streams: Streams) -> None:
        self._model, self._body = model, body
        self._items, self._scoring = scoring_of(model, body)
        self._last_told = 0.0
        super().__init__(
            self._scoring,
            stream=body.stream,
            streams=streams,
            identifier=new_id("score"),
            resumable=body.resumable,
        )

    def whole(self) -> dict[str, Any]:
        return score_response(self._model, self._body, self._items, self._scoring, self.identifier)

    def told(self, step: tuple[int, int]) -> Iterator[Event]:
        scored, total = step
        if scored == total or time.monotonic() - self._last_told > SECONDS_BETWEEN_PROGRESS:
            self._last_told = time.monotonic()
            yield "progress", {"scored": scored, "total": total}

    def ending(self) -> Iterator[Event]:
        yield "done", self.whole()
