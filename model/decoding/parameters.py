"""From what a request says, and a checkpoint stores, to the effective value of every decoding parameter.

Parameters that contradict each other, cannot act, or leave nothing to choose are refused by name: what the request
itself asks for is refused, what only the checkpoint's defaults ask for gives way, and the effective parameters show it.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from copy import copy
from itertools import chain
from typing import Any

import regex

from topkapi.model.decoding.parameter import Kind, Parameter, Vocabulary, Words, bind_breakers, bind_words, check
from topkapi.model.decoding.table import (
    BY_NAME,
    CONSTRAINTS,
    DEFAULT_ORDER,
    PARAMETERS,
    SHAPE,
    TRUNCATIONS,
    DecodingParameters,
)
from topkapi.model.decoding.thinking import bind_budget
from topkapi.model.errors import CheckpointError, InvalidRequest
from topkapi.model.nearest import nearest

__all__ = [
    "BY_NAME", "CHAT_DEFAULTS", "CONSTRAINTS", "DEFAULT_ORDER", "PARAMETERS", "DecodingParameters", "Kind", "Parameter",
    "check", "check_generation_config", "check_together", "check_values", "decoding_defaults", "from_generation_config",
    "grammar_parameter", "in_force", "resolve", "unknown_parameter",
]  # fmt: skip

CHAT_DEFAULTS: dict[str, Any] = {"temperature": 0.7, "top_p": 0.9, "min_p": 0.05}
"""What a conversation is sampled with where the checkpoint says nothing (docs/LOG.md has the measurement): small
models, sampled as they are, answer what nobody would."""


def in_force(effective: DecodingParameters) -> set[str]:
    """The stages that these effective parameters ask for."""
    return {
        parameter.stage for parameter in PARAMETERS
        if parameter.stage and parameter.needs is None and effective.asks_for(parameter.name)
    }  # fmt: skip


def grammar_parameter(effective: DecodingParameters) -> str | None:
    """The parameter that asks for structured output, if one does."""
    return next((p.name for p in PARAMETERS if p.stage == "grammar" and effective.asks_for(p.name)), None)


def resolve(
    request: Mapping[str, Any],
    *defaults: Mapping[str, Any],
    vocab_size: int | None = None,
    end_token_ids: Sequence[int] = (),
    vocabulary: Vocabulary | None = None,
) -> DecodingParameters:
    """Effective value of every parameter: the request's, else the first default that has it, else the table's.

    A request value of None counts as absent. A seed is drawn where none is given, so that the answer can be had
    again. `vocabulary` (a tokenizer) reads `bad_words` and `dry_breakers` that are given as texts. A default gives
    way where the request contradicts it: mirostat in a request switches the checkpoint's own top-k off.

    Raises `InvalidRequest` naming the field for an unknown name, a wrong type, a value out of range, a parameter
    that could not act, or parameters that contradict each other.
    """

    def bind(effective: DecodingParameters) -> None:
        if effective.bad_words:
            effective.bad_words = bind_words("bad_words", effective.bad_words, vocabulary)
        if effective.dry_multiplier:
            effective.dry_breakers = bind_breakers("dry_breakers", effective.dry_breakers, vocabulary)
        if effective.thinking_budget is not None:
            effective.thinking_budget = bind_budget("thinking_budget", effective.thinking_budget, vocabulary)
        check_tokens(effective, vocab_size, end_token_ids)

    effective = _settled(request, defaults, bind)
    if not effective.asks_for("seed"):
        effective.seed = secrets.randbits(32)
    return effective


def check_together(request: Mapping[str, Any], *defaults: Mapping[str, Any], vocab_size: int | None = None) -> None:
    """Raise `InvalidRequest` as `resolve` would, as far as that can be said without a tokenizer."""
    _settled(request, defaults, lambda effective: check_tokens(effective, vocab_size, ()))


def check_values(request: Mapping[str, Any]) -> dict[str, Any]:
    """The values that are given, each in its parameter's own type.

    Raises `InvalidRequest` naming the field for an unknown name, a wrong type or a value out of range.
    """
    for name in request:
        if name not in BY_NAME:
            raise unknown_parameter(name)
    return {
        parameter.name: check(parameter, value)
        for parameter in PARAMETERS
        if (value := request.get(parameter.name)) is not None
    }


def _settled(
    request: Mapping[str, Any], defaults: Sequence[Mapping[str, Any]], bind: Callable[[DecodingParameters], None]
) -> DecodingParameters:
    """The effective parameters, less the defaults that contradict the request or one another.

    What was sent is never refused for the sake of a default that nobody sent: as few defaults as need be are left out.
    """
    given = check_values(request)
    own = {name: value for layer in reversed(defaults) for name, value in layer.items() if value is not None}
    own = {name: check(BY_NAME[name], value) for name, value in own.items() if name not in given}

    def together(kept: Mapping[str, Any]) -> DecodingParameters:
        effective = DecodingParameters(**{**kept, **given})
        settle_search(effective, given)
        settle_temperature_zero(effective, given)
        settle_mirostat(effective, given)
        settle_unneeded(effective, given)
        refuse_contradictions(effective)
        refuse_structures(effective)
        effective.order = check_order(effective.order, in_force(effective))
        bind(effective)
        return effective

    try:
        return together(own)
    except InvalidRequest as error:
        refused = error
    if not own:
        raise refused
    # The one that the error names, then any one.
    for name in sorted(own, key=lambda name: name != refused.field):
        with suppress(InvalidRequest):
            return together({other: value for other, value in own.items() if other != name})
    try:
        effective = together({})
    except InvalidRequest as error:
        # Of what was sent, not of a default that would have given way.
        raise (refused if refused.field in given and error.field not in given else error) from None
    kept: dict[str, Any] = {}
    for name, value in own.items():
        with suppress(InvalidRequest):
            effective = together(kept | {name: value})
            kept[name] = value
    return effective


def from_generation_config(generation: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults of a checkpoint's `generation_config.json` as parameters of the table.

    Other fields of it are about training or about transformers itself. `do_sample: false` means greedy decoding, as
    in transformers, where it also switches the sampling parameters off. A `top_k` of -1 keeps all, as in vLLM.
    """
    known = {row.name: row.stored or row.name for row in PARAMETERS if row.stored or row.gguf}
    found = {name: value for name, stored in known.items() if (value := generation.get(stored)) is not None}
    if found.get("top_k") == -1:
        found["top_k"] = 0
    if generation.get("do_sample") is False:
        found = {name: value for name, value in found.items() if BY_NAME[name].group != SHAPE} | {"temperature": 0.0}
    return found


