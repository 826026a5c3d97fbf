"""Llama's architecture in other layouts: Meta's names, which llama2.c keeps, and litgpt's.

Rotary positions pair neighbours there (Meta's, llama2.c) or halves (litgpt, as Hugging Face): rows of queries and keys
change places accordingly.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import yaml
from torch import Tensor

from topkapi.model.errors import CheckpointError
from topkapi.model.importing.options import Network, Options, count_layers
from topkapi.model.importing.source import Source, check_names
from topkapi.model.reading import read_json, read_text
from topkapi.model.yaml_reading import parse_yaml

_META = re.compile(
    r"(tok_embeddings|output|norm)\.weight|rope\.freqs|freqs_(cos|sin|cis)"
    r"|layers\.\d+\.(attention\.w[qkvo]|feed_forward\.w[123]|attention_norm|ffn_norm)\.weight|layers\.\d+\.attention\.mask"
)
META_LAYER = {
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip

STORIES_END = {"bos_token_id": 1, "eos_token_id": [1, 2]}
"""llama2.c trains on texts that begin with token 1, and its run.c ends where the next one would begin."""


def is_meta(source: Source) -> bool:
    """Whether it has the names of Meta's Llama, as llama2.c's training writes them."""
    return "tok_embeddings.weight" in source.shapes and "layers.0.attention.wq.weight" in source.shapes


def read_meta(source: Source, options: Options) -> Network:
    """llama2.c's `ckpt.pt`, or one file of Meta's with `params.json` beside it. Raises `CheckpointError`."""
    check_names(source, _META, "llama2.c's Transformer")
    arguments = source.facts.get("model_args")
    if not isinstance(arguments, dict):
        arguments = read_json(source.path.parent / "params.json")
    if not arguments:
        raise CheckpointError(
            f"{source.path} does not say how its network is made: no model_args in it, no params.json beside it",
            hint="give the ckpt.pt that llama2.c's train.py wrote, or put params.json beside it",
        )
    heads = arguments.get("n_heads")
    if not isinstance(heads, int) or heads < 1:
        raise CheckpointError(f"{source.path}: n_heads must be a whole number, not {heads!r}", field="n_heads")
    shapes = source.shapes
    hidden = shapes["tok_embeddings.weight"][1]
    kv_heads = arguments.get("n_kv_heads") or heads
    head = "output.weight" if "output.weight" in shapes else "tok_embeddings.weight"
    tied = torch.equal(source.tensor("tok_embeddings.weight"), source.tensor(head))
    if arguments.get("use_scaled_rope"):
        raise CheckpointError(
            f"{source.path}: use_scaled_rope is not read from this layout", field="use_scaled_rope",
            hint="import the model's Hugging Face directory",
        )  # fmt: skip
    config = llama_config(
        vocabulary=shapes["tok_embeddings.weight"][0], hidden=hidden,
        inner=shapes["layers.0.feed_forward.w1.weight"][0],
        layers=count_layers(list(shapes), "layers."), heads=heads, kv_heads=kv_heads,
        context=arguments.get("max_seq_len") or 2048, tied=tied, eps=arguments.get("norm_eps", 1e-5),
        theta=arguments.get("rope_theta", 10_000.0),
    )  # fmt: skip

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in shapes:
            if name.startswith("layers.") and not name.endswith("mask"):
                _, layer, rest = name.split(".", 2)
                yield meta_layer(layer, rest.removesuffix(".weight"), source.tensor(name), heads, kv_heads)
        yield "embed_tokens.weight", source.tensor("tok_embeddings.weight")
        yield "norm.weight", source.tensor("norm.weight")
        if not tied:
            yield "lm_head.weight", source.tensor("output.weight")

    if source.facts:
        config |= STORIES_END
    return Network("llama2.c's Transformer", config, tensors, folder=source.path.parent)


def meta_layer(layer: str | int, module: str, tensor: Tensor, heads: int, kv_heads: int) -> tuple[str, Tensor]:
    """A layer's tensor under `Decoder`'s name, with rows of queries and keys as halves rather than as neighbours."""
    if module in ("attention.wq", "attention.wk"):
        count = heads if module == "attention.wq" else kv_heads
        size = tensor.shape[0] // count // 2
        tensor = tensor.reshape(count, size, 2, -1).transpose(1, 2).reshape(tensor.shape)
    return f"layers.{layer}.{META_LAYER[module]}.weight", tensor


def llama_config(
    *, vocabulary: int, hidden: int, inner: int, layers: int, heads: int, kv_heads: int, context: int, tied: bool,
    eps: float, theta: float,
) -> dict[str, Any]:  # fmt: skip
    """A `config.json` of the llama family."""
    return {
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": context,
        "rms_norm_eps": eps,
        "rope_theta": theta,
        "tie_word_embeddings": tied,
    }


_LIT = re.compile(
    r"lm_head\.weight|transformer\.(wte|ln_f)\.weight"
    r"|transformer\.h\.\d+\.((norm_[12]|attn\.(proj|norm_[qk])|mlp\.(fc_1|fc_2|proj))\.weight|attn\.(qkv|attn)\.(weight|bias))"
)
_LIT_LAYER = {
    "norm_1": "input_layernorm", "norm_2": "post_attention_layernorm", "attn.proj": "self_attn.o_proj",
    "attn.norm_q": "self_attn.q_norm", "attn.norm_k": "self_attn.k_norm", "mlp.fc_1": "mlp.gate_proj",
    "mlp.fc_2": "mlp.up_proj", "mlp.proj": "mlp.down_proj",
}  # fmt: skip
_LIT_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "norm_class_name": ("RMSNorm",), "mlp_class_name": ("LLaMAMLP",), "parallel_residual": (False,), "bias": (False,),
    "shared_attention_norm": (False,), "post_attention_norm": (False,), "post_mlp_norm": (False,),
    "lm_head_bias": (False,),
    "scale_embeddings": (False,), "attention_scores_scalar": (None,), "attention_logit_softcapping": (None,),
    "final_logit_softcapping": (None,), "norm_1": (True,), "norm_2": (True,), "latent_attention": (None,),
    "rope_local_base_freq": (None,), "rope_indices": (None,), "n_expert": (0,), "n_shared_expert": (None,),
    "rotary_percentage": (1, 1.0), "rope_interleave": (False,), "norm_qk_type": ("default",),
    "first_k_dense_replace": (None,),
}  # fmt: skip
_LIT_DEFAULTS = {
    "norm_class_name": "LayerNorm", "mlp_class_name": "GptNeoxMLP", "parallel_residual": True, "bias": True,
    "rotary_percentage": 0.25, "norm_1": True, "norm_2": True, "n_expert": 0, "norm_qk_type": "default",
    **dict.fromkeys(("shared_attention_norm", "post_attention_norm", "post_mlp_norm", "lm_head_bias",
                     "scale_embeddings", "rope_interleave"), False),
}  # fmt: skip
_LIT_READ = {
    "block_size", "n_layer", "n_embd", "n_head", "n_query_groups", "head_size", "vocab_size", "padded_vocab_size",
    "intermediate_size", "norm_eps", "norm_qk", "attn_bias", "sliding_window_size", "sliding_window_indices",
    "rope_base", "rope_condense_ratio", "rope_adjustments",
}  # fmt: skip
_LIT_NOTHING = {
    "name", "hf_config", "padding_multiple", "gelu_approximate", "moe_intermediate_size", "n_expert_per_token",
    "n_expert_groups", "n_topk_groups", "n_topk_scores_per_group", "routed_scaling_factor", "norm_topk_prob",
}  # fmt: skip
"""Fields that change nothing in a network without experts and without GELU."""


def is_litgpt(source: Source) -> bool:
    """Whether it has litgpt's names."""
    return any(re.fullmatch(r"transformer\.h\.0\.attn\.(qkv|attn)\.weight", name) for name in source.shapes)


