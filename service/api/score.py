"""`POST /score`: how probable texts, or completions of prompts, are under a checkpoint."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from model.errors import InvalidRequest
from service import scoring
from service.api import render, schemas
from service.api.streaming import unless_disconnected
from service.models import LoadedModel, Models
from service.prompting import checked_ids, text_tokens, tokens_of


def add_score(routes: APIRouter, models: Models) -> None:
    """The route, over the loaded checkpoints."""

    @routes.post(
        "/score",
        tags=["text"],
        summary="Log-probabilities and perplexity of texts",
        responses={**schemas.ERRORS, 200: {"model": schemas.ScoreResponse}},
        response_model=None,
    )
    async def score(request: Request, body: schemas.ScoreRequest) -> Response:
        model = models.get(body.model)
        items = await asyncio.to_thread(_items, model, body)
        found = await unless_disconnected(
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


def _items(model: LoadedModel, body: schemas.ScoreRequest) -> list[scoring.Item]:
    given = schemas.given(body, "text", "token_ids", "pairs", "choices")
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
