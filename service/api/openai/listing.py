"""`/v1/models`, and `/tokenizer_info`, from which lm-evaluation-harness learns a checkpoint's control tokens."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import Query
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel

from topkapi.service.api.http.describing import Responses
from topkapi.service.api.http.registration import Routes
from topkapi.service.api.native.checkpoints import ListedModel, listed
from topkapi.service.api.openai.errors import ERRORS
from topkapi.service.models import LoadedModel, Models

UNKNOWN: Responses = {404: ERRORS[404]}


class ModelEntry(ListedModel):
    """A loaded checkpoint, or an adapter beside the checkpoint `parent`, as vLLM tells it: `root` is what was loaded,
    `max_model_len` the context."""

    root: str
    parent: str | None
    max_model_len: int


class ModelList(BaseModel):
    """The answer of `GET /v1/models`."""

    object: Literal["list"]
    data: list[ModelEntry]


class TokenizerInfo(BaseModel):
    """Spellings of the control tokens that begin, end and pad a text, and the chat template's source."""

    eos_token: str | None
    bos_token: str | None
    pad_token: str | None
    chat_template: str | None


def add_routes(routes: Routes, models: Models) -> None:
    """Add the routes."""

    @routes.answering("/v1/models", "The loaded checkpoints", ModelList, method="GET", errors={})
    async def list_models() -> Response:
        return JSONResponse({"object": "list", "data": [_entry(model) for model in models.everything]})

    @routes.answering("/v1/models/{name:path}", "One loaded checkpoint", ModelEntry, method="GET", errors=UNKNOWN)
    async def get_model(name: str) -> Response:
        return JSONResponse(_entry(models.get(name)))

    @routes.answering("/tokenizer_info", "A checkpoint's control tokens", TokenizerInfo, method="GET", errors=UNKNOWN)
    async def tokenizer_info(
        model: Annotated[str | None, Query(description="A loaded checkpoint's name; the first one by default.")] = None,
    ) -> Response:
        checkpoint = models.get(model).checkpoint
        tokenizer = checkpoint.tokenizer
        ids = {"eos": tokenizer.end_token_id, "bos": tokenizer.begin_token_id, "pad": tokenizer.pad_token_id}
        content = {
            f"{name}_token": None if token_id is None else tokenizer.decode([token_id])
            for name, token_id in ids.items()
        }
        template = None if checkpoint.chat is None else checkpoint.chat.source
        return JSONResponse(content | {"chat_template": template})


def _entry(model: LoadedModel) -> dict[str, Any]:
    adapter = None if model.use is None else model.use.adapter
    # Where it lies is no concern of whoever asks.
    root, parent = (model.name, None) if adapter is None else (adapter.path.name, adapter.base)
    return listed(model) | {"root": root, "parent": parent, "max_model_len": model.context_length}
