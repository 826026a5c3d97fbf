"""What the native routes read and answer, for validation and for /openapi.json.

The decoding fields of `GenerateRequest` are made from the parameter table, which also checks their values
(`model.decoding.parameters.resolve`); here their types and ranges are only described.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import Header
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, create_model

from topkapi.model.decoding.parameters import PARAMETERS, Parameter
from topkapi.service import limits
from topkapi.service.api.http.body import Strict
from topkapi.service.api.http.describing import errors_of, one_of

TOKEN_IDS: dict[str, Any] = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_NUMBER: dict[str, Any] = {"type": "integer", "minimum": 0}
TEXT: dict[str, Any] = {"type": "string", "minLength": 1}
TEXT_OR_IDS: dict[str, Any] = {"anyOf": [TEXT, TOKEN_IDS]}
MANY: dict[str, Any] = {"minItems": 1, "maxItems": limits.MOST_PROMPTS}
"""How many texts, for the description."""

_PROMPT: dict[str, Any] = {"anyOf": [TEXT, TOKEN_IDS, {"type": "array", "items": TEXT_OR_IDS, **MANY}]}

NOT_EMPTY: dict[str, Any] = {"minItems": 1}
"""For the description only: the refusal of an empty list says more than the schema's would."""

Prompt = Annotated[Any, WithJsonSchema(_PROMPT)]
TextOrIds = Annotated[Any, WithJsonSchema(TEXT_OR_IDS)]
ModelName = Annotated[
    str | None,
    Field(max_length=limits.LONGEST_NAME, description="A loaded checkpoint's name; the first one by default."),
]


def _whole(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


WHOLE = BeforeValidator(_whole)
"""Takes 1.0 for 1: JSON has one kind of number. It stands behind a field's bounds, which it would hide otherwise."""
Integer = Annotated[int, WHOLE]
Priority = Annotated[
    int,
    Field(ge=-100, le=100, description="Where requests compete for room, those of higher priority go first."),
    WHOLE,
]
Resumable = Annotated[
    bool, Field(description="Whether a stream goes on for a while when its connection is lost; else it ends at once.")
]
LastEventId = Annotated[
    str | None,
    Header(
        alias="Last-Event-ID",
        description="Go on with a stream after the event of this id. The body must be the one that began the stream.",
    ),
]


class Message(Strict):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class GenerateFields(Strict):
    """The fields of `POST /generate` beside the decoding parameters: exactly one of `prompt` and `messages`."""

    model_config = ConfigDict(json_schema_extra=one_of(("prompt",), ("messages",)))

    prompt: Annotated[Prompt | None, Field(description="A text, a list of token ids, or a list of either.")] = None
    messages: Annotated[
        list[Message] | None,
        Field(
            max_length=limits.MOST_MESSAGES,
            description="A conversation, for chat checkpoints.",
            json_schema_extra=NOT_EMPTY,
        ),
    ] = None
    answer_prefix: Annotated[
        Annotated[list[Any], WithJsonSchema({"type": "array", "items": _NUMBER})] | None,
        Field(
            description="The token ids that an answer to this request has already, because it was cut off, say. What "
            "comes are those that would have come after them in one go: on the same seed the same ones. Parameters "
            "that count tokens of the answer, as max_tokens, count them too; the answer tells what is new alone."
        ),
    ] = None
    model: ModelName = None
    stream: Annotated[bool, Field(description="Answer by server-sent events as the tokens come.")] = False
    progress: Annotated[
        bool, Field(description="With `stream`: tell by `progress` events how far the reading of the prompt is.")
    ] = False
    resumable: Resumable = True
    priority: Priority = 0

    def parameters(self) -> dict[str, Any]:
        """The decoding parameters that the caller set."""
        return {name: getattr(self, name) for name in self.model_fields_set - GenerateFields.model_fields.keys()}


def parameter_schema(parameter: Parameter) -> dict[str, Any]:
    """The JSON schema of one decoding parameter."""
    number: dict[str, Any] = {"type": "integer" if parameter.kind == "integer" else "number"}
    bounds = {"minimum": parameter.minimum, "maximum": parameter.maximum, "exclusiveMinimum": parameter.above}
    number |= {name: bound for name, bound in bounds.items() if bound is not None}
    count = {} if parameter.most is None else {"maxItems": parameter.most}
    length = {} if parameter.longest is None else {"maxLength": parameter.longest}
    text = TEXT | length
    ids: dict[str, Any] = {"type": "array", "items": _NUMBER, "minItems": 1}
    words = {"anyOf": [text, ids | ({} if parameter.longest is None else {"maxItems": parameter.longest})]}
    schemas: dict[str, dict[str, Any]] = {
        "integer": number,
        "number": number,
        "boolean": {"type": "boolean"},
        "text": text,
        "schema": {"anyOf": [{"type": "object"}, {"type": "boolean"}]},
        "strings": {"anyOf": [text, {"type": "array", "items": text, **count}]},
        "integers": {"type": "array", "items": {"type": "integer", "minimum": 0}, **count},
        "prompt": TEXT_OR_IDS,
        "layers": {"anyOf": [{"enum": ["low", "high"]}, ids | count]},
        "words": {"anyOf": [text, {"type": "array", "items": words, **count}]},
        "integer_to_number": {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]+$"},
            "additionalProperties": number,
            **({} if parameter.most is None else {"maxProperties": parameter.most}),
        },
    }
    description = (
        f"{parameter.meaning} Default: the checkpoint's own, else {_shown(parameter.default)}. ({parameter.source})"
    )
    return {"anyOf": [schemas[parameter.kind], {"type": "null"}], "description": description}


