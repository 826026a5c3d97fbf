"""`POST /v1/embeddings`: texts as vectors, the mean of the network's final states over their tokens."""

from __future__ import annotations

import asyncio
import base64
import struct
import time
from typing import Annotated, Any, Literal

from fastapi import Request
from fastapi.responses import Response
from pydantic import BaseModel, Field

from topkapi.model.embedding import check_embeddable
from topkapi.model.errors import DeadlineExceeded
from topkapi.service.api.http.answering import answered, apart, unless_disconnected
from topkapi.service.api.http.body import Strict
from topkapi.service.api.http.errors import inapplicable
from topkapi.service.api.native.schemas import ModelName, Prompt
from topkapi.service.calls import current_call
from topkapi.service.embedding import embedded
from topkapi.service.models import LoadedModel
from topkapi.service.prompting import prompt_tokens
from topkapi.service.quotas import UnderWay


class EmbeddingsRequest(Strict):
    """The body of `POST /v1/embeddings`."""

    input: Annotated[Prompt, Field(description="A text, a list of token ids, or a list of either.")]
    model: ModelName = None
    encoding_format: Literal["float", "base64"] | None = None
    user: Annotated[str | None, Field(description="A label; without effect.")] = None
    dimensions: Annotated[int | None, Field(description="As many as the network is wide; no other number.")] = None


class Embedding(BaseModel):
    """One text's vector: numbers, or the base64 of little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingsUsage(BaseModel):
    """Token counts."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsResponse(BaseModel):
    """The answer of `POST /v1/embeddings`, in the order of the input."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingsUsage


async def embeddings(request: Request, model: LoadedModel, body: EmbeddingsRequest) -> Response:
    """The vectors of the texts. Raises `InvalidRequest`, and `Overloaded` where too many wait for some."""
    texts = await apart(request, _checked, model, body)
    adapter = None if model.use is None else await apart(request, model.use.live)
    count = sum(map(len, texts))
    call, work = current_call(), UnderWay()
    if call is not None:
        call.model, call.prompt_tokens = model.name, count
        if call.quota is not None:
            call.quota.begin(count, work)
    left = None if call is None or call.deadline is None else max(0.0, call.deadline - time.monotonic())
    try:
        async with asyncio.timeout(left):
            vectors = await unless_disconnected(request, embedded(model.checkpoint.model, texts, adapter))
    except TimeoutError:
        raise DeadlineExceeded("the texts were not embedded in the time that was given", hint="send fewer") from None
    finally:
        work.over = True
    if call is not None and call.key is not None:
        model.metrics.used(call.key.name, "prompt", count)

    def made() -> dict[str, Any]:
        data = [
            {"object": "embedding", "index": index, "embedding": _written(vector, body.encoding_format)}
            for index, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": count, "total_tokens": count}
        return {"object": "list", "data": data, "model": model.name, "usage": usage}

    return await answered(made)


def _checked(model: LoadedModel, body: EmbeddingsRequest) -> list[list[int]]:
    width = model.checkpoint.config.hidden_size
    if body.dimensions not in (None, width):
        raise inapplicable("dimensions", f"a vector has as many numbers as the network is wide, {width}")
    texts = prompt_tokens(model, body.input, "input")
    for index, token_ids in enumerate(texts):
        check_embeddable(token_ids, model.context_length, f"input[{index}]" if len(texts) > 1 else "input")
    return texts


def _written(vector: list[float], encoding: str | None) -> list[float] | str:
    if encoding != "base64":
        return vector
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode("ascii")
