"""SGLang's own body at `/generate`: `text` or `input_ids` with `sampling_params`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from fastapi import Request
from fastapi.responses import Response
from pydantic import BaseModel, Field

from topkapi.engine.request import Candidate, Token
from topkapi.model.decoding.aliases import translated
from topkapi.model.decoding.gbnf import lark_of
from topkapi.model.errors import InvalidRequest, Overloaded, TopkapiError
from topkapi.service.api.http.answering import Answer, Event, respond, text_of
from topkapi.service.api.http.body import Strict, schema_in
from topkapi.service.api.http.describing import STREAM, decoding, errors_of
from topkapi.service.api.http.dialect import Dialect, with_hint
from topkapi.service.api.http.harmless import Only
from topkapi.service.api.http.registration import Routes
from topkapi.service.api.native.generate import new_id
from topkapi.service.generation import CompletionOutput, Delta, Generation, Plan, no_answer, plan
from topkapi.service.limits import MOST_PROMPTS
from topkapi.service.models import LoadedModel, Models
from topkapi.service.prompting import check_count, prompt_tokens, raw_tokens, require_one
from topkapi.service.scoring import finite

TEXT_ONLY = "only text is read"


class SGLangParameters(Strict):
    """SGLang's sampling parameters. What is left out takes the checkpoint's own defaults, as there."""

    max_new_tokens: Annotated[int, decoding("max_new_tokens", description="Most tokens to generate.")] = 128
    min_new_tokens: Annotated[int | None, decoding("min_new_tokens")] = None
    temperature: Annotated[float | None, decoding("temperature")] = None
    top_p: Annotated[float | None, decoding("top_p", gt=0)] = None
    top_k: Annotated[int | None, decoding("top_k", ge=-1, description="-1 keeps all.")] = None
    min_p: Annotated[float | None, decoding("min_p")] = None
    frequency_penalty: Annotated[float | None, decoding("frequency_penalty")] = None
    presence_penalty: Annotated[float | None, decoding("presence_penalty")] = None
    repetition_penalty: Annotated[float | None, decoding("repetition_penalty", le=2)] = None
    stop: str | Annotated[list[str], decoding("stop", description="Texts that end the answer.")] | None = None
    stop_token_ids: Annotated[list[int] | None, decoding("stop_token_ids")] = None
    stop_regex: str | Annotated[list[str], decoding("stop_regex")] | None = None
    no_stop_trim: Annotated[bool | None, Field(description="Leave the stop text in the answer.")] = None
    ignore_eos: Annotated[bool | None, decoding("ignore_eos")] = None
    n: Annotated[int | None, decoding("n")] = None
    sampling_seed: Annotated[int | None, decoding("seed", ge=-1, description="-1 draws one.")] = None
    json_schema: Annotated[str | None, Field(description="A JSON schema, as text.")] = None
    regex: Annotated[str | None, decoding("regex")] = None
    ebnf: Annotated[str | None, Field(description="A grammar in GBNF with a rule named root.")] = None
    skip_special_tokens: Annotated[Literal[True] | None, Field(description="Texts hold no control tokens.")] = None
    spaces_between_special_tokens: Annotated[Literal[True] | None, Field(description="Texts hold none of them.")] = None
    logit_bias: dict[str, float] | None = None
    structural_tag: Annotated[Any, Only()] = None
    custom_params: Annotated[Any, Only(why="no processors of the caller's own are run")] = None
    stream_interval: Annotated[Any, Only(1, why="every token is told as it comes")] = None


class SGLangRequest(Strict):
    """The body of `POST /generate` with `text` or `input_ids`."""

    text: Annotated[
        str | Annotated[list[str], Field(max_length=MOST_PROMPTS)] | None, Field(description="A prompt, or several.")
    ] = None
    input_ids: Annotated[
        list[int] | Annotated[list[list[int]], Field(max_length=MOST_PROMPTS)] | None,
        Field(description="A prompt as token ids, or several."),
    ] = None
    sampling_params: SGLangParameters | None = None
    stream: bool | None = None
    return_logprob: bool | None = None
    top_logprobs_num: Annotated[int | None, decoding("logprobs")] = None
    logprob_start_len: Annotated[Literal[-1] | None, Field(description="Prompts are scored by /score.")] = None
    return_text_in_logprobs: bool | None = None
    rid: Annotated[str | None, Field(description="A name for the request.")] = None
    input_embeds: Annotated[Any, Only(why="only text and token ids are read")] = None
    image_data: Annotated[Any, Only([], why=TEXT_ONLY)] = None
    audio_data: Annotated[Any, Only([], why=TEXT_ONLY)] = None
    video_data: Annotated[Any, Only([], why=TEXT_ONLY)] = None
    modalities: Annotated[Any, Only([], ["text"], why=TEXT_ONLY)] = None
    token_ids_logprob: Annotated[Any, Only([], why="/score tells how probable a token is")] = None
    lora_path: Annotated[Any, Only(why="an adapter is asked for by its name, as model in the other dialects")] = None
    session_params: Annotated[Any, Only(why="no sessions are kept")] = None
    custom_logit_processor: Annotated[Any, Only(why="no processors of the caller's own are run")] = None
    return_hidden_states: Annotated[Any, Only(False, why="/v1/embeddings tells a text's mean state")] = None
    background: Annotated[Any, Only(False, why="nothing is stored here")] = None
    log_metrics: Annotated[bool | None, Field(description="/metrics has them either way.")] = None
    priority: Annotated[int | None, Field(ge=-100, le=100, description="Higher ones go first.")] = None


class SGLangAnswer(BaseModel):
    """One answer; of several, a list."""

    text: str
    output_ids: list[int]
    meta_info: dict[str, Any]


class SGLangErrorContent(BaseModel):
    """What went wrong."""

    message: str


class SGLangError(BaseModel):
    """Every error's body."""

    error: SGLangErrorContent


