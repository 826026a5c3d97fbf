"""The one table of decoding parameters; schemas, flags, sliders, documentation and messages are made from it.

A parameter is said here and nowhere else: its name, type, range, the value that switches it off, its default, what
it means and whom it follows.
"""

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
    settle_temperature_zero,
    settle_unneeded,
)
from model.decoding.parameter import Kind, Parameter, check
from model.decoding.words import Vocabulary, bind_breakers, bind_words
from model.errors import InvalidRequest

__all__ = [
    "BY_NAME", "CONSTRAINTS", "DEFAULT_ORDER", "PARAMETERS", "Kind", "Parameter", "check", "from_generation_config",
    "grammar_parameter", "in_force", "resolve", "unknown_parameter",
]  # fmt: skip

PARAMETERS: tuple[Parameter, ...] = (
    Parameter(
        "max_tokens", "integer", None, None,
        "Most tokens to generate; by default what the context has room for.",
        "OpenAI API", minimum=0, aliases=("max_new_tokens", "n_predict", "max_completion_tokens"),
    ),
    Parameter(
        "min_tokens", "integer", 0, 0,
        "End tokens and stop tokens can't be chosen before this many tokens.",
        "vLLM", minimum=0, aliases=("min_new_tokens",), stage="min_tokens",
    ),
    Parameter(
        "timeout_s", "number", None, None,
        "Seconds after which the answer ends as it stands, with finish reason `deadline`.",
        "Topkapi", above=0, aliases=("timeout", "max_time"),
    ),
    Parameter(
        "temperature", "number", 1.0, 1.0,
        "Divides the logits: below 1 sharper, above 1 flatter; 0 always takes the most likely token that is left.",
        "Ackley et al. 1985", minimum=0, slider=(0.0, 2.0, 0.05), stage="temperature",
    ),
    Parameter(
        "dynamic_temperature_range", "number", 0.0, 0.0,
        "Lets the temperature move this far down where the network is certain and up where it is not; 0 fixes it.",
        "llama.cpp (dynatemp), after kalomaze 2023", minimum=0, slider=(0.0, 2.0, 0.05),
        aliases=("dynatemp_range",), stage="temperature",
    ),
    Parameter(
        "dynamic_temperature_exponent", "number", 1.0, 1.0,
        "Power applied to the normalised entropy (0 to 1) that places the temperature within its range.",
        "llama.cpp (dynatemp), after kalomaze 2023", above=0, slider=(0.1, 4.0, 0.1),
        aliases=("dynatemp_exponent",), stage="temperature", needs="dynamic_temperature_range",
    ),
    Parameter(
        "top_k", "integer", 0, 0,
        "Keep only the k most likely tokens (ties with the last are kept); 0 keeps all.",
        "Fan et al. 2018, section 5.4", minimum=0, slider=(0, 200, 1), stage="top_k",
    ),
    Parameter(
        "top_p", "number", 1.0, 1.0,
        "Keep the smallest set of most likely tokens whose probability reaches p (ties with the last are kept); "
        "1 keeps all.",
        "Holtzman et al. 2019, section 3.1", minimum=0, maximum=1, slider=(0.0, 1.0, 0.01), stage="top_p",
    ),
    Parameter(
        "min_p", "number", 0.0, 0.0,
        "Keep tokens at least this fraction as likely as the most likely one; 0 keeps all.",
        "Nguyen et al. 2024, section 3", minimum=0, maximum=1, slider=(0.0, 1.0, 0.01), stage="min_p",
    ),
    Parameter(
        "typical_p", "number", 1.0, 1.0,
        "Keep the tokens whose information is nearest to the entropy until their probability reaches p (ties are "
        "kept); 1 keeps all. It can remove the most likely token.",
        "Meister et al. 2022, section 4", minimum=0, maximum=1, slider=(0.0, 1.0, 0.01),
        aliases=("typical", "typ_p"), stage="typical_p",
    ),
    Parameter(
        "epsilon_cutoff", "number", 0.0, 0.0,
        "Keep tokens at least this probable; 0 keeps all.",
        "Hewitt et al. 2022, section 4", minimum=0, maximum=1, slider=(0.0, 0.1, 0.0005), stage="epsilon_cutoff",
    ),
    Parameter(
        "eta_cutoff", "number", 0.0, 0.0,
        "Keep tokens at least as probable as the smaller of eta and sqrt(eta) * exp(-entropy); 0 keeps all.",
        "Hewitt et al. 2022, section 4", minimum=0, maximum=1, slider=(0.0, 0.1, 0.0005), stage="eta_cutoff",
    ),
    Parameter(
        "top_n_sigma", "number", 0.0, 0.0,
        "Keep tokens whose logit is within n standard deviations of the largest; 0 keeps all.",
        "Tang et al. 2024, algorithm 1", minimum=0, slider=(0.0, 5.0, 0.1), aliases=("nsigma",), stage="top_n_sigma",
    ),
    Parameter(
        "top_a", "number", 0.0, 0.0,
        "Keep tokens at least a times as probable as the square of the largest probability; 0 keeps all.",
        "RWKV-LM (Bo Peng 2021), KoboldAI", minimum=0, maximum=1, slider=(0.0, 1.0, 0.01), stage="top_a",
    ),
    Parameter(
        "xtc_probability", "number", 0.0, 0.0,
        "Chance, at each token, that all but the least likely of the tokens above `xtc_threshold` are removed.",
        "XTC, p-e-w 2024 (text-generation-webui)", minimum=0, maximum=1, slider=(0.0, 1.0, 0.01), stage="xtc",
    ),
    Parameter(
        "xtc_threshold", "number", 0.1, None,
        "Probability from which a token counts as a top choice for XTC.",
        "XTC, p-e-w 2024 (text-generation-webui)", minimum=0, maximum=0.5, slider=(0.0, 0.5, 0.01),
        stage="xtc", needs="xtc_probability",
    ),
    Parameter(
        "mirostat", "integer", 0, 0,
        "2 holds the surprise of the text near `mirostat_tau` by feedback, in place of other truncations; 0 is off.",
        "Basu et al. 2020, version 2 as in llama.cpp", minimum=0, maximum=2, slider=(0, 2, 2), stage="mirostat",
    ),
    Parameter(
        "mirostat_tau", "number", 5.0, None,
        "Surprise that mirostat aims for, in bits per token.",
        "Basu et al. 2020", above=0, slider=(0.1, 10.0, 0.1), stage="mirostat", needs="mirostat",
    ),
    Parameter(
        "mirostat_eta", "number", 0.1, None,
        "How fast mirostat corrects its bound after each token.",
        "Basu et al. 2020", minimum=0, maximum=1, slider=(0.0, 1.0, 0.01), stage="mirostat", needs="mirostat",
    ),
    Parameter(
        "repetition_penalty", "number", 1.0, 1.0,
        "Divides positive and multiplies negative logits of tokens already in prompt or answer; 1 does nothing.",
        "Keskar et al. 2019, section 4.1", above=0, slider=(0.5, 2.0, 0.01), aliases=("repeat_penalty",),
        stage="repetition_penalty",
    ),
    Parameter(
        "repetition_range", "integer", 0, 0,
        "Only the last so many tokens count for the repetition penalty; 0 counts all.",
        "llama.cpp (repeat_last_n)", minimum=0, slider=(0, 2048, 16), aliases=("repeat_last_n",),
        stage="repetition_penalty", needs="repetition_penalty",
    ),
    Parameter(
        "presence_penalty", "number", 0.0, 0.0,
        "Subtracted once from the logit of every token already generated.",
        "OpenAI API", minimum=-2, maximum=2, slider=(-2.0, 2.0, 0.05), stage="count_penalties",
    ),
    Parameter(
        "frequency_penalty", "number", 0.0, 0.0,
        "Subtracted from a token's logit for each time it was generated.",
        "OpenAI API", minimum=-2, maximum=2, slider=(-2.0, 2.0, 0.05), stage="count_penalties",
    ),
    Parameter(
        "dry_multiplier", "number", 0.0, 0.0,
        "Subtracts multiplier * base ^ (length - allowed length) from the logit of a token that would go on with a "
        "passage of that length seen before; 0 does nothing.",
        "DRY, p-e-w 2024 (text-generation-webui), as in llama.cpp", minimum=0, slider=(0.0, 5.0, 0.05), stage="dry",
    ),
    Parameter(
        "dry_base", "number", 1.75, None,
        "Growth of the DRY penalty with each further repeated token.",
        "DRY, p-e-w 2024", minimum=1, maximum=16, slider=(1.0, 4.0, 0.05), stage="dry", needs="dry_multiplier",
    ),
    Parameter(
        "dry_allowed_length", "integer", 2, None,
        "Longest passage that may be repeated without a DRY penalty on the token after it.",
        "DRY, p-e-w 2024", minimum=1, slider=(1, 20, 1), stage="dry", needs="dry_multiplier",
    ),
    Parameter(
        "dry_range", "integer", 0, 0,
        "Only the last so many tokens are searched for repeated passages; 0 searches all.",
        "llama.cpp (dry_penalty_last_n)", minimum=0, slider=(0, 4096, 32), aliases=("dry_penalty_last_n",),
        stage="dry", needs="dry_multiplier",
    ),
    Parameter(
        "dry_breakers", "words", ["\n", ":", '"', "*"], [],
        "Texts, or lists of token ids, across which no passage is matched.",
        "DRY, p-e-w 2024", aliases=("dry_sequence_breakers",), stage="dry", needs="dry_multiplier",
    ),
    Parameter(
        "no_repeat_ngram_size", "integer", 0, 0,
        "No sequence of this many tokens appears twice in prompt and answer; 0 does nothing.",
        "Paulus et al. 2017, section 2.5", minimum=0, slider=(0, 10, 1), stage="no_repeat_ngram_size",
    ),
    Parameter(
        "logit_bias", "integer_to_number", {}, {},
        "Added to the logits of these token ids, between -100 and 100 each.",
        "OpenAI API", minimum=-100, maximum=100, stage="logit_bias",
    ),
    Parameter(
        "allowed_token_ids", "integers", None, None,
        "Only these token ids can be chosen.",
        "vLLM", stage="allowed_token_ids",
    ),
    Parameter(
        "banned_token_ids", "integers", [], [],
        "These token ids are never chosen.",
        "transformers (suppress_tokens)", aliases=("suppress_tokens", "custom_token_bans"), stage="banned_token_ids",
    ),
    Parameter(
        "bad_words", "words", [], [],
        "Texts, or lists of token ids, that are never completed: their last token is not chosen after the others.",
        "vLLM, transformers", aliases=("bad_words_ids",), stage="bad_words",
    ),
    Parameter(
        "json_schema", "schema", None, None,
        "The answer is JSON that fulfils this schema: an object, or true or {} for any JSON.",
        "llguidance (JSON Schema 2020-12)", aliases=("guided_json", "structured_outputs"), stage="grammar",
    ),
    Parameter(
        "json_object", "boolean", False, False,
        "The answer is a JSON object.",
        "llguidance, OpenAI API (JSON mode)", stage="grammar",
    ),
    Parameter(
        "regex", "text", None, None,
        "The whole answer matches this regular expression (Rust's syntax: no look-around, no back-references).",
        "llguidance", aliases=("guided_regex",), stage="grammar",
    ),
    Parameter(
        "choice", "strings", None, None,
        "The answer is one of these texts.",
        "llguidance, vLLM", aliases=("guided_choice",), stage="grammar",
    ),
    Parameter(
        "grammar", "text", None, None,
        "The answer follows this context-free grammar, in Lark's notation with a rule named start.",
        "llguidance (Lark syntax)", aliases=("guided_grammar",), stage="grammar",
    ),
    Parameter(
        "order", "strings", None, None,
        "The stages in the order to apply them; constraints always come first. Every stage in force must be named.",
        "llama.cpp (samplers)", aliases=("samplers", "sampler_order", "sampler_priority"),
    ),
    Parameter(
        "prompt_lookup", "integer", 0, 0,
        "Guess up to so many tokens at a time from what followed the last ones before; the answer is the same, sooner.",
        "Saxena 2023; Leviathan et al. 2022", minimum=0, maximum=32, slider=(0, 32, 1),
    ),
    Parameter(
        "seed", "integer", None, None,
        "The same request with the same seed gives the same tokens; by default one is drawn and reported.",
        "Topkapi", minimum=0, maximum=2**53 - 1,
    ),
    Parameter(
        "n", "integer", 1, 1,
        "Number of continuations of each prompt.",
        "OpenAI API", minimum=1, maximum=128,
    ),
    Parameter(
        "stop", "strings", [], [],
        "Texts that end the answer; they are not part of it unless `include_stop` is set.",
        "OpenAI API", aliases=("stop_sequences",),
    ),
    Parameter(
        "stop_regex", "strings", [], [],
        "Regular expressions that end the answer at the first character where one of them matches.",
        "SGLang (stop_regex)",
    ),
    Parameter(
        "include_stop", "boolean", False, False,
        "Leave the text that matched `stop` or `stop_regex` at the end of the answer.",
        "vLLM", aliases=("include_stop_str_in_output",),
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
    Parameter(
        "trace", "boolean", False, False,
        "Report how each token was decided: stages, candidates, entropy, rank, probabilities, runners-up, noise.",
        "Topkapi",
    ),
)  # fmt: skip

BY_NAME: dict[str, Parameter] = {parameter.name: parameter for parameter in PARAMETERS}

# What may be chosen at all is settled first, in every order: after a truncation it could leave nothing.
CONSTRAINTS: tuple[str, ...] = (
    "grammar", "min_tokens", "banned_token_ids", "bad_words", "no_repeat_ngram_size", "allowed_token_ids",
)  # fmt: skip

# What changes single logits, then temperature, then what cuts the tail, as in transformers.
DEFAULT_ORDER: tuple[str, ...] = (
    *CONSTRAINTS,
    "logit_bias", "repetition_penalty", "count_penalties", "dry",
    "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_n_sigma", "top_a",
    "xtc", "mirostat",
)  # fmt: skip


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
    sampling = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
    renamed = {
        "max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens", "banned_token_ids": "suppress_tokens",
        "bad_words": "bad_words_ids",
    }  # fmt: skip
    always = ("repetition_penalty", "no_repeat_ngram_size", *renamed)
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
