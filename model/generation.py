"""Continuing one prompt on a cache: what training samples with, and what the engine must agree with."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from topkapi.model.cache import PREFILL_CHUNK, SlotCache, Work, read, wanted_logits
from topkapi.model.config import ModelConfig
from topkapi.model.decoding.choosing import choose
from topkapi.model.decoding.grammar import Constraint, compile_constraint
from topkapi.model.decoding.parameters import DecodingParameters, grammar_parameter, resolve
from topkapi.model.decoding.stage import Row
from topkapi.model.decoding.stopping import Stopper, check_prompt, ends_sequence, token_limit
from topkapi.model.errors import InvalidRequest
from topkapi.model.text.tokenizer import Tokenizer
from topkapi.model.transformer import Decoder


@dataclass(frozen=True)
class GenerationResult:
    """The generated ids (a final end token included), why they ended, and the token or text that ended them."""

    token_ids: list[int]
    finish_reason: Literal["stop", "length", "deadline"]
    stop_reason: str | int | None = None


@torch.inference_mode()
def generate(
    model: Decoder,
    prompt_ids: list[int],
    parameters: Mapping[str, Any] | None = None,
    *,
    stopper: Stopper | None = None,
    on_token: Callable[[int], None] | None = None,
    sequence: int = 0,
    tokenizer: Tokenizer | None = None,
) -> GenerationResult:
    """Continue `prompt_ids`; `on_token` is told each token as it comes.

    `parameters` are decoding parameters by name (those of `n` sequences are drawn by calling with each `sequence`).
    `tokenizer` is needed for what is given as text: a schema or grammar of the answer, bad words.
    Raises `InvalidRequest` for a prompt that is empty or does not fit, and for wrong parameters.
    """
    config = model.config
    effective = resolve(
        parameters or {}, vocab_size=config.vocab_size, end_token_ids=config.end_token_ids, vocabulary=tokenizer
    )
    for name in ("num_beams", "penalty_alpha", "guidance_scale", "dola_layers"):
        if effective.asks_for(name):
            raise InvalidRequest(
                f"{name} needs several sequences or states side by side", field=name, hint="ask a server: topkapi serve"
            )
    deadline = math.inf if effective.timeout_s is None else time.monotonic() + effective.timeout_s
    check_prompt(prompt_ids, config)
    tokens, limit = list(prompt_ids), token_limit(len(prompt_ids), effective, config)
    row = Row(effective, tokens, len(prompt_ids), sequence, config.end_token_ids)
    row.constraint = constraint = _constraint(effective, tokenizer, config)
    if limit == 0:
        return GenerationResult([], "length")
    cache = SlotCache(model, capacity=len(prompt_ids) + limit)
    scanner = None if model.core is None else model.core.scanner
    for start in range(0, len(prompt_ids), PREFILL_CHUNK):
        state = read(model, cache, [Work(0, start, prompt_ids[start : start + PREFILL_CHUNK])])
    while True:
        token_id = choose(wanted_logits(model, state), [row], scanner=scanner)[0].token_id
        tokens.append(token_id)
        if constraint is not None:
            constraint.advance(token_id)
        if on_token is not None:
            on_token(token_id)
        generated = tokens[len(prompt_ids) :]
        if ends_sequence(token_id, effective, config):
            return GenerationResult(generated, "stop", token_id)
        if stopper is not None:
            stopper.feed(token_id)
            if stopper.stopped is not None:
                return GenerationResult(generated, "stop", stopper.stopped)
        if constraint is not None and constraint.finished:
            return GenerationResult(generated, "stop")
        if len(generated) == limit:
            return GenerationResult(generated, "length")
        if time.monotonic() >= deadline:
            return GenerationResult(generated, "deadline")
        state = read(model, cache, [Work(0, len(tokens) - 1, [token_id])])


def _constraint(parameters: DecodingParameters, tokenizer: Tokenizer | None, config: ModelConfig) -> Constraint | None:
    field = grammar_parameter(parameters)
    if field is None:
        return None
    if tokenizer is None:
        raise InvalidRequest(f"{field} needs the checkpoint's tokenizer, and none was given", field=field)
    constraint = compile_constraint(parameters, tokenizer, config.vocab_size, config.end_token_ids)
    return None if constraint is None else constraint(0)
