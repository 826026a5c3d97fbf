"""From what a request says, and a checkpoint stores, to the effective value of every decoding parameter."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import chain
from typing import Any

from topkapi.model.decoding.contradictions import (
    check_order,
    check_tokens,
    check_tokens_exist,
    refuse_contradictions,
    refuse_structures,
    settle_mirostat,
    settle_search,
    settle_temperature_zero,
    settle_unneeded,
)
from topkapi.model.decoding.parameter import Kind, Parameter, check
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
from topkapi.model.decoding.words import Vocabulary, Words, bind_breakers, bind_words
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
        raise (refused if refused.field in given else error) from None
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