def _shown(default: Any) -> str:
    return "as described" if default is None else repr(default).lower() if isinstance(default, bool) else repr(default)


if TYPE_CHECKING:
    GenerateRequest = GenerateFields
else:
    GenerateRequest = create_model(
        "GenerateRequest",
        __base__=GenerateFields,
        __doc__="The body of `POST /generate`: exactly one of `prompt` and `messages`, and any decoding parameter.",
        **{p.name: (Annotated[Any, WithJsonSchema(parameter_schema(p))], None) for p in PARAMETERS},
    )


class Candidate(BaseModel):
    """A token that could have been chosen. A log-probability of minus infinity is sent as -9999."""

    token_id: int
    text: str
    bytes: list[int]
    logprob: float


class TokenLogprobs(BaseModel):
    """One generated token: `logprob` after every decoding stage, `raw_logprob` and `rank` as the network gave it."""

    token_id: int
    text: str
    bytes: list[int]
    logprob: float | None
    raw_logprob: float | None
    rank: int | None
    top: list[Candidate]


class StageTrace(BaseModel):
    """What a stage did: candidates left, the probability it removed, and the entropy (nats) after it.

    `probabilities` are those of the token's `contenders` after it, in their order; 0 for what is ruled out.
    """

    stage: str
    kept: int
    cut: float
    entropy: float
    probabilities: list[float]


class RunnerUp(BaseModel):
    """Another token that could have been chosen, with its probability before and after the stages."""

    token_id: int
    text: str
    bytes: list[int]
    raw_probability: float
    probability: float


class Contender(BaseModel):
    """A token that is followed through the stages, with the network's own probability of it."""

    token_id: int
    text: str
    bytes: list[int]
    raw_probability: float


class TokenTrace(BaseModel):
    """How one token was decided. `noise` is the Gumbel noise of a sampled token, `entropy` (nats) the network's.

    `contenders` are the chosen token and those that were likeliest before the stages or after them: at least five of
    each, or as many as `logprobs` asks for. They are ordered by the network's own probability.
    `guessed` says that it was read ahead (see `prompt_lookup`) and turned out right.
    """

    token_id: int
    text: str
    how: Literal["searched", "sampled", "greedy", "forced"]
    candidates: int
    entropy: float
    stages: list[StageTrace]
    rank: int
    raw_probability: float
    probability: float
    noise: float | None
    runners_up: list[RunnerUp]
    contenders: list[Contender]
    guessed: bool


class Output(BaseModel):
    """One continuation. Its text holds no control token and ends before a stop string; `token_ids` are complete."""

    index: int
    prompt_index: int
    text: str
    token_ids: list[int]
    finish_reason: Literal["stop", "length", "deadline", "cancelled", "error"]
    stop_reason: str | int | None = None
    score: float | None = None
    logprobs: list[TokenLogprobs] | None = None
    trace: list[TokenTrace] | None = None


