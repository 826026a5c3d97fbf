"""What llama.cpp's own routes read and answer, for validation and for /openapi.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field, WithJsonSchema

from topkapi.model.decoding.table import MOST_IDS, MOST_STOPS
from topkapi.service.api.http.body import Strict
from topkapi.service.api.http.describing import decoding
from topkapi.service.api.http.template_variables import TemplateVariables
from topkapi.service.api.http.timings import LlamaTimings
from topkapi.service.api.native.schemas import MANY, ModelName
from topkapi.service.api.openai.conversation import ChatMessage, Tool
from topkapi.service.api.openai.fields import Refusing
from topkapi.service.limits import MOST_MESSAGES, MOST_TOKENS, MOST_TOOLS

_TEXT: dict[str, Any] = {"type": "string"}
_MIXED: dict[str, Any] = {
    "type": "array",
    "items": {"anyOf": [{"type": "integer", "minimum": 0}, _TEXT]},
    "minItems": 1,
}
_OBJECT: dict[str, Any] = {
    "type": "object",
    "properties": {"prompt_string": _TEXT},
    "required": ["prompt_string"],
    "additionalProperties": False,
}
_ONE: list[dict[str, Any]] = [_TEXT, _MIXED, _OBJECT]
_BIAS: dict[str, Any] = {"anyOf": [{"type": "number", "minimum": -100, "maximum": 100}, {"const": False}]}

Prompt = Annotated[Any, WithJsonSchema({"anyOf": [*_ONE, {"type": "array", "items": {"anyOf": _ONE}, **MANY}]})]
Texts = Annotated[
    str | Annotated[list[str], decoding("stop", description=None)],
    Field(description="Texts that end the answer; they are not part of it."),
]
LogitBias = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [
                {
                    "type": "array",
                    "maxItems": MOST_IDS,
                    "items": {"type": "array", "prefixItems": [{"type": ["integer", "string"]}, _BIAS], "minItems": 2},
                },
                {"type": "object", "additionalProperties": _BIAS, "maxProperties": MOST_IDS},
            ]
        }
    ),
]
Zero = Annotated[Any, WithJsonSchema({"enum": [0, None]})]
No = Annotated[Any, WithJsonSchema({"enum": [False, None]})]
Nothing = Annotated[Any, WithJsonSchema({"type": ["array", "null"], "maxItems": 0})]


class LlamaRequest(Refusing):
    """The body of `POST /completion`, with llama.cpp's defaults. A null counts as absent."""

    HARMLESS: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "n_discard": (0,), "n_indent": (0,), "n_cache_reuse": (0,), "min_keep": (0,), "return_progress": (False,),
        "backend_sampling": (False,), "lora": ([],),
    }  # fmt: skip
    REASONS: ClassVar[Mapping[str, str]] = {
        "n_discard": "contexts are not shifted",
        "n_indent": "no indentation can be demanded",
        "n_cache_reuse": "only prefixes are reused",
        "min_keep": "samplers keep one token at least, not more",
        "lora": "an adapter is asked for by its name, as model",
    }

    prompt: Annotated[Prompt, Field(description="A text, tokens and texts mixed, or a list of either.")]
    model: ModelName = None
    stream: bool | None = None

    n_predict: Annotated[
        int | None, decoding("n_predict", ge=-1, description="Most tokens to generate; -1: all there is room for.")
    ] = None
    max_tokens: Annotated[int | None, decoding("max_tokens", ge=-1, description="Another name for n_predict.")] = None
    n_cmpl: Annotated[int | None, decoding("n", description="Answers to each prompt.")] = None
    seed: Annotated[int | None, decoding("seed", ge=-1, description="-1 draws one.")] = None
    stop: Texts | None = None
    ignore_eos: Annotated[bool | None, decoding("ignore_eos", description="End tokens are never chosen.")] = None
    t_max_predict_ms: Annotated[
        int | None, Field(ge=0, description="The answer ends as it stands after so many milliseconds; 0: never.")
    ] = None

    temperature: Annotated[float | None, decoding("temperature", ge=None, description="0 or less is greedy.")] = None
    dynatemp_range: Annotated[float | None, decoding("dynatemp_range")] = None
    dynatemp_exponent: Annotated[float | None, decoding("dynatemp_exponent")] = None
    top_k: Annotated[int | None, decoding("top_k", ge=None, description="0 or less keeps all.")] = None
    top_p: Annotated[float | None, decoding("top_p", le=None, description="1 or more keeps all.")] = None
    min_p: Annotated[float | None, decoding("min_p", ge=None, description="0 or less keeps all.")] = None
    typical_p: Annotated[float | None, decoding("typical_p", le=None, description="1 or more keeps all.")] = None
    top_n_sigma: Annotated[float | None, decoding("top_n_sigma", ge=None, description="0 or less keeps all.")] = None
    xtc_probability: Annotated[float | None, decoding("xtc_probability")] = None
    xtc_threshold: Annotated[
        float | None, decoding("xtc_threshold", le=None, description="Above 0.5, XTC does nothing.")
    ] = None
    mirostat: Annotated[int | None, decoding("mirostat", description="2, or 0 for off; 1 is refused.")] = None
    mirostat_tau: Annotated[float | None, decoding("mirostat_tau")] = None
    mirostat_eta: Annotated[float | None, decoding("mirostat_eta")] = None
    repeat_penalty: Annotated[float | None, decoding("repeat_penalty")] = None
    repeat_last_n: Annotated[
        int | None, decoding("repeat_last_n", ge=-1, description="-1: all tokens, 0: no repeat_penalty.")
    ] = None
    presence_penalty: Annotated[float | None, decoding("presence_penalty")] = None
    frequency_penalty: Annotated[float | None, decoding("frequency_penalty")] = None
    dry_multiplier: Annotated[float | None, decoding("dry_multiplier")] = None
    dry_base: Annotated[float | None, decoding("dry_base", ge=0, description="Below 1, DRY does nothing.")] = None
    dry_allowed_length: Annotated[int | None, decoding("dry_allowed_length")] = None
    dry_penalty_last_n: Annotated[
        int | None, decoding("dry_penalty_last_n", ge=-1, description="-1: all tokens, 0: no DRY.")
    ] = None
    dry_sequence_breakers: Annotated[list[str] | None, decoding("dry_sequence_breakers")] = None
    samplers: Annotated[
        Annotated[list[str], Field(max_length=MOST_STOPS)] | Annotated[str, Field(max_length=MOST_STOPS)] | None,
        Field(description="The samplers to apply, in order; those left out are off."),
    ] = None
    logit_bias: LogitBias | None = None
    grammar: Annotated[str | None, Field(description="A GBNF grammar, or Lark after a line %llguidance.")] = None
    json_schema: Annotated[Any, WithJsonSchema({"type": ["object", "boolean", "null"]})] = None

    n_probs: Annotated[int | None, decoding("logprobs")] = None
    post_sampling_probs: bool | None = None
    return_tokens: bool | None = None
    timings_per_token: bool | None = None
    response_fields: Annotated[list[str] | None, Field(max_length=256)] = None

    cache_prompt: Annotated[bool | None, Field(description="Reuse of prefixes never changes an answer.")] = None
    id_slot: Annotated[int | None, Field(ge=-1, description="A prefix is reused from whichever slot has it.")] = None
    n_keep: Annotated[int | None, Field(ge=-1, description="Nothing of a prompt is ever discarded.")] = None
    n_discard: Zero = None
    n_indent: Zero = None
    n_cache_reuse: Zero = None
    min_keep: Zero = None
    return_progress: No = None
    backend_sampling: No = None
    lora: Nothing = None


