"""The one table of decoding parameters; schemas, flags, sliders, documentation and messages are made from it.

A parameter is said here and nowhere else: its name, type, range, the value that switches it off, its default, what
it means and whom it follows.
"""

from __future__ import annotations

import difflib
import secrets
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from model.errors import InvalidRequest

Kind = Literal["integer", "number", "boolean", "strings", "integers", "integer_to_number"]


@dataclass(frozen=True)
class Parameter:
    """One decoding parameter. `off` makes it do nothing; a default of None means that each request decides."""

    name: str
    kind: Kind
    default: Any
    off: Any
    meaning: str
    source: str
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    slider: tuple[float, float, float] | None = None
    aliases: tuple[str, ...] = ()


PARAMETERS: tuple[Parameter, ...] = (
    Parameter(
        "max_tokens", "integer", None, None,
        "Most tokens to generate; by default what the context has room for.",
        "OpenAI API", minimum=0, aliases=("max_new_tokens", "n_predict", "max_completion_tokens"),
    ),
    Parameter(
        "min_tokens", "integer", 0, 0,
        "End tokens and stop tokens can't be chosen before this many tokens.",
        "vLLM", minimum=0, aliases=("min_new_tokens",),
    ),
    Parameter(
        "temperature", "number", 1.0, 1.0,
        "Divides the logits: below 1 sharper, above 1 flatter; 0 always takes the most likely token.",
        "Ackley et al. 1985", minimum=0, slider=(0.0, 2.0, 0.05),
    ),
    Parameter(
        "top_k", "integer", 0, 0,
        "Keep only the k most likely tokens (ties with the last are kept); 0 keeps all.",
        "Fan et al. 2018, section 5.4", minimum=0, slider=(0, 200, 1),
    ),
    Parameter(
        "top_p", "number", 1.0, 1.0,
        "Keep the smallest set of most likely tokens whose probability reaches p; 1 keeps all.",
        "Holtzman et al. 2019, section 3.1", minimum=0, maximum=1, slider=(0.0, 1.0, 0.01),
    ),
    Parameter(
        "min_p", "number", 0.0, 0.0,
        "Keep tokens at least this fraction as likely as the most likely one; 0 keeps all.",
        "Nguyen et al. 2024, section 3", minimum=0, maximum=1, slider=(0.0, 1.0, 0.01),
    ),
    Parameter(
        "repetition_penalty", "number", 1.0, 1.0,
        "Divides positive and multiplies negative logits of tokens already in prompt or answer; 1 does nothing.",
        "Keskar et al. 2019, section 4.1", above=0, slider=(0.5, 2.0, 0.01), aliases=("repeat_penalty",),
    ),
    Parameter(
        "presence_penalty", "number", 0.0, 0.0,
        "Subtracted once from the logit of every token already generated.",
        "OpenAI API", minimum=-2, maximum=2, slider=(-2.0, 2.0, 0.05),
    ),
    Parameter(
        "frequency_penalty", "number", 0.0, 0.0,
        "Subtracted from a token's logit for each time it was generated.",
        "OpenAI API", minimum=-2, maximum=2, slider=(-2.0, 2.0, 0.05),
    ),
    Parameter(
        "logit_bias", "integer_to_number", {}, {},
        "Added to the logits of these token ids, between -100 and 100 each.",
        "OpenAI API", minimum=-100, maximum=100,
    ),
    Parameter(
        "seed", "integer", None, None,
        "The same request with the same seed gives the same tokens; by default one is drawn and reported.",
        "DESIGN: noise is a function", minimum=0, maximum=2**53 - 1,
    ),
    Parameter(
        "n", "integer", 1, 1,
        "Number of continuations of each prompt.",
        "OpenAI API", minimum=1, maximum=128,
    ),
    Parameter(
        "stop", "strings", [], [],
        "Texts that end the answer; they are not part of it.",
        "OpenAI API", aliases=("stop_sequences",),
    ),
    Parameter(
        "stop_token_ids", "integers", [], [],
        "Token ids that end the answer, beside the checkpoint's own end tokens.",
        "vLLM",
    ),
    Parameter(
        "ignore_end_token", "boolean", False, False,
        "Go on past the checkpoint's end tokens.",
        "vLLM", aliases=("ignore_eos",),
    ),
    Parameter(
        "logprobs", "integer", None, None,
        "Report each token's log-probabilities and those of this many most likely tokens.",
        "OpenAI API", minimum=0, maximum=1000,
    ),
)  # fmt: skip

BY_NAME: dict[str, Parameter] = {parameter.name: parameter for parameter in PARAMETERS}


