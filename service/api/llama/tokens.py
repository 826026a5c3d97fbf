"""Tokens and templates as llama.cpp's clients ask for them; vLLM's and lm-evaluation-harness's names work too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from topkapi.model.errors import InvalidRequest
from topkapi.service.api.http.answering import as_json
from topkapi.service.api.http.apart import apart
from topkapi.service.api.llama import schemas
from topkapi.service.api.llama.render import token_piece
from topkapi.service.models import LoadedModel, Models
from topkapi.service.prompting import check_size, checked_ids
from topkapi.service.scoring import require_one


def add_tokens(routes: APIRouter, models: Models, errors: Mapping[int | str, dict[str, Any]]) -> None:
    """`/tokenize` of `content` or `prompt`, and `/detokenize` of `tokens`."""

    @routes.post(
        "/tokenize",
        summary="llama.cpp, vLLM: token ids of content or prompt",
        responses={**errors, 200: {"model": schemas.LlamaTokenizeResponse}},
        response_model=None,
    )
    async def tokenize(request: Request, body: schemas.LlamaTokenizeRequest) -> Response:
        model = models.get(body.model)
        return await apart(request, lambda: as_json(_tokenized(model, body)))

    @routes.post(
        "/detokenize",
        summary="llama.cpp, vLLM: text of tokens",
        responses={**errors, 200: {"model": schemas.LlamaDetokenizeResponse}},
        response_model=None,
    )
    async def detokenize(request: Request, body: schemas.LlamaDetokenizeRequest) -> Response:
        model = models.get(body.model)

        def respond() -> dict[str, str]:
            token_ids = checked_ids(model, body.tokens, "tokens", fits=False) if body.tokens != [] else []
            text = model.checkpoint.tokenizer.decode(token_ids)
            return {"content": text, "prompt": text}

        return await apart(request, lambda: as_json(respond()))


def _tokenized(model: LoadedModel, body: schemas.LlamaTokenizeRequest) -> dict[str, Any]:
    given = [name for name in ("content", "prompt") if getattr(body, name) is not None]
    text = str(getattr(body, require_one(given, "content and prompt")))
    if body.add_special is not None and body.add_special_tokens is not None:
        message = "add_special and add_special_tokens are two names of one parameter"
        raise InvalidRequest(message, field="add_special_tokens", hint="send one of them")
    tokenizer = model.checkpoint.tokenizer
    check_size(model, [text], given[0], fits=False)
    token_ids = tokenizer.encode(text) if body.parse_special is False else tokenizer.encode_with_control(text)
    if (body.add_special or body.add_special_tokens) and tokenizer.adds_begin_token:
        assert tokenizer.begin_token_id is not None
        token_ids = [tokenizer.begin_token_id, *token_ids]
    shown = (token_piece(model, token_id) for token_id in token_ids) if body.with_pieces else token_ids
    return {"tokens": shown, "count": len(token_ids), "max_model_len": model.context_length}
