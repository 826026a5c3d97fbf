"""`/models` and `/adapters`: what is loaded, and loading and unloading while serving, where the settings allow it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field

from topkapi.model.errors import CheckpointError, InvalidRequest
from topkapi.model.hub.cache import hub_name_of
from topkapi.model.hub.names import EXAMPLE, hub_name
from topkapi.model.hub.remote import cache_directory
from topkapi.model.hub.resolve import local_path
from topkapi.model.user_files import expanded
from topkapi.service.api.http.body import Strict
from topkapi.service.api.http.describing import errors_of
from topkapi.service.api.http.errors import Refused
from topkapi.service.api.http.registration import Routes
from topkapi.service.api.native import schemas
from topkapi.service.generation import defaults_of
from topkapi.service.locations import name_of
from topkapi.service.models import LoadedModel, Models
from topkapi.service.settings import Settings

NAME = r"^[A-Za-z0-9_][A-Za-z0-9_.:-]{0,127}$"
ALIAS = r"^[A-Za-z0-9_][A-Za-z0-9_.:/-]{0,127}$"

Aliases = Annotated[
    list[Annotated[str, Field(pattern=ALIAS)]], Field(max_length=32, description="Other names it answers to.")
]


class LoadRequest(Strict):
    """The body of `POST /models`."""

    path: Annotated[
        str,
        Field(
            min_length=1,
            max_length=4096,
            description="A checkpoint within the server's model directory, or, where the server lets requests, a model "
            "of the Hugging Face hub as owner/name, owner/name@revision or owner/name:Q4_K_M.",
        ),
    ]
    name: Annotated[
        Annotated[str, Field(pattern=NAME)] | None,
        Field(description="What to call it; the directory's name by default."),
    ] = None
    aliases: Aliases = Field(default_factory=list)
    default: Annotated[bool, Field(description="Whether it answers requests that name no checkpoint.")] = False
    replace: Annotated[
        bool,
        Field(
            description="Whether it takes the place of the one that has its name. What has begun there ends there; "
            "where this one can't be loaded, that one stays."
        ),
    ] = False


class LoadAdapterRequest(Strict):
    """The body of `POST /adapters`."""

    path: Annotated[
        str, Field(min_length=1, max_length=4096, description="A LoRA adapter within the server's model directory.")
    ]
    name: Annotated[
        Annotated[str, Field(pattern=NAME)] | None,
        Field(description="What requests call it, as `model`; the directory's name by default."),
    ] = None
    base: Annotated[
        str | None,
        Field(max_length=128, description="The checkpoint beside which it stands; by default the one that it names."),
    ] = None
    replace: Annotated[bool, Field(description="Whether it takes the place of the adapter that has its name.")] = False


class ChangeRequest(Strict):
    """The body of `PATCH /models/{name}`: what is left out stays as it is."""

    aliases: Aliases | None = None
    default: Annotated[Literal[True] | None, Field(description="Let it answer requests that name no checkpoint.")] = (
        None
    )


class Memory(BaseModel):
    """About how many bytes a checkpoint's weights take, and its cache of keys and values once all of it is in use."""

    weights: int
    cache: int


class ModelDetails(BaseModel):
    """A loaded checkpoint. `license` is what its card or file says that it may be used under (null: nothing), `card`
    whether there is one to read at `/models/{name}/card`, `examples` are messages that it is known to answer well.
    `dtype` is what matrices are held in, `dtype_why` says why,
    `kv_cache_dtype` is what keys and values are held in; `kernels` says what computes it, `chat` whether it takes
    messages, `draft` whether a smaller one guesses ahead for it; `defaults` are the decoding parameters that a prompt
    is continued with where a request says nothing, `chat_defaults` those of answers to messages (null for a base
    checkpoint), `warnings` what whoever loads it should know."""

    name: str
    aliases: list[str]
    default: bool
    family: str
    parameters: int
    context_length: int
    vocab_size: int
    dtype: str
    dtype_why: str
    kv_cache_dtype: str
    kernels: str
    memory: Memory
    license: str | None
    card: bool
    examples: list[str]
    chat: bool
    draft: bool
    defaults: dict[str, Any]
    chat_defaults: dict[str, Any] | None
    created: int
    running: int
    waiting: int
    warnings: list[str]
    reload_error: str | None
    parent: str | None
    rank: int | None
    in_memory: bool


