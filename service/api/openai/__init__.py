"""OpenAI's API, with vLLM's additions: completions, chat, responses, embeddings, models, and what lm-eval asks for."""

from __future__ import annotations

from topkapi.service.api.http.registration import Routes
from topkapi.service.api.openai import chat, completions, embeddings, listing, responses
from topkapi.service.api.openai.errors import DIALECT, ERRORS
from topkapi.service.models import Models

__all__ = ["DIALECT", "router"]


def router(models: Models) -> Routes:
    """OpenAI's routes over the loaded checkpoints."""
    routes = Routes(ERRORS, tags=["OpenAI"])
    for module in (completions, chat, responses, embeddings, listing):
        module.add_routes(routes, models)
    return routes
