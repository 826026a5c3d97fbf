"""Hugging Face's `config.json` as the fields of a `ModelConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from topkapi.model.config_fields import GPT2_NAMES, REQUIRED, Fields, check_size
from topkapi.model.config_rope import read_rope
from topkapi.model.errors import CheckpointError
from topkapi.model.families import FAMILIES, Family

# Models that hold a network of one of the families beside something else, such as an encoder of images, which is not
# read: that family, by transformers' name of the whole.
_AROUND = {"gemma3": "gemma3_text"}
# What of a text's configuration the whole one says for both.
_OF_BOTH = ("bos_token_id", "eos_token_id", "pad_token_id")


def values_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `ModelConfig` that a `config.json` gives.

    Raises `CheckpointError` for a family, an activation or an attention variant that is not computed exactly as
    transformers does, naming the field.
    """
    config = _text_alone(config)
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise unsupported_family(family)
    traits = FAMILIES[family]
    if family == "gpt2":
        # As in transformers, the common name wins over gpt2's own.
        named = {own: config[common] for common, own in GPT2_NAMES.items() if common in config}
        fields = Fields({**config, **named})
        fields.refuse_unless_neutral(traits.neutral)
        return _gpt2(fields)
    fields = Fields({**traits.absent, **config}, spelling=traits.spelling)
    fields.refuse_unless_neutral(traits.neutral)
    return _rotary_family(family, traits, fields)


def unsupported_family(family: object) -> CheckpointError:
    """What is raised for a family that is not computed; it names those that are."""
    return CheckpointError(
        f"model family {family!r:.200} is not supported",
        field="model_type",
        hint=f"supported families: {', '.join(FAMILIES)}",
    )


