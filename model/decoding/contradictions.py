"""Parameters that contradict each other, cannot act, or leave nothing to choose are refused by name.

What the request itself asks for is refused. What only the checkpoint's defaults ask for gives way instead, and the
effective parameters show it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from copy import copy

import regex

from topkapi.model.decoding.table import (
    BY_NAME,
    CONSTRAINTS,
    DEFAULT_ORDER,
    PARAMETERS,
    TRUNCATIONS,
    DecodingParameters,
)
from topkapi.model.errors import InvalidRequest
from topkapi.model.nearest import nearest


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
            near = nearest(name, DEFAULT_ORDER)
            hint = f"did you mean {near!r}?" if near else f"the stages are: {', '.join(DEFAULT_ORDER)}"
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
        raise InvalidRequest(
            f"order leaves out {missing[0]!r}, which is in force",
            field="order",
            hint=f"add {missing[0]!r} to order, or switch it off",
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
