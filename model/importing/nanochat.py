"""nanochat's networks (Andrej Karpathy, `GPT` in nanochat/gpt.py), as far as they are those of its first months.

What was added later is no matter of other numbers: scaled residuals that the embeddings flow into at every layer (11
January 2026), values mixed with embeddings of the tokens (16 January), and a state that each token hands on to the next
(14 March). A network with any of them is refused by its name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from topkapi.model.errors import CheckpointError
from topkapi.model.importing.options import Network, count_layers
from topkapi.model.importing.source import Source, check_names
from topkapi.model.reading import read_json

_NAMES = re.compile(
    r"(lm_head|transformer\.wte)\.weight|transformer\.h\.\d+\.(attn\.c_(q|k|v|proj)|mlp\.c_(fc|proj))\.weight"
)
_LAYER = {
    "attn.c_q": "self_attn.q_proj", "attn.c_k": "self_attn.k_proj", "attn.c_v": "self_attn.v_proj",
    "attn.c_proj": "self_attn.o_proj", "mlp.c_fc": "mlp.up_proj", "mlp.c_proj": "mlp.down_proj",
}  # fmt: skip
_LATER = {
    "smear": "each token takes something of the one before it",
    "backout": "the state of a layer in the middle is subtracted at the end",
    "value_embeds": "values are mixed with embeddings of the tokens",
    "ve_gate": "values are mixed with embeddings of the tokens",
    "x0_lambdas": "the embeddings flow into every layer",
    "resid_lambdas": "residuals are scaled layer by layer",
}
"""What networks of nanochat have since January 2026, by a word in the names of tensors."""

SOFTCAP, THETA = 15.0, 10_000.0


def is_nanochat(source: Source) -> bool:
    """Whether it has nanochat's names."""
    return "transformer.h.0.attn.c_q.weight" in source.shapes


def read_nanochat(source: Source) -> Network:
    """`model_N.pt` with `meta_N.json` beside it. Raises `CheckpointError` for what came in 2026."""
    for word, what in _LATER.items():
        if any(word in name for name in source.shapes):
            raise CheckpointError(
                f"{source.path} is nanochat's of 2026, which is not computed here: {what} ({word})",
                field="model_type",
                hint="networks of before 11 January 2026 are, such as its d32",
            )
    check_names(source, _NAMES, "nanochat's GPT")
    shapes = source.shapes
    heads, kv_heads, context, vocabulary = _arguments(source)
    rows, hidden = shapes["transformer.wte.weight"]
    if vocabulary > rows or hidden % heads:
        raise CheckpointError(
            f"{source.path} has {rows:,} embeddings of {hidden} numbers, and its meta file says a vocabulary of "
            f"{vocabulary:,} and {heads} heads",
            hint="they belong to different networks",
        )
    config: dict[str, Any] = {
        "model_type": "nanochat",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": shapes["transformer.h.0.mlp.c_fc.weight"][0],
        "num_hidden_layers": count_layers(list(shapes), "transformer.h."),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": context,
        # What PyTorch takes where nothing is said.
        "rms_norm_eps": torch.finfo(torch.float32).eps,
        "rope_theta": THETA,
        "final_logit_softcapping": SOFTCAP,
        "tie_word_embeddings": False,
    }

    def tensors() -> Iterator[tuple[str, Tensor]]:
        # Rows beyond the vocabulary round it up to a multiple of 64.
        yield "embed_tokens.weight", source.tensor("transformer.wte.weight")[:vocabulary]
        yield "lm_head.weight", source.tensor("lm_head.weight")[:vocabulary]
        for name in shapes:
            if name.startswith("transformer.h."):
                _, _, layer, rest = name.split(".", 3)
                yield f"layers.{layer}.{_LAYER[rest.removesuffix('.weight')]}.weight", source.tensor(name)

    return Network("nanochat's GPT", config, tensors, folder=source.path.parent)


def _arguments(source: Source) -> tuple[int, int, int, int]:
    """Heads, key-value heads, context and vocabulary as `meta_N.json` says them. Raises `CheckpointError`."""
    place = source.path.with_name(source.path.name.replace("model", "meta")).with_suffix(".json")
    arguments = read_json(place).get("model_config") if place.is_file() else None
    if not isinstance(arguments, dict):
        raise CheckpointError(
            f"{source.path} does not say how its network is made, and there is no {place.name} beside it that does",
            hint="copy the meta file along, which nanochat writes beside it",
        )
    if str(arguments.get("window_pattern", "L")).strip("L"):
        raise CheckpointError(
            f"{place}: the windows {arguments['window_pattern']!r} are those of nanochat of 2026, which are not "
            "computed here",
            field="window_pattern",
        )
    found: list[int] = [
        each
        for name in ("n_head", "n_kv_head", "sequence_len", "vocab_size")
        if isinstance(each := arguments.get(name), int) and each > 0
    ]
    if len(found) < 4:
        raise CheckpointError(
            f"{place}: model_config must have n_head, n_kv_head, sequence_len and vocab_size, whole numbers above 0"
        )
    heads, kv_heads, context, vocabulary = found
    return heads, kv_heads, context, vocabulary
