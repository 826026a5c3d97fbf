"""Each family computes the logits that transformers computes from the same random weights."""

from __future__ import annotations

import pytest
import torch
import transformers

from topkapi.model.config import ModelConfig
from topkapi.model.errors import CheckpointError
from topkapi.model.storage.checkpoint import load_checkpoint, save_checkpoint
from topkapi.model.storage.tensors import from_hugging_face
from topkapi.model.text.tokenizer import Tokenizer
from topkapi.model.transformer import Decoder, initialise

SMALL = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CONFIGS = {
    "gpt2-tied": transformers.GPT2Config(
        vocab_size=300, n_positions=96, n_embd=64, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=1
    ),
    "gpt2-untied": transformers.GPT2Config(
        vocab_size=300, n_positions=96, n_embd=64, n_layer=2, n_head=4, n_inner=100, tie_word_embeddings=False,
        bos_token_id=0, eos_token_id=1,
    ),
    "llama": transformers.LlamaConfig(**SMALL, tie_word_embeddings=False),
    "llama-tied-biased": transformers.LlamaConfig(
        **SMALL, tie_word_embeddings=True, attention_bias=True, mlp_bias=True, rms_norm_eps=1e-5
    ),
    "llama3-rope": transformers.LlamaConfig(**SMALL, rope_parameters=LLAMA3_ROPE, head_dim=32),
    "llama-linear-rope": transformers.LlamaConfig(
        **SMALL, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    ),
    "mistral": transformers.MistralConfig(**SMALL, head_dim=24, sliding_window=None),
    "mistral-wide-window": transformers.MistralConfig(**SMALL, sliding_window=96, tie_word_embeddings=True),
    "qwen2": transformers.Qwen2Config(**SMALL, tie_word_embeddings=True),
    "qwen3": transformers.Qwen3Config(**SMALL, head_dim=24, tie_word_embeddings=True),
    "qwen3-untied-biased": transformers.Qwen3Config(
        **SMALL, head_dim=16, tie_word_embeddings=False, attention_bias=True, rope_theta=1e6
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["some words to learn from, and some more words"], 260, ["<|endoftext|>"])


@pytest.fixture(params=CONFIGS, scope="module")
def reference(request: pytest.FixtureRequest) -> transformers.PreTrainedModel:
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[request.param]).eval().float()
    with torch.no_grad():  # transformers starts norms at one and biases at zero, where a mistake would not show
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.mul_(3)
    return model


def logits_of(model: Decoder, tokens: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.no_grad():
        return model(tokens, positions)


def assert_equal_logits(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    scale = theirs.abs().max()
    assert scale > 0.1
    assert ((ours - theirs).abs().max() / scale).item() <= 1e-4


def test_logits_equal_transformers(reference: transformers.PreTrainedModel) -> None:
    config = ModelConfig.from_hugging_face(reference.config.to_dict())
    model = Decoder(config)
    state = dict(from_hugging_face(config, iter(reference.state_dict().items())))
    if config.tie_embeddings:
        state["lm_head.weight"] = state["embed_tokens.weight"]
    model.load_state_dict(state)
    assert config.parameter_count() == sum(p.numel() for p in reference.parameters())
    tokens = torch.randint(0, 300, (2, 90), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = reference(tokens).logits
    assert_equal_logits(logits_of(model.eval(), tokens), theirs)


def test_directory_of_transformers_opens_here_and_ours_there(
    reference: transformers.PreTrainedModel, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("exchange")
    reference.save_pretrained(folder / "theirs", max_shard_size="40KB")
    assert (folder / "theirs" / "model.safetensors.index.json").is_file(), "the sharded form is what is tested"
    tokenizer.save(folder / "theirs", None)
    tokens = torch.randint(0, 300, (1, 60), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        theirs = reference(tokens).logits
    loaded = load_checkpoint(folder / "theirs")
    assert_equal_logits(logits_of(loaded.model, tokens), theirs)

    save_checkpoint(
        folder / "ours", model=loaded.model, tokenizer=tokenizer, chat=None, generation={}, details={"made_by": "test"}
    )
    again = transformers.AutoModelForCausalLM.from_pretrained(folder / "ours").eval()
    assert type(again) is type(reference)
    with torch.no_grad():
        assert_equal_logits(again(tokens).logits, theirs)
    assert torch.equal(logits_of(load_checkpoint(folder / "ours").model, tokens), logits_of(loaded.model, tokens))


def test_gpt2_without_query_bias_is_exact_in_transformers(tokenizer: Tokenizer, tmp_path_factory) -> None:
    config = ModelConfig(
        family="gpt2", vocab_size=300, hidden_size=32, intermediate_size=128, num_layers=2, num_heads=2, num_kv_heads=2,
        head_dim=16, context_length=40, norm_eps=1e-5, output_bias=True, mlp_bias=True, tie_embeddings=False,
        end_token_ids=(1,),
    )  # fmt: skip
    model = Decoder(config)
    initialise(model, torch.Generator().manual_seed(3), "pytorch")
    assert sum(p.numel() for p in model.parameters()) == config.parameter_count()
    folder = tmp_path_factory.mktemp("gpt2") / "checkpoint"
    save_checkpoint(folder, model=model, tokenizer=tokenizer, chat=None, generation={}, details={})
    tokens = torch.randint(0, 300, (1, 40), generator=torch.Generator().manual_seed(4))
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        assert_equal_logits(logits_of(model.eval(), tokens), reference(tokens).logits)
    loaded = load_checkpoint(folder)
    assert not loaded.config.qkv_bias
    assert sum(p.numel() for p in loaded.model.parameters()) == config.parameter_count()


def test_the_books_gpt2_has_its_published_size() -> None:
    config = ModelConfig(
        family="gpt2", vocab_size=50257, hidden_size=768, intermediate_size=3072, num_layers=12, num_heads=12,
        num_kv_heads=12, head_dim=64, context_length=256, output_bias=True, mlp_bias=True, tie_embeddings=False,
    )  # fmt: skip
    assert config.parameter_count() == 162_419_712


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"model_type": "mamba"}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling"),
        ({"layer_types": ["sliding_attention"] * 3}, "layer_types"),
        ({"num_key_value_heads": 3}, "num_kv_heads"),
    ],
)
def test_what_is_not_computed_exactly_is_refused(change: dict, field: str) -> None:
    config = {"model_type": "llama", **SMALL, **change}
    with pytest.raises(CheckpointError) as caught:
        ModelConfig.from_hugging_face(config)
    assert caught.value.field == field