def resolve(request: Mapping[str, Any], *defaults: Mapping[str, Any], vocab_size: int | None = None) -> dict[str, Any]:
    """Effective value of every parameter: the request's, else the first default that has it, else the table's.

    A request value of None counts as absent. A seed is drawn where none is given, so that the answer can be had
    again. Raises `InvalidRequest` naming the field for an unknown name, a wrong type, a value out of range, or
    parameters that contradict each other.
    """
    for name in request:
        if name not in BY_NAME:
            raise unknown_parameter(name)
    effective: dict[str, Any] = {}
    for parameter in PARAMETERS:
        layers = (request, *defaults, {parameter.name: parameter.default})
        value = next((v for layer in layers if (v := layer.get(parameter.name)) is not None), None)
        effective[parameter.name] = None if value is None else check(parameter, value)
    if effective["seed"] is None:
        effective["seed"] = secrets.randbits(32)
    if effective["max_tokens"] is not None and effective["min_tokens"] > effective["max_tokens"]:
        raise InvalidRequest(
            f"min_tokens ({effective['min_tokens']}) is above max_tokens ({effective['max_tokens']})",
            field="min_tokens",
            hint="lower min_tokens or raise max_tokens",
        )
    if vocab_size is not None:
        _check_token_ids(effective, vocab_size)
    return effective


def from_generation_config(generation: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults of a checkpoint's `generation_config.json` as parameters of the table.

    Other fields of it are about training or about transformers itself. `do_sample: false` means greedy decoding, as
    in transformers, where it also switches the sampling parameters off.
    """
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    found = {name: generation[name] for name in names if generation.get(name) is not None}
    if generation.get("max_new_tokens") is not None:
        found["max_tokens"] = generation["max_new_tokens"]
    if generation.get("do_sample") is False:
        found = {k: v for k, v in found.items() if k in ("repetition_penalty", "max_tokens")} | {"temperature": 0.0}
    return found


def unknown_parameter(name: str, known: tuple[str, ...] = ()) -> InvalidRequest:
    """The error for a field that does not exist, with the nearest one that does."""
    by_alias = {alias: parameter.name for parameter in PARAMETERS for alias in parameter.aliases}
    candidates = [*BY_NAME, *known]
    near = [by_alias[name]] if name in by_alias else difflib.get_close_matches(name, candidates, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"known parameters: {', '.join(candidates)}"
    return InvalidRequest(f"unknown field {name!r}", field=name, hint=hint)


def check(parameter: Parameter, value: Any) -> Any:
    """`value` in the parameter's own type. Raises `InvalidRequest` naming the parameter."""
    name, kind = parameter.name, parameter.kind
    if kind == "integer":
        return int(_in_range(parameter, _integer(name, value)))
    if kind == "number":
        return float(_in_range(parameter, _number(name, value)))
    if kind == "boolean":
        if not isinstance(value, bool):
            raise InvalidRequest(f"{name} must be true or false, not {value!r}", field=name)
        return value
    if kind == "strings":
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list | tuple) or not all(isinstance(item, str) and item for item in items):
            raise InvalidRequest(f"{name} must be a text or a list of texts, none of them empty", field=name)
        return list(items)
    if kind == "integers":
        if not isinstance(value, list | tuple):
            raise InvalidRequest(f"{name} must be a list of token ids", field=name)
        return [_integer(name, item) for item in value]
    if not isinstance(value, Mapping):
        raise InvalidRequest(f"{name} must map token ids to numbers", field=name)
    try:
        return {int(key): float(_in_range(parameter, _number(name, number))) for key, number in value.items()}
    except (TypeError, ValueError):
        raise InvalidRequest(f"{name} must map token ids to numbers", field=name) from None


def _integer(name: str, value: Any) -> int:
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) or not whole:
        raise InvalidRequest(f"{name} must be a whole number, not {value!r}", field=name)
    return int(value)


def _number(name: str, value: Any) -> float:
    # Compared, not passed to math.isfinite: JSON has integers that no float can hold.
    finite = isinstance(value, int | float) and abs(value) <= sys.float_info.max
    if isinstance(value, bool) or not finite:
        raise InvalidRequest(f"{name} must be a finite number, not {value!r}", field=name)
    return float(value)


def _in_range(parameter: Parameter, value: float) -> float:
    name = parameter.name
    shown = f"{value:g}" if abs(value) < 2**53 else str(value)
    off = f" ({parameter.off:g} means off)" if isinstance(parameter.off, int | float) else ""
    if parameter.minimum is not None and value < parameter.minimum:
        raise InvalidRequest(f"{name} must be at least {parameter.minimum:g}{off}, not {shown}", field=name)
    if parameter.maximum is not None and value > parameter.maximum:
        raise InvalidRequest(f"{name} must be at most {parameter.maximum:g}{off}, not {shown}", field=name)
    if parameter.above is not None and value <= parameter.above:
        raise InvalidRequest(f"{name} must be above {parameter.above:g}{off}, not {shown}", field=name)
    return value


def _check_token_ids(effective: Mapping[str, Any], vocab_size: int) -> None:
    for name in ("logit_bias", "stop_token_ids"):
        for token_id in effective[name]:
            if not 0 <= token_id < vocab_size:
                raise InvalidRequest(
                    f"{name} names token id {token_id}, but the vocabulary has ids 0 to {vocab_size - 1}", field=name
                )