def decoding_defaults(generation: Mapping[str, Any], *, chat: bool) -> dict[str, Any]:
    """The defaults that a request is answered with, by the content of `generation_config.json`.

    With `chat`, for a conversation, `CHAT_DEFAULTS` take the place of the table's where the file says nothing of how
    tokens are drawn: no temperature, no truncation, no `do_sample: false`.
    """
    stored = from_generation_config(generation)
    drawn = {"temperature", "mirostat", *TRUNCATIONS} & stored.keys()
    return stored if drawn or not chat else CHAT_DEFAULTS | stored


def check_generation_config(generation: Mapping[str, Any], vocab_size: int, where: str) -> None:
    """Raise `CheckpointError` naming the field for a stored default that no request could be answered with.

    `where` is the file it stands in. A default that only contradicts another one, or a request, is no error: it gives
    way.
    """
    for name, value in from_generation_config(generation).items():
        called = BY_NAME[name].stored or name
        try:
            checked = check(BY_NAME[name], value)
            if isinstance(checked, list):
                ids = chain(*(checked.sequences or ())) if isinstance(checked, Words) else checked
                check_tokens_exist(name, list(ids), vocab_size)
        except InvalidRequest as error:
            raise CheckpointError(
                f"{where}: {error.message.replace(name, called)}",
                field=called,
                hint="correct that default there, or take it out",
            ) from None


