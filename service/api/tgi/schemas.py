"""What the routes of text-generation-inference (TGI) read and answer, for validation and for /openapi.json."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, WithJsonSchema

from topkapi.service.api.http.body import Strict
from topkapi.service.api.http.describing import decoding

FinishReason = Literal["length", "eos_token", "stop_sequence"]


class TGIGrammar(Strict):
    """What the answer must follow: a JSON schema (an object, or JSON in a text), or a regular expression."""

    type: Literal["json", "regex"]
    value: dict[str, Any] | str


class TGIParameters(Strict):
    """TGI's parameters. Without `do_sample` or one that only sampling has, decoding is greedy."""

    adapter_id: Annotated[
        Any, WithJsonSchema({"type": "null", "description": "Refused: the other dialects ask for one as model."})
    ] = None
    best_of: Annotated[int | None, decoding("n", description="Sample so many answers; the likeliest comes first.")] = (
        None
    )
    decoder_input_details: Annotated[bool | None, Field(description="Report the prompt's log-probabilities.")] = None
    details: Annotated[bool | None, Field(description="Report tokens, log-probabilities and why it ended.")] = None
    do_sample: bool | None = None
    frequency_penalty: Annotated[float | None, decoding("frequency_penalty")] = None
    grammar: TGIGrammar | None = None
    max_new_tokens: Annotated[int | None, decoding("max_new_tokens", ge=1, description="Most new tokens.")] = 100
    repetition_penalty: Annotated[float | None, decoding("repetition_penalty")] = None
    return_full_text: Annotated[bool | None, Field(description="Put the prompt before the answer.")] = None
    seed: Annotated[int | None, decoding("seed")] = None
    stop: Annotated[list[str] | None, decoding("stop", description="Texts that end the answer, which keeps them.")] = (
        None
    )
    temperature: Annotated[
        float | None, decoding("temperature", gt=0, description="Below 1 sharper, above 1 flatter.")
    ] = None
    top_k: Annotated[int | None, decoding("top_k", ge=1, description="Keep only the k most likely tokens.")] = None
    top_n_tokens: Annotated[int | None, decoding("logprobs")] = None
    top_p: Annotated[float | None, decoding("top_p", gt=0, lt=1)] = None
    truncate: Annotated[int, Field(ge=1, description="Read only so many tokens from the end of the prompt.")] | (
        None
    ) = None
    typical_p: Annotated[float | None, decoding("typical_p", gt=0, lt=1)] = None
    watermark: Annotated[bool | None, Field(description="Refused when true: texts are not watermarked.")] = None


class TGIStreamRequest(Strict):
    """The body of `POST /generate_stream`."""

    inputs: Annotated[str, Field(min_length=1, description="The prompt; control tokens spelled out in it are such.")]
    parameters: TGIParameters | None = None


class TGIRequest(TGIStreamRequest):
    """The body of `POST /`, and of `POST /generate` with `inputs`."""

    stream: bool | None = None


class TGIPromptToken(BaseModel):
    """A token of the prompt; the first one has no log-probability."""

    id: int
    text: str
    logprob: float | None


class TGIToken(BaseModel):
    """A token with the network's own log-probability. Special tokens are not part of the text."""

    id: int
    text: str
    logprob: float
    special: bool


class _Told(BaseModel):
    finish_reason: FinishReason
    generated_tokens: int
    seed: int | None
    prefill: list[TGIPromptToken]
    tokens: list[TGIToken]
    top_tokens: list[list[TGIToken]] | None = None


class TGISequence(_Told):
    """One answer with its details."""

    generated_text: str


class TGIDetails(_Told):
    """How an answer came about. `seed` is null for a greedy one."""

    best_of_sequences: list[TGISequence] | None = None


class TGIResponse(BaseModel):
    """The answer of `POST /generate` with `inputs`; `POST /` puts it into a list."""

    generated_text: str
    details: TGIDetails | None = None


class TGIInfo(BaseModel):
    """The answer of `GET /info`, about the default checkpoint."""

    model_id: str
    model_sha: str | None
    model_dtype: str
    model_device_type: str
    model_pipeline_tag: str
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_input_tokens: int
    max_total_tokens: int
    max_client_batch_size: int
    router: str
    version: str
    sha: str | None
    docker_label: str | None


class TGIError(BaseModel):
    """Every error's body."""

    error: str
    error_type: Literal["validation", "generation", "overloaded", "incomplete_generation"]