def _text_alone(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration of the text's network where `config` is that of one with images, as it is where not."""
    family = config.get("model_type")
    inner_family = _AROUND.get(family) if isinstance(family, str) else None
    if inner_family is None:
        return config
    inner = config.get("text_config")
    if not isinstance(inner, Mapping) or inner.get("model_type", inner_family) != inner_family:
        raise CheckpointError(
            f"config.json: a model of the type {family} must have a text_config of the type {inner_family}",
            field="text_config",
            hint="copy or download the checkpoint again",
        )
    Fields(config).refuse_unless_neutral({})
    # transformers ties the embeddings of the whole model by the outer field, true where it is absent.
    tied = {"tie_word_embeddings": config.get("tie_word_embeddings", True)}
    given = {name: config[name] for name in _OF_BOTH if config.get(name) is not None}
    return {**inner, **given, **tied, "model_type": inner_family}


def _begin_token(fields: Fields) -> int | None:
    found = fields.token_ids("bos_token_id")
    if isinstance(fields.values.get("bos_token_id"), list | tuple):
        raise CheckpointError("config.json: bos_token_id must be a token id or null", field="bos_token_id")
    return found[0] if found else None


def _gpt2(fields: Fields) -> dict[str, Any]:
    hidden, heads, layers = fields.whole("n_embd"), fields.whole("n_head"), fields.whole("n_layer")
    fields.layer_types(layers)
    context = "n_ctx" if "n_positions" not in fields.values and "n_ctx" in fields.values else "n_positions"
    return {
        "family": "gpt2",
        "vocab_size": fields.whole("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": fields.whole("n_inner", 4 * hidden, null=True),
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": _head_dim(hidden, heads),
        "context_length": fields.whole(context),
        "norm_eps": fields.number("layer_norm_epsilon", 1e-5, zero=True),
        "activation": _activation(fields, FAMILIES["gpt2"], "activation_function"),
        "qkv_bias": fields.flag("qkv_bias", True),
        "output_bias": True,
        "mlp_bias": True,
        "tie_embeddings": fields.flag("tie_word_embeddings", True),
        "dropout": fields.number("resid_pdrop", 0.1, zero=True, most=1.0),
        "begin_token_id": _begin_token(fields),
        "end_token_ids": fields.token_ids("eos_token_id"),
    }


def _head_dim(hidden: int, heads: int) -> int:
    if hidden % heads:
        raise CheckpointError(
            f"hidden_size ({hidden}) must be a multiple of the number of attention heads ({heads})",
            field="num_attention_heads",
        )
    return hidden // heads


def _activation(fields: Fields, traits: Family, name: str) -> str | None:
    found = fields.activation(name, traits.activation)
    return None if found == traits.activation else found


def _rotary_family(family: str, traits: Family, fields: Fields) -> dict[str, Any]:
    hidden, heads = fields.whole("hidden_size"), fields.whole("num_attention_heads")
    layers = fields.whole("num_hidden_layers")
    # What is said of each layer is read next, and a hostile number of them would not end.
    check_size("num_layers", layers)
    head_dim = traits.head_dim or (_head_dim(hidden, heads) if traits.divisible else max(hidden // heads, 1))
    context = fields.whole("max_position_embeddings")
    if traits.heads_alike:
        _refuse_other(fields, "head_dim", head_dim)
        _refuse_other(fields, "num_key_value_heads", heads)
        kv_heads = heads
    else:
        head_dim = fields.whole("head_dim", head_dim, null=True)
        kv_heads = fields.whole("num_key_value_heads", heads, null=True)
    rope = read_rope(fields, traits, context, head_dim)
    scaling = rope["rope_scaling"] or {}
    computed = context
    if scaling.get("rope_type") == "longrope":
        computed = min(context, scaling["original_max_position_embeddings"])
    attention_bias = fields.flag("attention_bias", False) if traits.attention_bias else False
    unrotated = _unrotated_layers(fields, layers) if traits.unrotated_layers else ()
    return {
        "family": family,
        "vocab_size": fields.whole("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": fields.whole("intermediate_size"),
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "context_length": computed,
        "declared_context": None if computed == context else context,
        "norm_eps": fields.number("rms_norm_eps", 1e-6, zero=True),
        "qkv_bias": traits.qkv_bias or attention_bias,
        "output_bias": attention_bias,
        "mlp_bias": fields.flag("mlp_bias", False) if traits.mlp_bias else traits.mlp_biased,
        "activation": _activation(fields, traits, "hidden_act"),
        "tie_embeddings": fields.flag("tie_word_embeddings", False),
        "parallel_residual": fields.flag("use_parallel_residual", False) if traits.parallel_residual else False,
        "layer_windows": _windows(fields, traits, layers, unrotated),
        "unrotated_layers": unrotated,
        "begin_token_id": _begin_token(fields),
        "end_token_ids": fields.token_ids("eos_token_id"),
        **rope,
        **_numbers(fields, traits),
    }


def _refuse_other(fields: Fields, name: str, only: int) -> None:
    """Refuse a size that transformers does not take from the file in this family, unless it is what it is anyway."""
    if fields.given(name) not in (None, only):
        raise CheckpointError(
            f"config.json asks for {name} = {fields.given(name)!r:.200}, which this family does not have",
            field=name,
            hint=f"leave it out; it is always {only} here",
        )


def _numbers(fields: Fields, traits: Family) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for ours, number in traits.numbers.items():
        value = fields.values.get(number.name, number.default)
        found[ours] = None if value is None and number.null else fields.number(number.name, number.default)
    if traits.query_scalar:
        found["attention_scale"] = fields.number("query_pre_attn_scalar") ** -0.5
    return found


def _unrotated_layers(fields: Fields, layers: int) -> tuple[int, ...]:
    """The layers without positions: those with a zero in `no_rope_layers`, or each `no_rope_layer_interval`th."""
    given = fields.values.get("no_rope_layers")
    if given is None:
        interval = fields.whole("no_rope_layer_interval", 4)
        return tuple(range(interval - 1, layers, interval))
    if not isinstance(given, list | tuple) or len(given) < layers or any(each not in (0, 1) for each in given):
        raise CheckpointError(
            f"config.json: no_rope_layers must be null or a list of {layers} ones and zeros, not {given!r:.200}",
            field="no_rope_layers",
        )
    return tuple(layer for layer in range(layers) if not given[layer])


def _windows(fields: Fields, traits: Family, layers: int, unrotated: tuple[int, ...]) -> tuple[int | None, ...]:
    """What each layer attends to: see `ModelConfig.layer_windows`."""
    if traits.window is None:
        fields.layer_types(layers)
        return ()
    used = fields.flag("use_sliding_window", False) if traits.window == "flagged" else True
    window = (
        fields.whole("sliding_window", REQUIRED) if used and fields.values.get("sliding_window") is not None else None
    )
    if traits.window == "every":
        # transformers does not read which layers have it: what says otherwise is refused.
        fields.layer_types(layers, ("sliding_attention",) if window else ("full_attention",))
        return (window,) * layers if window else ()
    kinds = fields.layer_types(layers, ("full_attention", "sliding_attention"))
    if kinds is not None:
        local = [kind == "sliding_attention" for kind in kinds]
    elif traits.window_pattern is not None:
        pattern = fields.whole("sliding_window_pattern", traits.window_pattern, null=True)
        local = [(layer + 1) % pattern != 0 for layer in range(layers)]
    elif window is None:
        return ()
    elif traits.unrotated_layers:
        local = [layer in unrotated for layer in range(layers)]
    else:
        first = fields.values.get("max_window_layers")
        if isinstance(first, bool) or not isinstance(first, int):
            raise CheckpointError(
                f"config.json: max_window_layers must be a whole number, not {first!r:.200}", field="max_window_layers"
            )
        local = [layer >= first for layer in range(layers)]
    if not any(local):
        return ()
    if window is None:
        raise CheckpointError(
            "config.json has layers of sliding_attention, but no sliding_window for them"
            + (" that use_sliding_window lets be" if not used else ""),
            field="layer_types" if kinds is not None else "sliding_window",
            hint="give sliding_window" + (" and use_sliding_window: true" if not used else ""),
        )
    return tuple(window if each else None for each in local)
