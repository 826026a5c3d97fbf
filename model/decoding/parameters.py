"""From what a request says to the effective value of every decoding parameter."""

from __future__ import annotations

import difflib
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from model.decoding.contradictions import (
    check_order,
    check_tokens,
    refuse_contradictions,
    refuse_structures,
    settle_mirostat,
    settle_search,
    settle_temperature_zero,
    settle_unneeded,
)
from model.decoding.parameter import Kind, Parameter, check
from model.decoding.table import BY_NAME, CONSTRAINTS, DEFAULT_ORDER, PARAMETERS
from model.decoding.words import Vocabulary, bind_breakers, bind_words
from model.errors import InvalidRequest

__all__ = [
    "BY_NAME", "CONSTRAINTS", "DEFAULT_ORDER", "PARAMETERS", "Kind", "Parameter", "check", "from_generation_config",
    "grammar_parameter", "in_force", "resolve", "unknown_parameter",
]  # fmt: skip


def in_force(effective: Mapping[str, Any]) -> set[str]:
    """The stages that these effective parameters ask for."""
    return {
        parameter.stage for parameter in PARAMETERS
        if parameter.stage and parameter.needs is None and effective[parameter.name] != parameter.off
    }  # fmt: skip


def grammar_parameter(effective: Mapping[str, Any]) -> str | None:
    """The parameter that asks for structured output, if one does."""
    names = (p.name for p in PARAMETERS if p.stage == "grammar" and effective[p.name] != p.off)
    return next(names, None)


def resolve(
    request: Mapping[str, Any],
    *defaults: Mapping[str, Any],
    vocab_size: int | None = None,
    end_token_ids: Sequence[int] = (),
    vocabulary: Vocabulary | None = None,
) -> dict[str, Any]:
    """Effective value of every parameter: the request's, else the first default that has it, else the table's.

    A request value of None counts as absent. A seed is drawn where none is given, so that the answer can be had
    again. `vocabulary` (a tokenizer) reads `bad_words` and `dry_breakers` that are given as texts. A default gives
    way where the request contradicts it: mirostat in a request switches the checkpoint's own top-k off.

    Raises `InvalidRequest` naming the field for an unknown name, a wrong type, a value out of range, a parameter
    that could not act, or parameters that contradict each other.
    """
    for name in request:
        if name not in BY_NAME:
            raise unknown_parameter(name)
    given = {name for name, value in request.items() if value is not None}
    effective: dict[str, Any] = {}
    for parameter in PARAMETERS:
        layers = (request, *defaults, {parameter.name: parameter.default})
        value = next((v for layer in layers if (v := layer.get(parameter.name)) is not None), None)
        effective[parameter.name] = None if value is None else check(parameter, value)
    if effective["seed"] is None:
        effective["seed"] = secrets.randbits(32)
    settle_search(effective, given, BY_NAME)
    settle_temperature_zero(effective, given, BY_NAME)
    settle_mirostat(effective, given, BY_NAME)
    settle_unneeded(effective, given, BY_NAME)
    refuse_contradictions(effective)
    refuse_structures(effective, BY_NAME)
    effective["order"] = check_order(effective["order"], in_force(effective), DEFAULT_ORDER, CONSTRAINTS)
    if effective["bad_words"]:
        effective["bad_words"] = bind_words("bad_words", effective["bad_words"], vocabulary)
    if effective["dry_multiplier"]:
        effective["dry_breakers"] = bind_breakers("dry_breakers", effective["dry_breakers"], vocabulary)
    check_tokens(effective, vocab_size, end_token_ids)
    return effective


def from_generation_config(generation: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults of a checkpoint's `generation_config.json` as parameters of the table.

    Other fields of it are about training or about transformers itself. `do_sample: false` means greedy decoding, as
    in transformers, where it also switches the sampling parameters off.
    """
    sampling: tuple[str, ...] = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
    # What GGUF files recommend beyond that.
    sampling += ("xtc_probability", "xtc_threshold", "mirostat", "mirostat_tau", "mirostat_eta")
    renamed = {
        "max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens", "banned_token_ids": "suppress_tokens",
        "bad_words": "bad_words_ids",
    }  # fmt: skip
    always = ("repetition_penalty", "repetition_range", "no_repeat_ngram_size", *renamed)
    found = {name: generation.get(renamed.get(name, name)) for name in (*sampling, *always)}
    found = {name: value for name, value in found.items() if value is not None}
    if generation.get("do_sample") is False:
        found = {name: value for name, value in found.items() if name in always} | {"temperature": 0.0}
    return found


def unknown_parameter(name: str, known: tuple[str, ...] = ()) -> InvalidRequest:
    """The error for a field that does not exist, with the nearest one that does."""
    by_alias = {alias: parameter.name for parameter in PARAMETERS for alias in parameter.aliases}
    candidates = [*BY_NAME, *known]
    near = [by_alias[name]] if name in by_alias else difflib.get_close_matches(name, candidates, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"known parameters: {', '.join(candidates)}"
    return InvalidRequest(f"unknown field {name!r}", field=name, hint=hint)
