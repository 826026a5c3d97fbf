"""What `POST /score` reads and answers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from topkapi.service.api.http.body import Strict
from topkapi.service.api.http.describing import one_of
from topkapi.service.api.native.schemas import (
    MANY,
    NOT_EMPTY,
    TEXT,
    TOKEN_IDS,
    WHOLE,
    Candidate,
    ErrorBody,
    Integer,
    ModelName,
    Priority,
    Resumable,
    TextOrIds,
    Usage,
)
from topkapi.service.limits import LONGEST_TEXT, MOST_PROMPTS, MOST_REPORTED

Texts = Annotated[Any, WithJsonSchema({"anyOf": [TEXT, {"type": "array", "items": TEXT, **MANY}]})]
IdLists = Annotated[Any, WithJsonSchema({"anyOf": [TOKEN_IDS, {"type": "array", "items": TOKEN_IDS, **MANY}]})]


class Pair(Strict):
    """A completion to score after a prompt. Each is a text or token ids, and they are tokenised apart."""

    prompt: TextOrIds
    completion: TextOrIds


class ScoreRequest(Strict):
    """The body of `POST /score`: exactly one of `text`, `token_ids`, `pairs` and `prompt` with `choices`."""

    model_config = ConfigDict(
        json_schema_extra=one_of(("text",), ("token_ids",), ("pairs",), ("prompt", "choices", "normalize?"))
    )

    text: Annotated[Texts | None, Field(description=f"A text or several, of at most {LONGEST_TEXT:,} bytes each.")] = (
        None
    )
    token_ids: Annotated[IdLists | None, Field(description="Token ids, or several lists of them.")] = None
    pairs: Annotated[
        list[Pair] | None,
        Field(
            max_length=MOST_PROMPTS,
            description="Completions to score, each after its prompt.",
            json_schema_extra=NOT_EMPTY,
        ),
    ] = None
    prompt: Annotated[TextOrIds | None, Field(description="What the choices continue.")] = None
    choices: Annotated[
        list[TextOrIds] | None,
        Field(max_length=MOST_PROMPTS, description="Continuations to rank.", json_schema_extra=NOT_EMPTY),
    ] = None
    model: ModelName = None
    window: Annotated[
        Integer | None,
        Field(description="Tokens read at a time; the context length by default.", json_schema_extra={"minimum": 2}),
    ] = None
    stride: Annotated[
        Integer | None,
        Field(description="Tokens between windows; half a window by default.", json_schema_extra={"minimum": 1}),
    ] = None
    top: Annotated[int, Field(ge=0, le=1000, description="Most likely alternatives to report per token."), WHOLE] = 0
    per_token: Annotated[
        bool,
        Field(description=f"Whether to report every token: at most {MOST_REPORTED:,} with their alternatives."),
    ] = True
    normalize: Annotated[
        Literal["byte", "token", "none"] | None,
        Field(
            description="What choices are ranked by: their log-likelihood per byte (default), per token, or as it is."
        ),
    ] = None
    timeout_s: Annotated[
        Any,
        WithJsonSchema(
            {
                "anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"type": "null"}],
                "description": "Seconds after which scoring is given up, with a 408; no limit by default.",
            }
        ),
    ] = None
    stream: Annotated[bool, Field(description="Tell the progress by server-sent events.")] = False
    resumable: Resumable = True
    priority: Priority = 0


class ScoredToken(BaseModel):
    """One token. `logprob`, `rank` and `entropy` (nats) are null for the first, which nothing precedes."""

    token_id: int
    text: str
    bytes: list[int]
    logprob: float | None
    rank: int | None
    entropy: float | None
    top: list[Candidate] | None = None


class ScoreResult(BaseModel):
    """The scores of one text, or of one completion. `nll` is in nats over the scored tokens.

    What is per something, and `perplexity`, is null where nothing could be scored (a text of one token).
    """

    tokens: int
    scored_tokens: int
    bytes: int
    nll: float
    nll_per_token: float | None
    nll_per_byte: float | None
    perplexity: float | None
    bits_per_byte: float | None
    greedy_match: bool | None = None
    per_token: list[ScoredToken] | None = None


class ScoreResponse(BaseModel):
    """The answer of `POST /score`. `ranking` holds the indices of the choices, the likeliest first: `choice`."""

    id: str
    model: str
    results: list[ScoreResult]
    choice: int | None = None
    ranking: list[int] | None = None
    usage: Usage
    deterministic: bool


class ScoreProgress(BaseModel):
    """The data of a `progress` event: tokens scored, of all that are to be."""

    scored: int
    total: int


SCORE_EVENTS: dict[str, type[BaseModel]] = {"progress": ScoreProgress, "done": ScoreResponse, "error": ErrorBody}
