"""llama.cpp's sampling parameters as ours, and ours as its `generation_settings`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from topkapi.model.decoding.gbnf import lark_of
from topkapi.model.decoding.table import LONGEST_WORD, MOST_IDS, DecodingParameters
from topkapi.model.errors import InvalidRequest
from topkapi.service.api.llama.schemas import LlamaRequest
from topkapi.service.models import LoadedModel

DEFAULTS: dict[str, Any] = {
    "temperature": 0.8, "dynatemp_range": 0.0, "dynatemp_exponent": 1.0, "top_k": 40, "top_p": 0.95, "min_p": 0.05,
    "top_n_sigma": -1.0, "xtc_probability": 0.0, "xtc_threshold": 0.1, "typical_p": 1.0, "repeat_last_n": 64,
    "repeat_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "dry_multiplier": 0.0, "dry_base": 1.75,
    "dry_allowed_length": 2, "dry_penalty_last_n": -1, "dry_sequence_breakers": ["\n", ":", '"', "*"], "mirostat": 0,
    "mirostat_tau": 5.0, "mirostat_eta": 0.1, "n_predict": -1, "seed": -1, "stop": [], "ignore_eos": False,
    "n_probs": 0, "n_keep": 0, "n_discard": 0, "min_keep": 0, "stream": False, "post_sampling_probs": False,
    "timings_per_token": False, "t_max_predict_ms": 0, "grammar": "", "lora": [],
}  # fmt: skip
"""What llama.cpp takes where a request says nothing; a checkpoint's generation_config.json has no say there."""

SAMPLERS: dict[str, tuple[str, ...]] = {
    "penalties": ("repetition_penalty", "count_penalties"), "dry": ("dry",), "top_n_sigma": ("top_n_sigma",),
    "top_k": ("top_k",), "typ_p": ("typical_p",), "top_p": ("top_p",), "min_p": ("min_p",), "xtc": ("xtc",),
    "temperature": ("temperature",),
}  # fmt: skip
"""llama.cpp's samplers in its default order, and our stages for each."""

LETTERS = {"e": "penalties", "d": "dry", "s": "top_n_sigma", "k": "top_k", "y": "typ_p", "p": "top_p", "m": "min_p",
           "x": "xtc", "t": "temperature"}  # fmt: skip
OTHER_NAMES = {"typical_p": "typ_p", "temp": "temperature", "top-k": "top_k", "top-p": "top_p", "min-p": "min_p",
               "typical": "typ_p", "typ-p": "typ_p", "top-n-sigma": "top_n_sigma"}  # fmt: skip