def unknown_parameter(name: str, known: tuple[str, ...] = ()) -> InvalidRequest:
    """The error for a field that does not exist, with the nearest one that does."""
    by_alias = {alias: parameter.name for parameter in PARAMETERS for alias in parameter.aliases}
    candidates = [*BY_NAME, *known]
    near = by_alias.get(name) or nearest(name, candidates)
    hint = f"did you mean {near!r}?" if near else f"known parameters: {', '.join(candidates)}"
    return InvalidRequest(f"unknown field {name!r}", field=name, hint=hint)


def _switch_off(effective: DecodingParameters, name: str, given: Collection[str], message: str, hint: str) -> None:
    """Refuse `name` where the request itself asks for it; switch it off where only a default does."""
    if effective.asks_for(name):
        if name in given:
            raise InvalidRequest(message, field=name, hint=hint)
        setattr(effective, name, BY_NAME[name].off)


def settle_temperature_zero(effective: DecodingParameters, given: Collection[str]) -> None:
    """At temperature 0 nothing is sampled: what only shapes sampling is refused, or off if it is a default.

    The truncations that always keep the most likely token have then done all they ever do, so they stay allowed.
    """
    if effective.temperature != 0:
        return
    for name in ("mirostat", "dynamic_temperature_range", "xtc_probability"):
        message = f"{name} can't act at temperature 0, where nothing is left to chance"
        _switch_off(effective, name, given, message, f"raise temperature or leave {name} out")
    if (effective.best_of or 0) > effective.n:
        raise InvalidRequest(
            "best_of can't act at temperature 0, where every continuation is the same",
            field="best_of",
            hint="raise temperature, or leave best_of out",
        )


def settle_search(effective: DecodingParameters, given: Collection[str]) -> None:
    """Beam and contrastive search: what they need, and what has no place in them. Both are at temperature 0."""
    beams, contrastive = effective.num_beams > 1, effective.penalty_alpha > 0
    if effective.best_of is not None and effective.best_of < effective.n:
        raise InvalidRequest(
            f"best_of ({effective.best_of}) is below n ({effective.n})", field="best_of", hint="raise best_of"
        )
    if not (beams or contrastive):
        return
    search = "num_beams" if beams else "penalty_alpha"
    apart = {*TRUNCATIONS, "dynamic_temperature_range", "mirostat", "prompt_lookup", "draft_tokens", "best_of"}
    apart |= {"guidance_scale"}
    apart |= {"penalty_alpha"} if beams else set()
    for name in sorted(apart - (set() if beams else {"top_k"})):
        if getattr(effective, name) is not None:
            message = f"{name} can't be combined with {search}"
            _switch_off(effective, name, given, message, f"leave {name} or {search} out")
    if effective.temperature != 0:
        if "temperature" in given:
            raise InvalidRequest(
                f"temperature can't be combined with {search}: a search leaves nothing to chance",
                field="temperature",
                hint=f"leave temperature out or set it to 0, or leave {search} out to sample",
            )
        effective.temperature = 0.0
    if contrastive and effective.top_k < 2:
        raise InvalidRequest(
            "penalty_alpha chooses among the top_k likeliest tokens, and top_k leaves it nothing to choose from",
            field="top_k",
            hint="set top_k to 2 or more (4 is usual)",
        )
    if beams and effective.n > effective.num_beams:
        raise InvalidRequest(
            f"n ({effective.n}) is above num_beams ({effective.num_beams})",
            field="n",
            hint="a beam search ends with as many answers as it has beams: lower n or raise num_beams",
        )
    if beams and effective.num_beams % effective.num_beam_groups:
        raise InvalidRequest(
            f"num_beams ({effective.num_beams}) can't be split into {effective.num_beam_groups} equal groups",
            field="num_beam_groups",
            hint="let num_beam_groups divide num_beams",
        )


