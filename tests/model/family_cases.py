"""Small networks of every family, as transformers' configurations: what the tests compare."""

from __future__ import annotations

from typing import Any

import torch
import transformers

SMALL: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 320,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
PADLESS: dict[str, Any] = {**SMALL, "pad_token_id": None}
NEOX: dict[str, Any] = {name: value for name, value in SMALL.items() if name != "num_key_value_heads"}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 80}
SHORT, LONG = [1.0 + 0.1 * at for at in range(8)], [2.0 + at for at in range(8)]
LONG_ROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": SHORT, "long_factor": LONG}
LOCAL_AND_GLOBAL = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}

CONFIGS: dict[str, transformers.PreTrainedConfig] = {
    "gpt2-tied": transformers.GPT2Config(
        vocab_size=300, n_positions=320, n_embd=64, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=1
    ),
    "gpt2-untied": transformers.GPT2Config(
        vocab_size=300, n_positions=320, n_embd=64, n_layer=2, n_head=4, n_inner=100, tie_word_embeddings=False,
        bos_token_id=0, eos_token_id=1, activation_function="gelu",
    ),
    "llama": transformers.LlamaConfig(**SMALL, tie_word_embeddings=False),
    "llama-tied-biased": transformers.LlamaConfig(
        **SMALL, tie_word_embeddings=True, attention_bias=True, mlp_bias=True, rms_norm_eps=1e-5, hidden_act="gelu"
    ),
    "llama3-rope": transformers.LlamaConfig(**SMALL, rope_parameters=LLAMA3_ROPE, head_dim=32),
    "llama-linear-rope": transformers.LlamaConfig(
        **SMALL, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    ),
    "llama-dynamic-rope": transformers.LlamaConfig(
        **SMALL, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    ),
    "llama-longrope": transformers.LlamaConfig(
        **SMALL, rope_parameters=LONG_ROPE | {"original_max_position_embeddings": 310, "factor": 6.0}
    ),
    "mistral": transformers.MistralConfig(**SMALL, head_dim=24, sliding_window=None),
    "mistral-window": transformers.MistralConfig(**SMALL, sliding_window=21),
    "mistral-narrowest-window": transformers.MistralConfig(**SMALL, sliding_window=1),
    "mistral-wide-window": transformers.MistralConfig(**SMALL, sliding_window=320, tie_word_embeddings=True),
    "qwen2": transformers.Qwen2Config(**SMALL, tie_word_embeddings=True),
    "qwen2-window": transformers.Qwen2Config(
        **SMALL, use_sliding_window=True, sliding_window=33, max_window_layers=1
    ),
    "qwen2-layer-types": transformers.Qwen2Config(
        **SMALL, use_sliding_window=True, sliding_window=17, max_window_layers=3,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "qwen2-yarn-rope": transformers.Qwen2Config(**SMALL, rope_parameters=YARN_ROPE),
    "qwen3": transformers.Qwen3Config(**SMALL, head_dim=24, tie_word_embeddings=True),
    "qwen3-untied-biased": transformers.Qwen3Config(
        **SMALL, head_dim=16, tie_word_embeddings=False, attention_bias=True, rope_theta=1e6
    ),
    "qwen3-window-yarn": transformers.Qwen3Config(
        **SMALL, head_dim=16, use_sliding_window=True, sliding_window=40, max_window_layers=2,
        rope_parameters=YARN_ROPE | {"attention_factor": 1.3, "beta_fast": 8.0, "beta_slow": 2.0, "truncate": False},
    ),
    "gemma2": transformers.Gemma2Config(
        **PADLESS, head_dim=24, sliding_window=19, query_pre_attn_scalar=40, attn_logit_softcapping=0.7,
        final_logit_softcapping=0.8,
    ),
    "gemma2-uncapped": transformers.Gemma2Config(
        **PADLESS, head_dim=16, attn_logit_softcapping=None, final_logit_softcapping=None, attention_bias=True,
        layer_types=["full_attention", "full_attention", "sliding_attention"], sliding_window=130,
        tie_word_embeddings=False, hidden_activation="silu",
    ),
    "gemma3": transformers.Gemma3TextConfig(
        **PADLESS, head_dim=24, sliding_window=25, sliding_window_pattern=2, query_pre_attn_scalar=30,
        rope_parameters=LOCAL_AND_GLOBAL,
    ),
    "gemma3-capped": transformers.Gemma3TextConfig(
        **PADLESS, head_dim=16, sliding_window=64, final_logit_softcapping=0.9, query_pre_attn_scalar=16
    ),
    "phi3": transformers.Phi3Config(**PADLESS),
    "phi3-window": transformers.Phi3Config(**PADLESS, sliding_window=47, tie_word_embeddings=True),
    "phi3-longrope": transformers.Phi3Config(
        **{**PADLESS, "max_position_embeddings": 2000}, original_max_position_embeddings=305,
        rope_parameters=LONG_ROPE,
    ),
    "phi4-mini": transformers.Phi3Config(
        **{**PADLESS, "max_position_embeddings": 2000}, original_max_position_embeddings=305,
        tie_word_embeddings=True, sliding_window=2000,
        rope_parameters=LONG_ROPE | {"short_factor": SHORT[:6], "long_factor": LONG[:6], "partial_rotary_factor": 0.75},
    ),
    "olmo2": transformers.Olmo2Config(**PADLESS),
    "olmo2-biased": transformers.Olmo2Config(
        **PADLESS, attention_bias=True, tie_word_embeddings=True, rope_parameters=YARN_ROPE
    ),
    "smollm3": transformers.SmolLM3Config(**PADLESS, no_rope_layer_interval=2),
    "smollm3-window": transformers.SmolLM3Config(
        **PADLESS, no_rope_layers=[0, 1, 0], use_sliding_window=True, sliding_window=23, tie_word_embeddings=False,
        attention_bias=True, mlp_bias=True,
    ),
    "gpt-neox": transformers.GPTNeoXConfig(**NEOX),
    "gpt-neox-sequential": transformers.GPTNeoXConfig(
        **NEOX, use_parallel_residual=False, attention_bias=False, hidden_act="gelu_fast", tie_word_embeddings=True,
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 300.0, "partial_rotary_factor": 0.5},
    ),
    "gpt-neox-odd-rotation": transformers.GPTNeoXConfig(
        **NEOX, rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.32}
    ),
    "nanochat": transformers.NanoChatConfig(**SMALL),
    "nanochat-tied": transformers.NanoChatConfig(
        **SMALL, attention_bias=True, tie_word_embeddings=True, final_logit_softcapping=None, rms_norm_eps=1e-3,
        hidden_act="gelu", rope_parameters=LLAMA3_ROPE,
    ),
    "granite": transformers.GraniteConfig(
        **SMALL, embedding_multiplier=12.0, logits_scaling=0.3, residual_multiplier=0.22, attention_multiplier=0.6
    ),
    "granite-biased": transformers.GraniteConfig(
        **SMALL, attention_bias=True, mlp_bias=True, tie_word_embeddings=True, logits_scaling=4,
        rope_parameters=YARN_ROPE | {"mscale": 0.7, "mscale_all_dim": 1.4},
    ),
}  # fmt: skip


def reference_of(name: str) -> transformers.PreTrainedModel:
    """transformers' network of that name with random weights."""
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]).eval().float()
    with torch.no_grad():  # transformers starts norms at one and biases at zero, where a mistake would not show
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.mul_(5)
    return model
