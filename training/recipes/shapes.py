"""The shape of the network that `pretrain` makes or goes on with, from the recipe alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from topkapi.model.config import ModelConfig
from topkapi.model.errors import SettingsError
from topkapi.training.recipes.recipe import PretrainRecipe

# Tokens in a window where the recipe says nothing: of a new network, and at most of one that has a longer context.
CONTEXT_LENGTH, LONGEST_WINDOW = 256, 1024
# Sizes to start from: layers, width, feed-forward width, heads, key-value heads, width of a head.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"num_layers": 4, "hidden_size": 128, "intermediate_size": 384, "num_heads": 4, "num_kv_heads": 2},
    "small": {"num_layers": 6, "hidden_size": 256, "intermediate_size": 768, "num_heads": 4, "num_kv_heads": 2},
    "medium": {"num_layers": 10, "hidden_size": 512, "intermediate_size": 1536, "num_heads": 8, "num_kv_heads": 4},
    "gpt2": {"num_layers": 12, "hidden_size": 768, "intermediate_size": 3072, "num_heads": 12, "num_kv_heads": 12},
}


def new_config(
    recipe: PretrainRecipe, vocab_size: int, begin_token_id: int | None = None, end_token_id: int | None = None
) -> ModelConfig:
    """A new network's configuration: the preset with the recipe's own sizes put over it.

    Raises `SettingsError` for sizes that do not go together.
    """
    sizes = dict(PRESETS[recipe.model])
    sizes |= {name: value for name in sizes if (value := getattr(recipe, name)) is not None}
    family = recipe.family or ("gpt2" if recipe.model == "gpt2" else "qwen3")
    gpt2 = family == "gpt2"
    if gpt2 and recipe.num_kv_heads is None:
        sizes["num_kv_heads"] = sizes["num_heads"]
    elif gpt2 and sizes["num_kv_heads"] != sizes["num_heads"]:
        raise SettingsError(
            "gpt2 has as many key-value heads as heads", field="num_kv_heads", hint="leave out num_kv_heads"
        )
    head_dim = recipe.head_dim or sizes["hidden_size"] // sizes["num_heads"]
    qkv_bias = recipe.qkv_bias if recipe.qkv_bias is not None else family in ("gpt2", "qwen2")
    if family == "gpt2" and sizes["hidden_size"] % sizes["num_heads"]:
        raise SettingsError(
            f"hidden_size {sizes['hidden_size']} is not a multiple of num_heads {sizes['num_heads']}",
            field="hidden_size",
            hint=f"the nearest that are: {sizes['num_heads'] * head_dim} and {sizes['num_heads'] * (head_dim + 1)}"
            if recipe.head_dim is None and head_dim
            else "give a multiple of num_heads",
        )
    return ModelConfig(
        family=family,
        vocab_size=vocab_size,
        head_dim=head_dim,
        context_length=recipe.context_length or CONTEXT_LENGTH,
        norm_eps=1e-5 if gpt2 else 1e-6,
        qkv_bias=qkv_bias,
        output_bias=gpt2,
        mlp_bias=gpt2,
        tie_embeddings=recipe.tie_embeddings,
        dropout=recipe.dropout,
        begin_token_id=begin_token_id,
        end_token_ids=() if end_token_id is None else (end_token_id,),
        **sizes,
    )


def check_inherited(recipe: PretrainRecipe) -> None:
    """Raise `SettingsError` for a setting that would make another network of the checkpoint that is trained on."""
    for name in (*PRESETS["tiny"], "model", "family", "head_dim", "qkv_bias", "tie_embeddings", "initialisation",
                 "tokenizer", "vocab_size"):  # fmt: skip
        if getattr(recipe, name) != PretrainRecipe.model_fields[name].default:
            raise SettingsError(
                f"{name} is the checkpoint's own and cannot be chosen beside it", field=name, hint=f"leave out {name}"
            )


def continued_config(recipe: PretrainRecipe, before: ModelConfig) -> ModelConfig:
    """The checkpoint's configuration, for longer texts where the recipe says so."""
    longer = recipe.context_length or 0
    if before.learned_positions and longer > before.context_length:
        raise SettingsError(
            f"the checkpoint has learned {before.context_length} positions, so its context cannot grow to {longer}",
            field="context_length",
            hint=f"give at most {before.context_length}",
        )
    return replace(before, dropout=recipe.dropout, context_length=max(before.context_length, longer))