def settle_mirostat(effective: DecodingParameters, given: Collection[str]) -> None:
    """Mirostat excludes the other truncations, as in the systems that have it."""
    if effective.mirostat == 0:
        return
    if effective.mirostat != 2:
        raise InvalidRequest(
            "mirostat is 2 (version 2) or 0 (off)", field="mirostat", hint="version 2 replaces version 1: set 2"
        )
    for name in TRUNCATIONS:
        message = f"mirostat decides itself where to cut and can't be combined with {name}"
        _switch_off(effective, name, given, message, f"leave {name} out, or set mirostat to 0")


def settle_unneeded(effective: DecodingParameters, given: Collection[str]) -> None:
    """A parameter that belongs to another one which is off."""
    for parameter in PARAMETERS:
        if parameter.needs is None or effective.asks_for(parameter.needs):
            continue
        if getattr(effective, parameter.name) != parameter.default:
            if parameter.name in given:
                raise InvalidRequest(
                    f"{parameter.name} has no effect without {parameter.needs}",
                    field=parameter.name,
                    hint=f"set {parameter.needs}, or leave {parameter.name} out",
                )
            setattr(effective, parameter.name, copy(parameter.default))


def refuse_contradictions(effective: DecodingParameters) -> None:
    """What no request can mean."""
    if effective.max_tokens is not None and effective.min_tokens > effective.max_tokens:
        raise InvalidRequest(
            f"min_tokens ({effective.min_tokens}) is above max_tokens ({effective.max_tokens})",
            field="min_tokens",
            hint="lower min_tokens or raise max_tokens",
        )
    for pattern in effective.stop_regex:
        try:
            regex.compile(pattern)
        except (regex.error, RecursionError, OverflowError) as error:
            raise InvalidRequest(
                f"stop_regex {pattern!r} is no regular expression: {error}", field="stop_regex"
            ) from None
        if _matches_nothing(pattern):
            raise InvalidRequest(
                f"stop_regex {pattern!r} matches the empty text, so the answer would end before it begins",
                field="stop_regex",
                hint="ask for at least one character, with + in place of * for example",
            )
    if effective.include_stop and not (effective.stop or effective.stop_regex):
        raise InvalidRequest(
            "include_stop has no effect without stop or stop_regex",
            field="include_stop",
            hint="give stop or stop_regex, or leave include_stop out",
        )


def _matches_nothing(pattern: str) -> bool:
    """Whether a pattern matches the empty text, which takes some patterns of nested repetitions long to find out."""
    try:
        return regex.search(pattern, "", timeout=0.1) is not None
    except TimeoutError:
        raise InvalidRequest(
            f"stop_regex {pattern!r} takes too long to search for", field="stop_regex", hint="avoid nested repetitions"
        ) from None


def refuse_structures(effective: DecodingParameters) -> None:
    """Two structures at once, thinking in one, or no choice at all.

    What else is wrong with one shows when it is compiled.
    """
    asked = [p.name for p in PARAMETERS if p.stage == "grammar" and effective.asks_for(p.name)]
    if len(asked) > 1:
        raise InvalidRequest(
            f"{asked[1]} can't be combined with {asked[0]}: an answer follows one structure",
            field=asked[1],
            hint="leave one of them out",
        )
    if asked and effective.thinking_budget is not None:
        raise InvalidRequest(
            f"thinking_budget can't be combined with {asked[0]}: an answer of that form has no place for thinking",
            field="thinking_budget",
            hint="leave one of them out",
        )
    if effective.choice is not None and not effective.choice:
        raise InvalidRequest("choice is empty, so there is nothing to answer", field="choice", hint="name at least one")