def read_litgpt(source: Source, options: Options) -> Network:
    """litgpt's `lit_model.pth` with `model_config.yaml` beside it, of Llama's, Qwen's and Mistral's kind.

    Raises `CheckpointError` naming the setting that is not computed with.
    """
    place = source.path.parent / "model_config.yaml"
    if not place.is_file():
        raise CheckpointError(
            f"{place} is missing, which says how litgpt's network is made",
            hint="give litgpt's checkpoint directory whole",
        )
    try:
        settings = parse_yaml(read_text(place), references=False)
    except yaml.YAMLError as error:
        raise CheckpointError(f"{place} is not YAML: {' '.join(str(error).split())}", hint="copy it again") from None
    if not isinstance(settings, dict):
        raise CheckpointError(f"{place} must hold settings by name", hint="copy it again")
    for name in settings:
        if name not in {*_LIT_NEUTRAL, *_LIT_READ, *_LIT_NOTHING}:
            raise CheckpointError(f"{place}: {name} is not known", field=name, hint="a newer litgpt wrote it")
    for name, neutral in _LIT_NEUTRAL.items():
        value = settings.get(name, _LIT_DEFAULTS.get(name))
        if value not in neutral:
            raise CheckpointError(
                f"{place}: {name} {value!r} is not computed with here",
                field=name,
                hint="litgpt convert_from_litgpt writes Hugging Face's layout, if that family is supported",
            )
    check_names(source, _LIT, "litgpt's GPT")
    return _litgpt(source, settings)


