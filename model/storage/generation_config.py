"""`generation_config.json`, field by field: what becomes of each, and which values it may have.

What would change an answer is either a default of `model.decoding.parameters.from_generation_config` or refused when
the checkpoint is loaded. What changes nothing here may have any value.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from topkapi.model.decoding.parameter import Parameter, check
from topkapi.model.decoding.parameters import BY_NAME, PARAMETERS
from topkapi.model.errors import CheckpointError, InvalidRequest
from topkapi.model.text.tokenizer import Tokenizer

HONOURED = {
    "do_sample": "temperature",
    "eos_token_id": "the tokens that end an answer",
    **{row.stored: row.name for row in PARAMETERS if row.stored is not None},
}
"""Fields by what they decide: a decoding parameter where they have one."""

NO_EFFECT = {
    "_from_model_config": "says where transformers had the file from",
    "assistant_confidence_threshold": "guessing ahead changes no answer",
    "assistant_early_exit": "guessing ahead changes no answer",
    "assistant_ensemble_weight": "guessing ahead changes no answer",
    "assistant_lookbehind": "guessing ahead changes no answer",
    "bos_token_id": "the tokenizer says which token begins a text",
    "cache_config": "how transformers caches",
    "cache_implementation": "how transformers caches",
    "compile_config": "how transformers compiles",
    "continuous_batching_config": "how transformers batches",
    "decoder_start_token_id": "only encoder-decoder models have it",
    "disable_compile": "how transformers compiles",
    "diversity_penalty": "acts in groups of beams, which are refused",
    "early_stopping": "acts in beam search, which is refused",
    "encoder_no_repeat_ngram_size": "only encoder-decoder models have an encoder",
    "is_assistant": "guessing ahead changes no answer",
    "length_penalty": "acts in beam search, which is refused",
    "low_memory": "how transformers searches",
    "max_cache_len": "how transformers caches",
    "max_length": "how long an answer may be is for the request to say; the context bounds it",
    "max_matching_ngram_size": "guessing ahead changes no answer",
    "num_assistant_tokens": "guessing ahead changes no answer",
    "num_assistant_tokens_schedule": "guessing ahead changes no answer",
    "output_attentions": "what transformers returns beside the answer",
    "output_hidden_states": "what transformers returns beside the answer",
    "output_logits": "what transformers returns beside the answer",
    "output_scores": "what transformers returns beside the answer",
    "pad_token_id": "no row is padded",
    "prefill_chunk_size": "how transformers computes a prompt",
    "prompt_lookup_num_tokens": "guessing ahead changes no answer",
    "remove_invalid_values": "a network that yields numbers that are none fails",
    "renormalize_logits": "probabilities always sum to one",
    "return_dict_in_generate": "what transformers returns beside the answer",
    "speculation_type": "guessing ahead changes no answer",
    "target_lookbehind": "guessing ahead changes no answer",
    "transformers_version": "says what wrote the file",
    "use_cache": "how transformers caches",
    "use_mtp": "guessing ahead changes no answer",
}
"""Fields that may have any value, and why."""

REFUSED: Mapping[str, tuple[Any, ...]] = {
    "begin_suppress_tokens": ([],),
    "constraints": ([],),
    "dola_layers": (),
    "encoder_repetition_penalty": (1.0,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1.0,),
    "max_time": (),
    "min_length": (0,),
    "num_beam_groups": (1,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0.0,),
    "sequence_bias": ({}, []),
    "stop_strings": ([], ""),
    "token_healing": (False,),
    "top_h": (1.0,),
    "watermarking_config": (),
}
"""Fields that would change an answer and are no defaults here, with the values beside null that change nothing."""

_IDS = ("bos_token_id", "pad_token_id")


def check_defaults(generation: Mapping[str, Any], tokenizer: Tokenizer, path: Path) -> None:
    """Refuse decoding defaults that no request could be answered with. Raises `CheckpointError` naming file and field.

    Whether a number is one that a request may have, too, is judged here; how defaults give way to a request's own
    fields is not.
    """
    for name, value in generation.items():
        if value is None:
            continue
        if name in REFUSED and value not in REFUSED[name]:
            raise _wrong(
                path, name, f"{name} = {_shown(value)} is not supported as a default", "ask for it per request"
            )
        if name == "do_sample" and not isinstance(value, bool):
            raise _wrong(path, name, f"do_sample must be true or false, not {_shown(value)}")
        if name in _IDS and not _is_id(value):
            raise _wrong(path, name, f"{name} must be a token id, not {_shown(value)}")
        if name == "eos_token_id" and not all(map(_is_id, value if isinstance(value, list) else [value])):
            raise _wrong(path, name, f"eos_token_id must be a token id or a list of them, not {_shown(value)}")
        parameter = BY_NAME.get(HONOURED.get(name, ""))
        if parameter is not None and name != "do_sample":
            _check_parameter(parameter, name, value, path)


def _check_parameter(parameter: Parameter, name: str, value: Any, path: Path) -> None:
    if parameter.kind in ("integer", "number"):
        kinds = "a whole number" if parameter.kind == "integer" else "a number"
        # Whether it is in range, and what one outside means, is judged with the request.
        if not _is_number(value) or (parameter.kind == "integer" and value != int(value)):
            raise _wrong(path, name, f"{name} must be {kinds}, not {_shown(value)}")
        return
    try:
        check(parameter, value)
    except InvalidRequest as error:
        raise _wrong(path, name, error.message.replace(parameter.name, name, 1)) from None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -(2**63) < value < 2**63


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    return repr(value)[:100]


def _wrong(
    path: Path, name: str, problem: str, hint: str = "correct it or leave it out of the file"
) -> CheckpointError:
    return CheckpointError(f"{path / 'generation_config.json'}: {problem}", field=name, hint=hint)