class ListedModel(BaseModel):
    """A loaded checkpoint as OpenAI's and llama.cpp's clients list it."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelsResponse(BaseModel):
    """The answer of `GET /models`; the first one answers requests that name none. `loading` names one under way.

    `data` says less of the same checkpoints, for clients that know no `/v1`.
    """

    models: list[ModelDetails]
    loading: str | None
    object: Literal["list"]
    data: list[ListedModel]


NAMED = errors_of(schemas.ErrorBody, 404, more={422: "The name is not valid"})
CARD = errors_of(schemas.ErrorBody, more={
    404: "The checkpoint is not loaded, or has no card",
    422: "The name is not valid",
})  # fmt: skip
NOT_ALLOWED = errors_of(schemas.ErrorBody, more={
    403: "The server lets no request change what is loaded",
    409: "Another change is under way",
})  # fmt: skip
REFUSED = errors_of(schemas.ErrorBody, 400, 413, 415, more={
    403: "The server lets no request change what is loaded, or not from there",
    409: "A name is taken, or another checkpoint is being loaded",
    422: "A field is wrong, or there is no checkpoint that can be loaded",
})  # fmt: skip


def add_checkpoints(routes: Routes, models: Models) -> None:
    """The routes over the loaded checkpoints."""
    settings = models.settings

    server = partial(routes.answering, tags=["server"])

    @server("/models", "The loaded checkpoints", ModelsResponse, method="GET", errors={})
    async def list_models() -> Response:
        described = [describe(models, model) for model in models.everything]
        data = [listed(model) for model in models.everything]
        return JSONResponse({"models": described, "loading": models.loading, "object": "list", "data": data})

    @server("/models/{name}", "A loaded checkpoint", ModelDetails, method="GET", errors=NAMED)
    async def one_model(name: str) -> Response:
        return JSONResponse(describe(models, models.get(name)))

    @server("/models/{name}/card", "What a loaded checkpoint says of itself", method="GET", description="Markdown",
            errors=CARD, stream={"text/markdown": {"schema": {"type": "string"}}},
            response_class=Response)  # fmt: skip
    async def card(name: str) -> Response:
        text = models.get(name).card.text
        if text is None:
            raise Refused(404, "not_found", f"{name} has no card", hint="a card is the README.md of its directory")
        return Response(text, media_type="text/markdown")

    @server("/models", "Load a checkpoint", ModelDetails, status=201, description="It is loaded", errors=REFUSED)
    async def load(body: LoadRequest) -> Response:
        _check_allowed(settings)

        def respond() -> JSONResponse:
            path, within = _place(settings, body.path)
            model = _load(models, path, within, body)
            return JSONResponse(describe(models, model), 201)

        return await asyncio.to_thread(respond)

    summary = "Change a checkpoint's aliases, or make it the default one"

    @server("/models/{name}", summary, ModelDetails, method="PATCH", errors={**NAMED, **REFUSED})
    async def change(name: str, body: ChangeRequest) -> Response:
        _check_allowed(settings)
        model = models.change(name, aliases=body.aliases, default=body.default is True)
        return JSONResponse(describe(models, model))

    @routes.delete(
        "/models/{name}",
        tags=["server"],
        summary="Unload a checkpoint",
        description="Its running requests end as cancelled.",
        responses={**NOT_ALLOWED, **NAMED, 204: {"description": "It is unloaded"}},
        status_code=204,
    )
    async def unload(name: str) -> Response:
        _check_allowed(settings)
        await asyncio.to_thread(models.unload, name)
        return Response(status_code=204)


def add_adapters(routes: Routes, models: Models) -> None:
    """The routes over the adapters, which `/models` lists too."""
    settings = models.settings

    @routes.answering("/adapters", "Load a LoRA adapter", ModelDetails, status=201, tags=["server"],
                      description="Requests may name it", errors={**NAMED, **REFUSED})  # fmt: skip
    async def load(body: LoadAdapterRequest) -> Response:
        _check_adapters_allowed(settings)

        def respond() -> JSONResponse:
            assert settings.model_directory is not None, "checked above"
            root = expanded(settings.model_directory)
            path = _path_within(root, body.path)
            with _hiding(root):
                name = body.name or name_of(root / body.path)
                model = models.load_adapter(name, path, base=body.base, replace=body.replace, within=root)
            return JSONResponse(describe(models, model), 201)

        return await asyncio.to_thread(respond)

    @routes.delete(
        "/adapters/{name}",
        tags=["server"],
        summary="Unload an adapter",
        description="Its running requests end as they would have.",
        responses={**NOT_ALLOWED, **NAMED, 204: {"description": "It is unloaded"}},
        status_code=204,
    )
    async def unload(name: str) -> Response:
        _check_adapters_allowed(settings)
        if models.get(name).use is None:
            raise Refused(404, "not_found", f"{name} is a checkpoint, not an adapter", hint="DELETE /models/NAME")
        await asyncio.to_thread(models.unload, name)
        return Response(status_code=204)


def listed(model: LoadedModel) -> dict[str, Any]:
    """What a `ListedModel` says of a checkpoint."""
    return {"id": model.name, "object": "model", "created": model.created, "owned_by": "topkapi"}


def _examples(said: object) -> list[str]:
    """Those that the checkpoint's topkapi.json names, if it names any: a few short texts."""
    entries = said if isinstance(said, list) else []
    return [each for each in entries[:20] if isinstance(each, str) and 0 < len(each) <= 200]


