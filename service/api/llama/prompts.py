"""What llama.cpp's clients send as prompts and texts: read, told as tokens (under vLLM's names too), and embedded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from topkapi.model.embedding import check_embeddable
from topkapi.model.errors import InvalidRequest
from topkapi.service import limits
from topkapi.service.api.http.answering import answered, apart, as_json, unless_disconnected
from topkapi.service.api.http.errors import InapplicableField
from topkapi.service.api.http.registration import Routes
from topkapi.service.api.llama import schemas
from topkapi.service.embedding import embedded
from topkapi.service.models import LoadedModel, Models
from topkapi.service.prompting import check_count, check_size, checked_ids, raw_tokens, require_one


def read_prompts(model: LoadedModel, prompt: Any, field: str = "prompt") -> list[list[int]]:
    """The token ids of each prompt: a list is several, unless it holds a token id itself."""
    if isinstance(prompt, list) and not any(_is_id(part) for part in prompt):
        if not prompt:
            raise InvalidRequest(f"{field} is empty", field=field, hint="send a text or at least one token id")
        check_count(prompt, field)
        return [_one(model, part, f"{field}[{position}]") for position, part in enumerate(prompt)]
    return [_one(model, prompt, field)]


def _one(model: LoadedModel, prompt: Any, field: str) -> list[int]:
    if isinstance(prompt, dict):
        return _of_object(model, prompt, field)
    if isinstance(prompt, str):
        return raw_tokens(model, prompt, field)
    if not isinstance(prompt, list):
        raise InvalidRequest(
            f"{field} must be a text, a list of token ids and texts, or an object with prompt_string", field=field
        )
    if not any(isinstance(part, str) for part in prompt):
        return checked_ids(model, prompt, field)
    return _mixed(model, prompt, field)


def _mixed(model: LoadedModel, parts: Sequence[Any], field: str) -> list[int]:
    token_ids: list[int] = []
    check_size(model, [part for part in parts if isinstance(part, str)], field)
    check_count(parts, field, limits.MOST_TOKENS)
    for position, part in enumerate(parts):
        place = f"{field}[{position}]"
        if isinstance(part, str) and position == 0:
            token_ids += raw_tokens(model, part, place)
        elif isinstance(part, str):
            token_ids += model.checkpoint.tokenizer.encode_with_control(part)
        else:
            try:
                token_ids += checked_ids(model, [part], field)
            except InvalidRequest as error:
                error.message = error.message.replace(f"{field}[0]", place, 1)
                error.field = place
                raise
    return token_ids


def _of_object(model: LoadedModel, prompt: dict[str, Any], field: str) -> list[int]:
    for name in prompt:
        if name != "prompt_string":
            message = (
                f"{field}.{name}: only text is read here" if name == "multimodal_data" else f"unknown field {name}"
            )
            raise InapplicableField(message, field=f"{field}.{name}", hint="send prompt_string alone")
    return raw_tokens(model, prompt.get("prompt_string"), f"{field}.prompt_string")


def _is_id(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def add_texts(routes: Routes, models: Models) -> None:
    """`/tokenize` of `content` or `prompt`, `/detokenize` of `tokens`, and vectors in a plain list."""
    summary = "llama.cpp, vLLM: token ids of content or prompt"

    @routes.answering("/tokenize", summary, schemas.LlamaTokenizeResponse)
    async def tokenize(request: Request, body: schemas.LlamaTokenizeRequest) -> Response:
        model = models.get(body.model)
        return await apart(request, lambda: as_json(_tokenized(model, body)))

    @routes.answering("/detokenize", "llama.cpp, vLLM: text of tokens", schemas.LlamaDetokenizeResponse)
    async def detokenize(request: Request, body: schemas.LlamaDetokenizeRequest) -> Response:
        model = models.get(body.model)

        def told() -> Response:
            token_ids = checked_ids(model, body.tokens, "tokens", fits=False) if body.tokens != [] else []
            text = model.checkpoint.tokenizer.decode(token_ids)
            return as_json({"content": text, "prompt": text})

        return await apart(request, told)

    shape = list[schemas.LlamaEmbedding]

    @routes.answering("/embedding", "llama.cpp: texts as vectors", shape, name="embedding")
    @routes.answering("/embeddings", "llama.cpp: texts as vectors", shape, name="embeddings")
    async def embed(request: Request, body: schemas.LlamaEmbeddingRequest) -> Response:
        model = models.get(body.model)
        texts = await apart(request, _texts, model, body)
        adapter = None if model.use is None else await apart(request, model.use.live)
        vectors = await unless_disconnected(request, embedded(model.checkpoint.model, texts, adapter))
        return await answered(lambda: [{"index": index, "embedding": [vector]} for index, vector in enumerate(vectors)])


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
    shown = (_piece(model, token_id) for token_id in token_ids) if body.with_pieces else token_ids
    return {"tokens": shown, "count": len(token_ids), "max_model_len": model.context_length}


def _texts(model: LoadedModel, body: schemas.LlamaEmbeddingRequest) -> list[list[int]]:
    field = require_one([name for name in ("content", "input") if getattr(body, name) is not None], "content and input")
    texts = read_prompts(model, getattr(body, field), field)
    for position, token_ids in enumerate(texts):
        check_embeddable(token_ids, model.context_length, f"{field}[{position}]" if len(texts) > 1 else field)
    return texts


def _piece(model: LoadedModel, token_id: int) -> dict[str, Any]:
    """A token as `/tokenize` shows it: text, or bytes where they are no whole characters."""
    raw = model.checkpoint.tokenizer.token_bytes(token_id)
    try:
        return {"id": token_id, "piece": raw.decode("utf-8")}
    except UnicodeDecodeError:
        return {"id": token_id, "piece": list(raw)}
