"""How transformers stores each family's tensors: their names, which matrices are one, and which lie transposed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from topkapi.model.config import ModelConfig
from topkapi.model.errors import CheckpointError

QUERY_KEY_VALUE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")


@dataclass(frozen=True)
class Layout:
    """What a family's tensors are called and how they lie; the names of `Decoder` are those of most families.

    `outer` and `modules` give transformers' names by ours where they differ, those of layers after `layers`;
    `joined` says which of our matrices lie one below another in one of transformers'.
    """

    prefix: str = "model."
    layers: str = "layers"
    outer: Mapping[str, str] = field(default_factory=dict)
    modules: Mapping[str, str] = field(default_factory=dict)
    joined: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    by_head: bool = False
    """Joined matrices lie together head by head."""
    transposed: bool = False
    """Matrices of the layers are stored as `[inputs, outputs]`."""
    output: str = "lm_head"
    """The output matrix."""
    always_biased: tuple[str, ...] = ()
    """Joined matrices whose bias is stored as zeros where the network has none."""
    inside: Mapping[str, str] = field(default_factory=dict)
    """How names begin in a model that has images, too, by how they begin here."""
    beside: tuple[str, ...] = ()
    """How the names of such a model's other tensors begin, which are passed over."""

    def theirs(self, name: str) -> str:
        """transformers' name of our module `name`, with the prefix; of a joined one, that of what it is part of."""
        if name == "lm_head":
            return self.output
        match = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
        if match is None:
            return self.prefix + self.outer.get(name, name)
        module = next((whole for whole, parts in self.joined.items() if match[2] in parts), None)
        return f"{self.prefix}{self.layers}.{match[1]}.{module or self.modules.get(match[2], match[2])}"

    def alone(self, name: str) -> str | None:
        """The name of a tensor as it is where the text's network stands alone; None for what is not of it."""
        if name.startswith(self.beside):
            return None
        start = next((each for each in self.inside if name.startswith(each)), None)
        return name if start is None else self.inside[start] + name.removeprefix(start)

    def ours(self, name: str) -> list[str]:
        """Our names of transformers' module `name`, with or without the prefix: one, or those that are joined in it.

        A name that the family does not have comes back as it is.
        """
        if name == self.output:
            return ["lm_head"]
        plain = name.removeprefix(self.prefix)
        if plain == "lm_head":
            return [name]
        match = re.fullmatch(rf"{re.escape(self.layers)}\.(\d+)\.(.+)", plain)
        if match is None:
            return [next((ours for ours, theirs in self.outer.items() if theirs == plain), plain)]
        if match[2] in self.joined:
            return [f"layers.{match[1]}.{part}" for part in self.joined[match[2]]]
        module = next((ours for ours, theirs in self.modules.items() if theirs == match[2]), match[2])
        return [f"layers.{match[1]}.{module}"]

    def rows(self, config: ModelConfig, names: Sequence[str]) -> list[int]:
        """Outputs of each of our matrices `names`, those that are joined."""
        query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        sizes = dict(zip(QUERY_KEY_VALUE, (query, key, key), strict=True))
        return [sizes.get(_module(name), config.intermediate_size) for name in names]

    def part(self, config: ModelConfig, whole: str, names: Sequence[str], tensor: Tensor) -> list[Tensor]:
        """What is joined in `tensor [rows, ...]`, stored as `whole`. Raises `CheckpointError` for other sizes."""
        sizes = self.rows(config, names)
        if tensor.shape[0] != sum(sizes):
            raise CheckpointError(
                f"tensor {whole} has shape {list(tensor.shape)}, config.json implies {sum(sizes)} outputs",
                hint="config.json and the weights belong to different models",
            )
        if self.by_head:
            # By numbers of rows, for blocks of GGUF know nothing else.
            orders = torch.arange(tensor.shape[0]).view(config.num_heads, len(names), -1).unbind(1)
            return [tensor[order.flatten()] for order in orders]
        # Not `torch.split`, which blocks of GGUF know nothing of.
        return list(tensor.split(sizes))  # type: ignore[no-untyped-call]

    def join(self, config: ModelConfig, parts: Sequence[Tensor]) -> Tensor:
        """The inverse of `part`."""
        if self.by_head:
            heads = [each.unflatten(0, (config.num_heads, -1)) for each in parts]  # type: ignore[no-untyped-call]
            return torch.stack(heads, dim=1).flatten(0, 2)
        return torch.cat(list(parts))


def _module(name: str) -> str:
    return re.sub(r"^layers\.\d+\.", "", name)


_PLAIN = Layout()
LAYOUTS: dict[str, Layout] = {
    "gpt2": Layout(
        prefix="transformer.",
        layers="h",
        outer={"embed_tokens": "wte", "embed_positions": "wpe", "norm": "ln_f"},
        modules={
            "input_layernorm": "ln_1",
            "post_attention_layernorm": "ln_2",
            "self_attn.o_proj": "attn.c_proj",
            "mlp.up_proj": "mlp.c_fc",
            "mlp.down_proj": "mlp.c_proj",
        },
        joined={"attn.c_attn": QUERY_KEY_VALUE},
        transposed=True,
        always_biased=("attn.c_attn",),
    ),
    "gemma3_text": Layout(
        inside={"language_model.model.": "model.", "language_model.lm_head.": "lm_head.",
                "model.language_model.": "model."},
        beside=("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector."),
    ),
    "phi3": Layout(joined={"self_attn.qkv_proj": QUERY_KEY_VALUE, "mlp.gate_up_proj": GATE_UP}),
    "nanochat": Layout(modules={"mlp.up_proj": "mlp.fc1", "mlp.down_proj": "mlp.fc2"}),
    "gpt_neox": Layout(
        prefix="gpt_neox.",
        outer={"embed_tokens": "embed_in", "norm": "final_layer_norm"},
        modules={
            "self_attn.o_proj": "attention.dense",
            "mlp.up_proj": "mlp.dense_h_to_4h",
            "mlp.down_proj": "mlp.dense_4h_to_h",
        },
        joined={"attention.query_key_value": QUERY_KEY_VALUE},
        by_head=True,
        # In memory it is lm_head nowadays, in files not.
        output="embed_out",
    ),
}  # fmt: skip
"""Those families whose tensors are not stored under the names of `Decoder` alone, one by one."""

# What files of former days hold beside the weights.
BUFFERS = re.compile(
    r"(.*rotary_emb\.inv_freq|h\.\d+\.attn\.(bias|masked_bias)|layers\.\d+\.attention\.(bias|masked_bias))$"
)


def layout_of(config: ModelConfig) -> Layout:
    """The layout of a network's family."""
    return LAYOUTS.get(config.family, _PLAIN)