def _error(error: TopkapiError) -> tuple[int, dict[str, Any]]:
    # A wrong field is 400 in this dialect, and a full queue 503.
    status = 503 if isinstance(error, Overloaded) else 400 if error.status == 422 else error.status
    return status, {"error": {"message": with_hint(error)}}


SGLANG = Dialect("sglang", _error, fields={"/generate": ("text", "input_ids")})

ERRORS = errors_of(SGLangError, 408, 413, 415, 500, more={
    400: "The body is not valid JSON, or a field is wrong",
    404: "No checkpoint is loaded",
    503: "The queue is full, wait Retry-After seconds; or the checkpoint is being unloaded",
})  # fmt: skip


def router(models: Models) -> Routes:
    """SGLang's route. Its requests name no checkpoint: the default one answers."""
    routes = Routes(ERRORS, tags=["SGLang"])

    @routes.answering("/generate", "SGLang: continue text", SGLangAnswer | list[SGLangAnswer], stream=STREAM)
    async def generate(request: Request, body: SGLangRequest) -> Response:
        return await respond(request, _Answer, models.get(), body)

    return routes


_SOON = 0.002
"""Seconds that an event may take without any being left out."""


def _is_listed(token_ids: Any) -> bool:
    return isinstance(token_ids, list) and bool(token_ids) and isinstance(token_ids[0], list)


def _plan(model: LoadedModel, body: SGLangRequest) -> Plan:
    given = [name for name in ("text", "input_ids") if getattr(body, name) is not None]
    if require_one(given, "text and input_ids") == "input_ids":
        prompts = prompt_tokens(model, body.input_ids, "input_ids")
    elif isinstance(body.text, list):
        if not body.text:
            raise InvalidRequest("text is empty", field="text", hint="send at least one text")
        check_count(body.text, "text")
        prompts = [raw_tokens(model, text, f"text[{position}]") for position, text in enumerate(body.text)]
    else:
        prompts = [raw_tokens(model, body.text, "text")]
    asked = body.sampling_params or SGLangParameters()
    apart_or_inert = {
        "skip_special_tokens", "spaces_between_special_tokens", "no_stop_trim", "sampling_seed", "ebnf",
        "structural_tag", "custom_params", "stream_interval",
    }  # fmt: skip
    parameters = asked.model_dump(exclude=apart_or_inert)
    parameters |= {
        # Without a stop text there is nothing to trim, as there.
        "include_stop": (asked.no_stop_trim and bool(asked.stop or asked.stop_regex)) or None,
        "seed": asked.sampling_seed,
        "grammar": lark_of(asked.ebnf, "ebnf"),
    }
    if asked.json_schema is not None:
        parameters["json_schema"] = schema_in(asked.json_schema, "sampling_params.json_schema", "json_schema")
    if body.return_logprob:
        parameters["logprobs"] = body.top_logprobs_num or 0
    with translated(parameters) as own:
        return plan(model, prompts, own)


