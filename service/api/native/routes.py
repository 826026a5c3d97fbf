"""Topkapi's own routes: generate, score, tokens, streams, and what is loaded."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from topkapi.service.api.http.body import JSONRoute
from topkapi.service.api.native import schemas
from topkapi.service.api.native.checkpoints import add_checkpoints
from topkapi.service.api.native.generate import add_generate
from topkapi.service.api.native.score import add_score
from topkapi.service.api.native.streams import Streams, add_streams
from topkapi.service.api.native.tokens import add_tokens
from topkapi.service.models import Models
from topkapi.service.version import VERSION


def router(models: Models) -> APIRouter:
    """The native routes over the loaded checkpoints."""
    routes = APIRouter(route_class=JSONRoute)
    streams = Streams(models.settings.stream_grace, models.settings.stream_bytes)
    add_generate(routes, models, streams)
    add_score(routes, models, streams)
    add_streams(routes, streams)
    add_tokens(routes, models)
    add_checkpoints(routes, models)

    def report(status: str, reason: str | None = None) -> dict[str, Any]:
        about = {"status": status, "version": VERSION, "models": models.names, "loading": models.loading}
        return about if reason is None else about | {"reason": reason}

    @routes.get("/health", tags=["server"], summary="Whether the process answers", response_model=schemas.Health)
    async def health() -> Response:
        return JSONResponse(report("ok"))

    @routes.get(
        "/ready",
        tags=["server"],
        summary="Whether requests can be served",
        response_model=schemas.Health,
        responses={503: {"model": schemas.Health, "description": "No checkpoint is loaded, or an engine has stopped"}},
    )
    async def ready() -> Response:
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