class LlamaProbability(BaseModel):
    """A token with its log-probability, or with its probability after the samplers if `post_sampling_probs`."""

    id: int
    token: str
    bytes: list[int]
    logprob: float | None = None
    prob: float | None = None


class LlamaProbabilities(LlamaProbability):
    """A generated token, with those that were likeliest at its place."""

    top_logprobs: list[LlamaProbability] | None = None
    top_probs: list[LlamaProbability] | None = None


class LlamaCompletion(BaseModel):
    """The answer to one prompt; of several ones, a list. `response_fields` leaves only what it names."""

    index: int
    content: str
    tokens: list[int]
    id_slot: int
    stop: bool
    model: str
    tokens_predicted: int
    tokens_evaluated: int
    generation_settings: dict[str, Any]
    prompt: str
    has_new_line: bool
    truncated: bool
    stop_type: Literal["eos", "limit", "word"]
    stopping_word: str
    tokens_cached: int
    timings: LlamaTimings
    completion_probabilities: list[LlamaProbabilities] | None = None


class LlamaTokenizeRequest(Strict):
    """The body of `POST /tokenize` with `content` (llama.cpp) or `prompt` (vLLM, lm-evaluation-harness)."""

    content: str | None = None
    prompt: str | None = None
    add_special: Annotated[bool | None, Field(description="Begin with the begin token, if tools put one there.")] = None
    add_special_tokens: Annotated[bool | None, Field(description="The same, where prompt is sent.")] = None
    parse_special: Annotated[bool | None, Field(description="Whether a control token's spelling is that token.")] = None
    with_pieces: bool | None = None
    model: ModelName = None