class Usage(BaseModel):
    """Token counts. `cached_tokens` of the prompt were not computed again; of `guessed_tokens` read ahead
    (see `prompt_lookup`), `accepted_tokens` were right."""

    prompt_tokens: int
    cached_tokens: int = 0
    guessed_tokens: int = 0
    accepted_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int


class TokenSeconds(BaseModel):
    """Seconds from one token of an output to its next: mean, median, 95th percentile and the longest."""

    mean: float
    p50: float
    p95: float
    max: float


class TimingsBody(BaseModel):
    """Seconds; of several prompts, the longest. `tokens_per_s` counts generated tokens over `decode_s`.

    `first_token_s` is from the request's start to its first token (null without any), `token_s` from one token to the
    next (null where no output has two).
    """

    queue_s: float
    prefill_s: float
    decode_s: float
    tokens_per_s: float | None
    first_token_s: float | None
    token_s: TokenSeconds | None


class PromptProgress(BaseModel):
    """The data of a `progress` event: how a prompt stands before its first token, for requests that ask for it.

    `queued` comes first, once for each prompt, with the number of `others` that the checkpoint was at work on or that
    waited for it; then `reading`, where a prompt is read in several pieces, with the tokens `read` of a `total`.
    """

    state: Literal["queued", "reading"]
    prompt_index: int
    read: int
    total: int
    others: int


class TokenEvent(BaseModel):
    """The data of a `token` event: what one step adds to an output. See `Output`."""

    index: int
    prompt_index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    trace: list[TokenTrace] | None = None


class GenerateResponse(BaseModel):
    """The answer of `POST /generate`: outputs prompt by prompt, and every parameter that was in force."""

    id: str
    model: str
    created: int
    outputs: list[Output]
    usage: Usage
    timings: TimingsBody
    parameters: dict[str, Any]
    order: list[str]
    deterministic: bool


class TokenizeRequest(Strict):
    """The body of `POST /tokenize`: exactly one of `text` and `messages`."""

    model_config = ConfigDict(json_schema_extra=one_of(("text",), ("messages",)))

    text: Annotated[str | None, Field(description=f"At most {limits.LONGEST_TEXT:,} bytes.")] = None
    messages: Annotated[list[Message] | None, Field(max_length=limits.MOST_MESSAGES, json_schema_extra=NOT_EMPTY)] = (
        None
    )
    model: ModelName = None


class Piece(BaseModel):
    """One token as text and as bytes; part of a character shows as U+FFFD in the text."""

    token_id: int
    text: str
    bytes: list[int]


class TokenizeResponse(BaseModel):
    """The answer of `POST /tokenize`."""

    model: str
    count: int
    token_ids: list[int]
    pieces: list[Piece]


class DetokenizeRequest(Strict):
    """The body of `POST /detokenize`."""

    token_ids: Annotated[Any, WithJsonSchema({**TOKEN_IDS, "maxItems": limits.MOST_TOKENS})]
    model: ModelName = None


class DetokenizeResponse(BaseModel):
    """The answer of `POST /detokenize`: control tokens by their spelling, invalid UTF-8 as U+FFFD."""

    model: str
    text: str


class Health(BaseModel):
    """The answer of `GET /health` and `GET /ready`: what is loaded and being loaded, and why nothing is computed."""

    status: str
    version: str
    models: list[str]
    loading: str | None
    reason: str | None = None


class ErrorContent(BaseModel):
    """What went wrong, in which field, and what to do about it."""

    type: str
    message: str
    field: str | None = None
    hint: str | None = None


class ErrorBody(BaseModel):
    """Every error's body."""

    error: ErrorContent


GENERATE_EVENTS: dict[str, type[BaseModel]] = {
    "progress": PromptProgress, "token": TokenEvent, "done": GenerateResponse, "error": ErrorBody,
}  # fmt: skip

ERRORS = errors_of(ErrorBody, 400, 404, 413, 415, 429, 500, more={
    422: "A field is wrong; `field` names it",
    503: "The checkpoint was unloaded, or the server is stopping",
})  # fmt: skip
"""What every route that computes may answer besides 200."""


def given(body: Strict, *names: str) -> list[str]:
    """Which of these fields the body has."""
    return [name for name in names if getattr(body, name) is not None]
