"""OpenAI's API, with vLLM's additions: completions, chat, responses, embeddings, models, and what lm-eval asks for."""

from __future__ import annotations

from typing import Any

from fastapi import Request
from fastapi.responses import Response

from topkapi.service.api.http.answering import respond
from topkapi.service.api.http.describing import STREAM
from topkapi.service.api.http.registration import Routes
from topkapi.service.api.openai import embeddings, listing
from topkapi.service.api.openai.chat import ChatAnswer, ChatRequest, ChatResponse
from topkapi.service.api.openai.completions import CompletionAnswer, CompletionRequest, CompletionResponse
from topkapi.service.api.openai.errors import DIALECT, ERRORS
from topkapi.service.api.openai.responses import ResponsesAnswer, ResponsesRequest, ResponsesResponse
from topkapi.service.api.openai.tgi_client import chosen
from topkapi.service.models import Models

__all__ = ["DIALECT", "router"]


def router(models: Models) -> Routes:
    """OpenAI's routes over the loaded checkpoints."""
    routes = Routes(ERRORS, tags=["OpenAI"])
    one: dict[str, Any] = {"stream": STREAM, "description": "The answer"}
    many: dict[str, Any] = {"stream": STREAM, "description": "The answers"}

    @routes.answering("/v1/completions", "Continue prompts", CompletionResponse, **many)
    async def completions(request: Request, body: CompletionRequest) -> Response:
        return await respond(request, CompletionAnswer, chosen(models, body.model), body)

    @routes.answering("/v1/chat/completions", "Answer a conversation", ChatResponse, **one)
    async def chat(request: Request, body: ChatRequest) -> Response:
        return await respond(request, ChatAnswer, chosen(models, body.model), body)

    @routes.answering("/v1/responses", "Answer an input, keeping no state", ResponsesResponse, **one)
    async def responses(request: Request, body: ResponsesRequest) -> Response:
        return await respond(request, ResponsesAnswer, models.get(body.model), body)

    @routes.answering("/v1/embeddings", "Texts as vectors", embeddings.EmbeddingsResponse, name="embeddings")
    async def embed(request: Request, body: embeddings.EmbeddingsRequest) -> Response:
        return await embeddings.embeddings(request, models.get(body.model), body)

    listing.add_routes(routes, models)
    return routes