class _Answer(Answer[Delta]):
    """Each event of a stream holds a whole answer so far, as SGLang sends it.

    So a long one takes a while to tell. Then not each token has an event, and those together take no more than half of
    the time.
    """

    dialect = SGLANG

    def __init__(self, model: LoadedModel, body: SGLangRequest) -> None:
        self._generation, self._body = Generation(_plan(model, body), body.priority or 0), body
        self._id = body.rid or new_id("sglang")
        self._started = time.monotonic()
        self._last_told: dict[int, tuple[float, float]] = {}
        super().__init__(self._generation, stream=body.stream)

    def whole(self) -> Any:
        answers = [self._of(output) for output in self._generation.outputs]
        listed = isinstance(self._body.text, list) or _is_listed(self._body.input_ids)
        return answers if listed or len(answers) > 1 else answers[0]

    def told(self, step: Delta) -> Iterator[Event]:
        outputs, output = self._generation.outputs, step.output
        last, took = self._last_told.get(output.index, (0.0, 0.0))
        began = time.monotonic()
        if step.token is not None and (took < _SOON or began - last > took * len(outputs)):
            yield self._event(output)
            ended = time.monotonic()
            self._last_told[output.index] = ended, ended - began

    def ending(self) -> Iterator[Event]:
        yield from map(self._event, self._generation.outputs)
        yield None, "[DONE]"

    def _event(self, output: CompletionOutput) -> Event:
        indexed = {"index": output.index} if len(self._generation.outputs) > 1 else {}
        # Written here, so that the time it takes is known.
        return None, text_of(self._of(output) | indexed)

    def _of(self, output: CompletionOutput) -> dict[str, Any]:
        """One answer; in a stream, all of it so far."""
        done = self._generation.completed.get(output.prompt_index)
        about: dict[str, Any] = {
            "id": self._id if len(self._generation.outputs) == 1 else f"{self._id}_{output.index}",
            "finish_reason": _finish_reason(output),
            "prompt_tokens": len(self._generation.plan.prompts[output.prompt_index]),
            "completion_tokens": len(output.tokens),
            "cached_tokens": 0 if done is None else done.cached_tokens,
            "e2e_latency": time.monotonic() - self._started,
        }
        if self._body.return_logprob:
            about["output_token_logprobs"] = [
                self._logprob(token.raw_logprob, token.token_id) for token in output.tokens
            ]
            if self._body.top_logprobs_num:
                about["output_top_logprobs"] = [self._tops(token) for token in output.tokens]
        return {
            "text": output.text,
            "output_ids": [token.token_id for token in output.tokens],
            "meta_info": about,
        }

    def _tops(self, token: Token) -> list[list[Any]]:
        top: tuple[Candidate, ...] = token.top
        return [self._logprob(each.logprob, each.token_id) for each in top]

    def _logprob(self, logprob: float | None, token_id: int) -> list[Any]:
        assert logprob is not None
        text = self._generation.plan.model.token_text(token_id) if self._body.return_text_in_logprobs else None
        return [finite(logprob), token_id, text]


def _finish_reason(output: CompletionOutput) -> dict[str, Any] | None:
    if output.finish_reason is None:
        return None
    if output.finish_reason == "length":
        return {"type": "length", "length": len(output.tokens)}
    if output.finish_reason == "stop":
        return {"type": "stop", "matched": output.stop_reason}
    raise no_answer(output)