def describe(models: Models, model: LoadedModel) -> dict[str, Any]:
    """What `/models` says of a checkpoint."""
    checkpoint, adapter = model.checkpoint, None if model.use is None else model.use.adapter
    return {
        "name": model.name,
        "aliases": models.aliases(model.name),
        "default": len(models) > 0 and models.get() is model,
        "family": checkpoint.config.family,
        "parameters": checkpoint.config.parameter_count(),
        "context_length": checkpoint.config.context_length,
        "vocab_size": checkpoint.tokenizer.vocab_size,
        "dtype": model.dtype,
        "dtype_why": model.why,
        "kv_cache_dtype": model.cache_dtype,
        "kernels": model.kernels,
        "memory": model.memory if adapter is None else {"weights": adapter.size, "cache": 0},
        "license": model.card.license,
        "card": model.card.text is not None,
        "examples": _examples(checkpoint.details.get("examples")),
        "chat": checkpoint.chat is not None,
        "draft": model.engine.drafter is not None,
        "defaults": defaults_of(model, chat=False),
        "chat_defaults": None if checkpoint.chat is None else defaults_of(model, chat=True),
        "created": model.created,
        "running": model.engine.running,
        "waiting": model.engine.waiting,
        "warnings": list(model.warnings),
        "reload_error": models.failures.get(model.name),
        "parent": None if adapter is None else adapter.base,
        "rank": None if adapter is None else adapter.rank,
        "in_memory": adapter is None or models.adapters.loaded(adapter),
    }


def _check_allowed(settings: Settings) -> None:
    if settings.model_directory is None and not settings.hub_models:
        hint = (
            "start it with TOPKAPI_MODEL_DIRECTORY set to the directory that they may be loaded from, or with "
            "TOPKAPI_HUB_MODELS=1 for models of the Hugging Face hub"
        )
        raise Refused(403, "forbidden", "this server lets no request load or unload checkpoints", hint=hint)


def _check_adapters_allowed(settings: Settings) -> None:
    if settings.model_directory is None:
        hint = "start it with TOPKAPI_MODEL_DIRECTORY set to the directory that they may be loaded from"
        raise Refused(403, "forbidden", "this server lets no request load or unload adapters", hint=hint)


def _place(settings: Settings, given: str) -> tuple[Path, Path]:
    """Where the checkpoint lies, and the directory that nothing of it may lead out of.

    What is in the model directory comes before a model of the hub, which is downloaded first.
    """
    directory = settings.model_directory
    inside = None if directory is None else _path_within(expanded(directory), given)
    if settings.hub_models and (inside is None or not inside.exists()):
        try:
            name = hub_name(given)
            if name is not None:
                return local_path(f"hf.co/{name}"), cache_directory()
        except CheckpointError as error:
            # Where the server keeps what it downloads is no concern of whoever asks.
            place = str(cache_directory())
            hint = error.hint and error.hint.replace(place, "the cache")
            raise InvalidRequest(error.message.replace(place, "its disk"), field="path", hint=hint) from None
    if inside is None or directory is None:
        hint = "name one as owner/name, such as " + EXAMPLE
        raise Refused(
            403, "forbidden", "this server loads models of the Hugging Face hub alone", field="path", hint=hint
        )
    return inside, expanded(directory)


def _path_within(directory: Path, path: str) -> Path:
    """The file or directory of that name, following links. What lies outside is refused, whether it exists or not."""
    root = os.path.realpath(directory)
    try:
        found = os.path.realpath(os.path.join(root, path))
    except ValueError:
        raise InvalidRequest("path holds a null character", field="path") from None
    if os.path.commonpath([root, found]) != root:
        hint = "name a checkpoint by its path within that directory"
        raise Refused(
            403,
            "forbidden",
            "path leads out of the directory that checkpoints may be loaded from",
            field="path",
            hint=hint,
        )
    return Path(found)


def _load(models: Models, path: Path, root: Path, body: LoadRequest) -> LoadedModel:
    hub = hub_name_of(path)
    name = body.name or name_of(path if hub else root / body.path)
    aliases = body.aliases
    if hub is not None and hub.repository not in (*aliases, *models.names, *models.every_alias):
        aliases = [*aliases, hub.repository]
    with _hiding(root):
        return models.load_as(name, path, aliases=aliases, default=body.default, replace=body.replace, within=root)


@contextmanager
def _hiding(root: Path) -> Iterator[None]:
    """What can't be loaded is told by its place in `root`; where that lies is no concern of whoever asks."""
    try:
        yield
    except (CheckpointError, OSError) as error:
        told = error.message if isinstance(error, CheckpointError) else f"path cannot be read: {error.strerror}"
        hint = error.hint if isinstance(error, CheckpointError) else None
        place = os.path.realpath(root)

        def within(text: str) -> str:
            return text.replace(place + os.sep, "").replace(place, ".")

        raise InvalidRequest(within(told), field="path", hint=hint and within(hint)) from None
