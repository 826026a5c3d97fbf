"""llama.cpp's own routes for vectors, which answer a plain list."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from topkapi.model.embedding import check_embeddable
from topkapi.service.api.http.answering import answered
from topkapi.service.api.http.apart import apart, unless_disconnected
from topkapi.service.api.llama import schemas
from topkapi.service.api.llama.prompts import read_prompts
from topkapi.service.embedding import embedded
from topkapi.service.models import LoadedModel, Models
from topkapi.service.scoring import require_one


def add_embeddings(routes: APIRouter, models: Models, errors: Mapping[int | str, dict[str, Any]]) -> None:
    """`/embedding` and `/embeddings`, over the loaded checkpoints."""

    async def embed(request: Request, body: schemas.LlamaEmbeddingRequest) -> Response:
        model = models.get(body.model)
        texts = await apart(request, _texts, model, body)
        vectors = await unless_disconnected(request, embedded(model.checkpoint.model, texts))
        return await answered(lambda: [{"index": index, "embedding": [vector]} for index, vector in enumerate(vectors)])

    for path in ("/embedding", "/embeddings"):
        routes.add_api_route(
            path,
            embed,
            methods=["POST"],
            summary="llama.cpp: texts as vectors",
            responses={**errors, 200: {"model": list[schemas.LlamaEmbedding]}},
            response_model=None,
            name=path.strip("/"),
        )


def _texts(model: LoadedModel, body: schemas.LlamaEmbeddingRequest) -> list[list[int]]:
    field = require_one([name for name in ("content", "input") if getattr(body, name) is not None], "content and input")
    texts = read_prompts(model, getattr(body, field), field)
    for position, token_ids in enumerate(texts):
        check_embeddable(token_ids, model.context_length, f"{field}[{position}]" if len(texts) > 1 else field)
    return texts
