"""The ASGI application: the API routes, their documentation, and the studio behind them."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.routing import APIRoute
from fastapi_offline import FastAPIOffline

from topkapi.service.api import openai, sglang
from topkapi.service.api.anthropic import messages as anthropic
from topkapi.service.api.http.authority import Authority
from topkapi.service.api.http.errors import NATIVE
from topkapi.service.api.http.middleware import (
    AllowedHosts,
    BodyLimit,
    KeepAlive,
    Observed,
    SameOrigin,
    SlowBody,
    UnderPrefix,
)
from topkapi.service.api.http.registration import register, set_up
from topkapi.service.api.llama import completion as llama
from topkapi.service.api.native import routes as native
from topkapi.service.api.tgi import routes as tgi
from topkapi.service.models import Models
from topkapi.service.settings import Settings
from topkapi.service.ui.late import place_studio
from topkapi.service.version import VERSION

DESCRIPTION = """Text in, text out, and every number explained.

`POST /generate` continues a prompt or answers a conversation; `POST /score` gives the log-probability of every token
of a text. Clients of OpenAI, Anthropic, llama.cpp, text-generation-inference and SGLang find the routes they know, and
errors in the shape they know; those of Topkapi's own are `{"error": {"type", "message", "field"?, "hint"?}}`."""

EXPOSED = ("Retry-After", "X-Request-Id", "X-Ignored-Parameters")
"""What pages of allowed origins may read of an answer's headers, besides what they always may."""


def create_app(models: Models, settings: Settings) -> FastAPI:
    """The application over loaded checkpoints. The API comes first; what it does not know goes to the studio."""
    app = create_api(models, settings)
    add_studio(app, models, settings)
    return app


def create_api(models: Models, settings: Settings) -> FastAPI:
    """The API's routes, and what every request passes through before them; checkpoints may be loaded later."""
    # The documentation page brings its own scripts: it works without a network.
    app = FastAPIOffline(
        title="Topkapi",
        description=DESCRIPTION,
        version=VERSION,
        redoc_url=None,
    )
    for route in app.routes:
        # The documentation's page answers HEAD as every other route does.
        if isinstance(route, APIRoute) and route.methods is not None:
            route.methods.add("HEAD")
    set_up(app, ignore_unknown_fields=settings.ignore_unknown_fields, needs_key=models.keys.required)
    app.add_middleware(BodyLimit, limit=settings.max_body_bytes)
    app.add_middleware(SlowBody, seconds=settings.request_timeout)
    if settings.stream_keep_alive:
        app.add_middleware(KeepAlive, seconds=settings.stream_keep_alive)
    if models.keys.required:
        app.add_middleware(Authority, ring=models.keys)
    # Also where no origin is allowed: in its absence Gradio would answer for all paths, and allow any.
    app.add_middleware(
        CORSMiddleware, allow_origins=list(settings.cors_origins), allow_methods=["*"], allow_headers=["*"],
        expose_headers=EXPOSED,
    )  # fmt: skip
    app.add_middleware(SameOrigin, allowed=settings.cors_origins)
    app.add_middleware(AllowedHosts, listening=settings.host, allowed=settings.allowed_hosts)
    app.add_middleware(Observed, metrics=models.metrics, tracing=models.tracing)
    register(app, NATIVE, native.router(models))
    register(app, tgi.TGI, tgi.router(models))
    register(app, sglang.SGLANG, sglang.router(models))
    # Before OpenAI's, whose prefix is part of its own.
    register(app, anthropic.ANTHROPIC, anthropic.router(models))
    register(app, openai.DIALECT, openai.router(models))
    register(app, llama.LLAMA, llama.router(models))
    if settings.root_path:
        # Outermost, so that whatever looks at the path finds it in one form.
        app.add_middleware(UnderPrefix, prefix=settings.root_path)
    return app


def add_studio(app: FastAPI, models: Models, settings: Settings) -> None:
    """Serve the studio behind the API's routes, where it is wanted and a checkpoint is loaded."""
    if settings.studio and len(models):
        place_studio(app, models, settings)
