"""What GGUF files call the matrices and norms of each family, which of them are one there, and how rows lie."""

from __future__ import annotations

from topkapi.model.families import FAMILIES, Family
from topkapi.model.storage.layouts import GATE_UP, QUERY_KEY_VALUE

ARCHITECTURES: dict[str, str] = {}
"""The families that are read, by llama.cpp's names of architectures."""
for _name, _family in FAMILIES.items():
    if _family.gguf:
        ARCHITECTURES.setdefault(_family.gguf, _name)

INTERLEAVED = ("llama", "smollm3", "granite")
"""Architectures whose query and key rows stand in turn: the first of each half of a head, then the second."""

JOINED: dict[str, dict[str, tuple[str, ...]]] = {
    "gpt2": {"attn_qkv": QUERY_KEY_VALUE},
    "gptneox": {"attn_qkv": QUERY_KEY_VALUE},
    "phi3": {"attn_qkv": QUERY_KEY_VALUE, "ffn_up": GATE_UP},
}
"""Our matrices that lie one below another in one of GGUF's, by architecture."""

OUTER = {"embed_tokens": "token_embd", "embed_positions": "position_embd", "norm": "output_norm", "lm_head": "output"}
"""What stands outside of layers, by our names."""

_MODULES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_NORMS = ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")
"""In the order of `model.families.Norms`."""


def layer_names(traits: Family) -> dict[str, str]:
    """GGUF's names of a layer's modules, by ours; of those that are joined there, the name of what they are part of."""
    norms = {ours: theirs for ours, theirs in zip(traits.norms, _NORMS, strict=True) if ours is not None}
    joined = {part: whole for whole, parts in JOINED.get(traits.gguf, {}).items() for part in parts}
    return _MODULES | norms | joined