# What a sampler that is left out would have done.
OFF: dict[str, dict[str, Any]] = {
    "penalties": {"repeat_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0},
    "dry": {"dry_multiplier": 0.0}, "top_n_sigma": {"top_n_sigma": -1.0}, "top_k": {"top_k": 0},
    "typ_p": {"typical_p": 1.0}, "top_p": {"top_p": 1.0}, "min_p": {"min_p": 0.0}, "xtc": {"xtc_probability": 0.0},
    "temperature": {"temperature": 1.0, "dynatemp_range": 0.0},
}  # fmt: skip


def settings_of(body: LlamaRequest) -> dict[str, Any]:
    """Every parameter of llama.cpp that is in force, under its name there. Raises `InvalidRequest` for samplers."""
    given = {name: value for name in DEFAULTS if (value := getattr(body, name)) is not None}
    settings = DEFAULTS | given
    settings["samplers"] = _samplers(body.samplers)
    if body.n_predict is not None and body.max_tokens is not None:
        message = "max_tokens and n_predict are two names of one parameter"
        raise InvalidRequest(message, field="max_tokens", hint="send one of them")
    if body.max_tokens is not None:
        settings["n_predict"] = body.max_tokens
    if isinstance(settings["stop"], str):
        settings["stop"] = [settings["stop"]]
    for name, off in OFF.items():
        if name not in settings["samplers"] and not settings["mirostat"]:
            settings |= off
    return settings


def parameters_of(model: LoadedModel, body: LlamaRequest, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Our parameters for `settings`, under llama.cpp's names where ours has such an alias, for `translated`."""
    bias, banned = _biases(model, body.logit_bias)
    if settings["ignore_eos"]:
        # As llama.cpp does it: end tokens are never chosen.
        banned += [token_id for token_id in model.checkpoint.config.end_token_ids if token_id not in banned]
    parameters: dict[str, Any] = {
        "n_predict": None if settings["n_predict"] < 0 else settings["n_predict"],
        "n": body.n_cmpl,
        "seed": None if settings["seed"] < 0 else settings["seed"],
        "stop": settings["stop"],
        "timeout_s": settings["t_max_predict_ms"] / 1000 or None,
        "temperature": max(settings["temperature"], 0.0),
        "logit_bias": bias,
        "banned_token_ids": banned,
        "grammar": lark_of(body.grammar),
        "json_schema": body.json_schema,
        "logprobs": settings["n_probs"] or None,
        "trace": bool(settings["n_probs"] and settings["post_sampling_probs"]),
        "repeat_penalty": settings["repeat_penalty"] if settings["repeat_last_n"] else 1.0,
        "presence_penalty": settings["presence_penalty"],
        "frequency_penalty": settings["frequency_penalty"],
    }
    if parameters["repeat_penalty"] != 1.0:
        parameters["repeat_last_n"] = settings["repeat_last_n"]
    if settings["dry_multiplier"] and settings["dry_base"] >= 1 and settings["dry_penalty_last_n"]:
        parameters |= {name: settings[name] for name in ("dry_multiplier", "dry_base", "dry_allowed_length")}
        parameters["dry_penalty_last_n"] = settings["dry_penalty_last_n"]
        parameters["dry_sequence_breakers"] = settings["dry_sequence_breakers"]
    dynamic = bool(settings["dynatemp_range"])
    parameters |= {name: settings[name] for name in ("dynatemp_range", "dynatemp_exponent") if dynamic}
    if settings["mirostat"]:
        # Mirostat decides itself where to cut, so llama.cpp's defaults for the others give way; what was sent does not.
        parameters |= {name: settings[name] for name in ("mirostat", "mirostat_tau", "mirostat_eta")}
        truncations = ("top_k", "top_p", "min_p", "typical_p", "top_n_sigma", "xtc_probability")
        return parameters | {name: value for name in truncations if (value := getattr(body, name)) is not None}
    parameters |= {
        "mirostat": 0,
        "top_k": max(settings["top_k"], 0),
        "top_p": min(settings["top_p"], 1.0),
        "min_p": max(settings["min_p"], 0.0),
        "typical_p": min(settings["typical_p"], 1.0),
        "top_n_sigma": max(settings["top_n_sigma"], 0.0),
    }
    if settings["xtc_probability"] and settings["xtc_threshold"] <= 0.5:
        parameters |= {name: settings[name] for name in ("xtc_probability", "xtc_threshold")}
    stages = [stage for sampler in settings["samplers"] for stage in SAMPLERS[sampler]]
    # A greedy choice is the likeliest of what is left, whether a temperature is named or not.
    parameters["order"] = ["logit_bias", *stages, *([] if "temperature" in stages else ["temperature"])]
    return parameters


def generation_settings(
    model: LoadedModel, settings: Mapping[str, Any], effective: DecodingParameters
) -> dict[str, Any]:
    """What `/completion` says was in force: `settings`, with what has been decided since."""
    shown = {name: value for name, value in settings.items() if name != "seed"}
    bias: list[dict[str, Any]] = [
        {"token": token_id, "bias": number} for token_id, number in effective.logit_bias.items()
    ]
    # JSON has no minus infinity; llama.cpp sends null.
    bias += [{"token": token_id, "bias": None} for token_id in effective.banned_token_ids]
    return shown | {
        "seed": effective.seed,
        "max_tokens": settings["n_predict"],
        "logit_bias": bias,
        "order": effective.order,
        "n_ctx": model.context_length,
        "model": model.name,
    }


def _samplers(names: Sequence[str] | str | None) -> list[str]:
    if names is None:
        return list(SAMPLERS)
    if isinstance(names, str):
        unknown = next((letter for letter in names if letter not in LETTERS), None)
        if unknown is not None:
            known = ", ".join(f"{letter} {name}" for letter, name in LETTERS.items())
            raise InvalidRequest(f"samplers: {unknown!r} stands for no sampler", field="samplers", hint=known)
        names = [LETTERS[letter] for letter in names]
    found = [OTHER_NAMES.get(name, name) for name in names]
    for position, name in enumerate(found):
        if name not in SAMPLERS:
            hint = f"the samplers are {', '.join(SAMPLERS)}"
            raise InvalidRequest(f"samplers: there is no sampler {name!r}", field="samplers", hint=hint)
        if name in found[:position]:
            raise InvalidRequest(f"samplers names {name!r} twice", field="samplers", hint="name each sampler once")
    return found


def _sum(one: float, other: float) -> float:
    try:
        return one + other
    except OverflowError:  # of a whole number that no float holds
        return math.inf


def _biases(model: LoadedModel, given: Any) -> tuple[dict[int, float], list[int]]:
    """Numbers by token id, and the ids that are never to be chosen (a bias of false)."""
    wrong = "logit_bias must be a list of [token id or text, number or false], or an object from those to numbers"
    if given is None:
        return {}, []
    if isinstance(given, list | dict) and len(given) > MOST_IDS:
        raise InvalidRequest(f"logit_bias has {len(given):,} entries, and {MOST_IDS:,} is the most", field="logit_bias")
    if isinstance(given, dict):
        pairs: list[Any] = [
            [int(key) if key.isascii() and key.isdecimal() and len(key) < 16 else key, value]
            for key, value in given.items()
        ]
    else:
        pairs = given
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise InvalidRequest(wrong, field="logit_bias")
    bias: dict[int, float] = {}
    banned: list[int] = []
    for token, number in pairs:
        if (
            isinstance(token, bool)
            or not isinstance(token, int | str)
            or not (number is False or (isinstance(number, int | float) and not isinstance(number, bool)))
        ):
            raise InvalidRequest(wrong, field="logit_bias")
        if token == "":
            raise InvalidRequest("logit_bias: an empty text has no token", field="logit_bias")
        if isinstance(token, str) and len(token) > LONGEST_WORD:
            message = f"logit_bias: a text has {len(token):,} characters, and {LONGEST_WORD} is the most"
            raise InvalidRequest(message, field="logit_bias")
        # A text counts once for each of its tokens, however often it has one.
        for token_id in [token] if isinstance(token, int) else set(model.checkpoint.tokenizer.encode(token)):
            if number is False:
                banned.append(token_id)
            else:
                # As llama.cpp adds every entry, a token that several name has their sum.
                bias[token_id] = _sum(bias.get(token_id, 0), number)
    return bias, banned
