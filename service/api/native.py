"""Topkapi's own routes: generate, score, tokens, streams, and what is loaded."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from model.decoding.parameters import from_generation_config
from service.api import schemas
from service.api.body import JSONRoute
from service.api.generate import add_generate
from service.api.score import add_score
from service.api.streams import Streams, add_streams
from service.api.tokens import add_tokens
from service.models import LoadedModel, Models
from service.version import VERSION


def router(models: Models) -> APIRouter:
    """The native routes over the loaded checkpoints."""
    routes = APIRouter(route_class=JSONRoute)
    streams = Streams(models.settings.stream_grace, models.settings.stream_bytes)
    add_generate(routes, models, streams)
    add_score(routes, models, streams)
    add_streams(routes, streams)
    add_tokens(routes, models)

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