class LlamaPiece(BaseModel):
    """A token as text, or as bytes where they are no whole characters."""

    id: int
    piece: str | list[int]


class LlamaTokenizeResponse(BaseModel):
    """The answer of `POST /tokenize` to `content` or `prompt`."""

    tokens: list[int] | list[LlamaPiece]
    count: int
    max_model_len: int


class LlamaDetokenizeRequest(Strict):
    """The body of `POST /detokenize` with `tokens`."""

    tokens: Annotated[
        Any, WithJsonSchema({"type": "array", "items": {"type": "integer", "minimum": 0}, "maxItems": MOST_TOKENS})
    ]
    model: ModelName = None


class LlamaDetokenizeResponse(BaseModel):
    """The text, under the name that each client reads."""

    content: str
    prompt: str


class LlamaTemplateRequest(Strict):
    """The body of `POST /apply-template`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MOST_MESSAGES)]
    tools: Annotated[list[Tool] | None, Field(max_length=MOST_TOOLS)] = None
    chat_template_kwargs: TemplateVariables = None
    add_generation_prompt: Annotated[bool | None, Field(description="End where the answer begins; yes by default.")] = (
        None
    )
    model: ModelName = None


class LlamaCount(BaseModel):
    """The answer of `POST /chat/completions/input_tokens`."""

    input_tokens: int


class LlamaPrompt(BaseModel):
    """The answer of `POST /apply-template`."""

    prompt: str


class LlamaEmbeddingRequest(Strict):
    """The body of `POST /embedding`, which calls its texts `content`, and of `POST /embeddings`."""

    content: Annotated[Prompt | None, Field(description="A text, tokens and texts mixed, or a list of either.")] = None
    input: Annotated[Prompt | None, Field(description="The same.")] = None
    embd_normalize: Annotated[Literal[2] | None, Field(description="Vectors have the Euclidean length 1.")] = None
    model: ModelName = None


class LlamaEmbedding(BaseModel):
    """One text's vector, the only one of its list."""

    index: int
    embedding: list[list[float]]


class LlamaNextToken(BaseModel):
    """How far a slot has got; -1 tokens remain where that is not known."""

    has_next_token: bool
    n_remain: int
    n_decoded: int


class LlamaSlot(BaseModel):
    """A place in the cache, which one sequence at a time holds."""

    id: int
    id_task: int
    n_ctx: int
    speculative: bool
    is_processing: bool
    next_token: LlamaNextToken


class LlamaDefaultSlot(LlamaSlot):
    """What a request that says nothing gets."""

    params: dict[str, Any]
    prompt: str


class LlamaProps(BaseModel):
    """The answer of `GET /props`."""

    default_generation_settings: LlamaDefaultSlot
    total_slots: int
    model_alias: str
    model_path: str
    modalities: dict[str, bool]
    chat_template: str
    chat_template_caps: dict[str, bool]
    bos_token: str
    eos_token: str
    build_info: str
    dtype: str
    dtype_why: str
    kernels: str
    is_sleeping: bool


class LlamaHealth(BaseModel):
    """The answer of `GET /v1/health`."""

    status: Literal["ok"]


class LlamaErrorContent(BaseModel):
    """What went wrong. The two counts come with `exceed_context_size_error`."""

    code: int
    message: str
    type: str
    n_prompt_tokens: int | None = None
    n_ctx: int | None = None


class LlamaError(BaseModel):
    """Every error's body."""

    error: LlamaErrorContent
