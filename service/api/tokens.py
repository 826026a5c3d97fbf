"""`POST /tokenize` and `POST /detokenize`."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from service.api import render, schemas
from service.models import Models
from service.prompting import checked_ids, conversation_tokens
from service.scoring import require_one


def add_tokens(routes: APIRouter, models: Models) -> None:
    """The routes, over the loaded checkpoints."""

    @routes.post(
        "/tokenize",
        tags=["tokens"],
        summary="Token ids of a text or a conversation",
        responses={**schemas.ERRORS, 200: {"model": schemas.TokenizeResponse}},
        response_model=None,
    )
    async def tokenize(body: schemas.TokenizeRequest) -> Response:
        model = models.get(body.model)

        def respond() -> JSONResponse:
            kind = require_one(schemas.given(body, "text", "messages"), "text and messages")
            if kind == "messages":
                token_ids = conversation_tokens(model, [message.model_dump() for message in body.messages or []])
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
        responses={**schemas.ERRORS, 200: {"model": schemas.DetokenizeResponse}},
        response_model=None,
    )
    async def detokenize(body: schemas.DetokenizeRequest) -> Response:
        model = models.get(body.model)

        def respond() -> JSONResponse:
            token_ids = checked_ids(model, body.token_ids, "token_ids")
            return JSONResponse({"model": model.name, "text": model.checkpoint.tokenizer.decode(token_ids)})

        return await asyncio.to_thread(respond)
