"""`POST /tokenize` and `POST /detokenize`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from topkapi.service.api.http.answering import as_json
from topkapi.service.api.http.apart import apart
from topkapi.service.api.native import render, schemas
from topkapi.service.models import Models
from topkapi.service.prompting import check_size, checked_ids, conversation_tokens
from topkapi.service.scoring import require_one


def add_tokens(routes: APIRouter, models: Models) -> None:
    """The routes, over the loaded checkpoints."""

    @routes.post(
        "/tokenize",
        tags=["tokens"],
        summary="Token ids of a text or a conversation",
        responses={**schemas.ERRORS, 200: {"model": schemas.TokenizeResponse}},
        response_model=None,
    )
    async def tokenize(request: Request, body: schemas.TokenizeRequest) -> Response:
        model = models.get(body.model)

        def respond() -> dict[str, Any]:
            kind = require_one(schemas.given(body, "text", "messages"), "text and messages")
            if kind == "messages":
                token_ids = conversation_tokens(model, [message.model_dump() for message in body.messages or []])
            else:
                check_size(model, [body.text or ""], "text", fits=False)
                token_ids = model.checkpoint.tokenizer.encode(body.text or "")
            pieces = (render.piece(model, token_id) for token_id in token_ids)
            return {"model": model.name, "count": len(token_ids), "token_ids": token_ids, "pieces": pieces}

        return await apart(request, lambda: as_json(respond()))

    @routes.post(
        "/detokenize",
        tags=["tokens"],
        summary="Text of token ids",
        responses={**schemas.ERRORS, 200: {"model": schemas.DetokenizeResponse}},
        response_model=None,
    )
    async def detokenize(request: Request, body: schemas.DetokenizeRequest) -> Response:
        model = models.get(body.model)

        def respond() -> dict[str, str]:
            token_ids = checked_ids(model, body.token_ids, "token_ids", fits=False)
            return {"model": model.name, "text": model.checkpoint.tokenizer.decode(token_ids)}

        return await apart(request, lambda: as_json(respond()))