def check_order(order: Sequence[str] | None, in_force: Collection[str]) -> list[str]:
    """The complete order: the constraints, then the stages as the request names them."""
    if order is None:
        return list(DEFAULT_ORDER)
    for position, name in enumerate(order):
        if name not in DEFAULT_ORDER:
            several, near = re.findall(r"[^\s,;]+", name), nearest(name, DEFAULT_ORDER)
            hint = f"did you mean {near!r}?" if near else f"the stages are: {', '.join(DEFAULT_ORDER)}"
            if len(several) > 1:
                hint = f"name each stage by itself: {json.dumps(several)}, or --order once for each"
            raise InvalidRequest(f"order names {name!r}, which is not a stage", field="order", hint=hint)
        if name in order[:position]:
            raise InvalidRequest(f"order names {name!r} twice", field="order", hint="name each stage once")
        if name in CONSTRAINTS and any(earlier not in CONSTRAINTS for earlier in order[:position]):
            raise InvalidRequest(
                f"order puts {name!r} after {order[position - 1]!r}, but what may be chosen at all is settled first",
                field="order",
                hint=f"leave {name!r} out of order, or name it first",
            )
    missing = [name for name in DEFAULT_ORDER if name in in_force and name not in CONSTRAINTS and name not in order]
    if missing:
        named, (are, them) = " and ".join(map(repr, missing)), ("is", "it") if len(missing) == 1 else ("are", "them")
        raise InvalidRequest(
            f"order leaves out {named}, which {are} in force",
            field="order",
            hint=f"add {named} to order, or switch {them} off",
        )
    return [*CONSTRAINTS, *(name for name in order if name not in CONSTRAINTS)]


def check_tokens(effective: DecodingParameters, vocab_size: int | None, end_token_ids: Sequence[int]) -> None:
    """Token ids exist, and at least one is left that may be chosen."""
    allowed = effective.allowed_token_ids
    if allowed is not None and not allowed:
        raise InvalidRequest(
            "allowed_token_ids is empty, so no token could be chosen",
            field="allowed_token_ids",
            hint="name at least one token id, or leave allowed_token_ids out",
        )
    if vocab_size is not None:
        for name in ("logit_bias", "stop_token_ids", "allowed_token_ids", "banned_token_ids"):
            check_tokens_exist(name, getattr(effective, name) or (), vocab_size)
        if not isinstance(effective.negative_prompt, str):
            check_tokens_exist("negative_prompt", effective.negative_prompt or (), vocab_size)
        for name, words in (("bad_words", effective.bad_words), ("dry_breakers", effective.dry_breakers)):
            for sequence in words.sequences or ():
                check_tokens_exist(name, sequence, vocab_size)
    bad = [sequence[0] for sequence in effective.bad_words.sequences or () if len(sequence) == 1]
    ends = [*end_token_ids, *effective.stop_token_ids]
    if allowed is None and (vocab_size is None or len(effective.banned_token_ids) + len(bad + ends) < vocab_size):
        return
    possible = set(range(vocab_size or 0) if allowed is None else allowed)
    for name, ruled_out in (("banned_token_ids", effective.banned_token_ids), ("bad_words", bad)):
        possible.difference_update(ruled_out)
        if not possible:
            raise InvalidRequest(
                f"{name} rules out every token that may be chosen", field=name, hint=f"name fewer tokens in {name}"
            )
    if effective.min_tokens > 0 and possible <= set(ends):
        raise InvalidRequest(
            "before min_tokens no token that ends the answer can be chosen, and no other one may be",
            field="min_tokens",
            hint="lower min_tokens to 0, or allow other tokens",
        )


def check_tokens_exist(name: str, token_ids: Collection[int], vocab_size: int) -> None:
    """Raise `InvalidRequest` for an id among those of the parameter `name` that the vocabulary does not have."""
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise InvalidRequest(
                f"{name} names token id {token_id}, but the vocabulary has ids 0 to {vocab_size - 1}", field=name
            )