def _litgpt(source: Source, settings: Mapping[str, Any]) -> Network:
    shapes = source.shapes
    vocabulary, hidden = shapes["transformer.wte.weight"]
    heads = settings.get("n_head", 32)
    groups = settings.get("n_query_groups") or heads
    size = settings.get("head_size") or hidden // heads
    context = settings.get("block_size", 4096)
    window = settings.get("sliding_window_size")
    if window is not None and window < context:
        raise CheckpointError(
            f"sliding_window_size {window} is not computed with here", field="sliding_window_size",
            hint="litgpt convert_from_litgpt writes Hugging Face's layout",
        )  # fmt: skip
    tied = torch.equal(source.tensor("transformer.wte.weight"), source.tensor("lm_head.weight"))
    config = llama_config(
        vocabulary=vocabulary, hidden=hidden, inner=shapes["transformer.h.0.mlp.fc_1.weight"][0],
        layers=count_layers(list(shapes), "transformer.h."), heads=heads, kv_heads=groups, context=context, tied=tied,
        eps=settings.get("norm_eps", 1e-5), theta=float(settings.get("rope_base", 10_000)),
    )  # fmt: skip
    config |= {"head_dim": size, "rope_scaling": _litgpt_scaling(settings)}
    qkv_bias, qk_norm = bool(settings.get("attn_bias")), bool(settings.get("norm_qk"))
    if qkv_bias and qk_norm:
        raise CheckpointError("attn_bias beside norm_qk is not computed with here", field="attn_bias")
    if qkv_bias or qk_norm:
        config["model_type"] = "qwen2" if qkv_bias else "qwen3"
    rows = ((heads, groups, groups), size)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        yield "embed_tokens.weight", source.tensor("transformer.wte.weight")
        yield "norm.weight", source.tensor("transformer.ln_f.weight")
        if not tied:
            yield "lm_head.weight", source.tensor("lm_head.weight")
        for name in shapes:
            if not name.startswith("transformer.h."):
                continue
            _, _, layer, rest = name.split(".", 3)
            module, _, kind = rest.rpartition(".")
            if module in _LIT_LAYER:
                yield f"layers.{layer}.{_LIT_LAYER[module]}.{kind}", source.tensor(name)
                continue
            for projection, part in zip("qkv", _SPLITS[module](source.tensor(name), *rows), strict=True):
                yield f"layers.{layer}.self_attn.{projection}_proj.{kind}", part

    return Network("litgpt's GPT", config, tensors, folder=source.path.parent)


def _one_after_another(tensor: Tensor, counts: tuple[int, int, int], size: int) -> tuple[Tensor, ...]:
    return torch.split(tensor, [count * size for count in counts])


def _group_by_group(tensor: Tensor, counts: tuple[int, int, int], size: int) -> tuple[Tensor, ...]:
    """Of older litgpt: the queries of a group, its key, its value, then the next group."""
    heads, groups, _ = counts
    grouped = tensor.reshape(groups, heads // groups + 2, size, *tensor.shape[1:])
    return tuple(part.flatten(0, 2) for part in torch.split(grouped, [heads // groups, 1, 1], dim=1))


_SPLITS: Mapping[str, Callable[[Tensor, tuple[int, int, int], int], tuple[Tensor, ...]]] = {
    "attn.qkv": _one_after_another,
    "attn.attn": _group_by_group,
}


def _litgpt_scaling(settings: Mapping[str, Any]) -> dict[str, Any] | None:
    adjustments = settings.get("rope_adjustments")
    condensed = settings.get("rope_condense_ratio", 1)
    if adjustments is None:
        return None if condensed == 1 else {"rope_type": "linear", "factor": float(condensed)}
    known = {"factor", "low_freq_factor", "high_freq_factor", "original_max_seq_len"}
    if not isinstance(adjustments, dict) or set(adjustments) != known or condensed != 1:
        raise CheckpointError(
            f"rope_adjustments {adjustments} are not computed with here", field="rope_adjustments",
            hint="litgpt convert_from_litgpt writes Hugging Face's layout",
        )  # fmt: skip
    original = adjustments["original_max_seq_len"]
    rest = {name: float(adjustments[name]) for name in known - {"original_max_seq_len"}}
    return {"rope_type": "llama3", "original_max_position_embeddings": original, **rest}
