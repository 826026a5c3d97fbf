"""Each family computes the logits that transformers computes from the same random weights."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.nn import functional

from tests.model.family_cases import CONFIGS, PADLESS, SMALL, reference_of
from topkapi.model.cache import SlotCache, Work, read, wanted_logits
from topkapi.model.config import ModelConfig
from topkapi.model.errors import CheckpointError
from topkapi.model.invariance import calibrate
from topkapi.model.serving import prepare
from topkapi.model.storage.checkpoint import load_checkpoint, save_checkpoint
from topkapi.model.storage.tensors import from_hugging_face
from topkapi.model.text.tokenizer import Tokenizer
from topkapi.model.transformer import Decoder, initialise
from topkapi.training.optimisation.attention import packed_attention


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["some words to learn from, and some more words"], 260, ["<|endoftext|>"])


@pytest.fixture(params=CONFIGS, scope="module")
def reference(request: pytest.FixtureRequest) -> transformers.PreTrainedModel:
    return reference_of(request.param)


def logits_of(model: Decoder, tokens: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.no_grad():
        return model(tokens, positions)


def assert_equal_logits(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    scale = theirs.abs().max()
    assert scale > 0.1
    assert ((ours - theirs).abs().max() / scale).item() <= 1e-4


def ours_of(reference: transformers.PreTrainedModel) -> Decoder:
    config = ModelConfig.from_hugging_face(reference.config.to_dict())
    model = Decoder(config)
    state = dict(from_hugging_face(config, iter(reference.state_dict().items())))
    if config.tie_embeddings:
        state["lm_head.weight"] = state["embed_tokens.weight"]
    model.load_state_dict(state)
    return model.eval()


def test_logits_equal_transformers(reference: transformers.PreTrainedModel) -> None:
    model = ours_of(reference)
    config = model.config
    assert config.parameter_count() == sum(p.numel() for p in reference.parameters())
    tokens = torch.randint(0, 300, (2, 90), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = reference(tokens).logits
    assert_equal_logits(logits_of(model, tokens), theirs)


def test_reading_in_chunks_among_others_equals_transformers(reference: transformers.PreTrainedModel) -> None:
    """The slot cache: prompts in uneven pieces, token by token, after a prefix that another slot had."""
    model = ours_of(reference)
    prepare(model)
    texts = torch.randint(0, 300, (2, 300), generator=torch.Generator().manual_seed(5))
    texts[1, :140] = texts[0, :140]
    with torch.no_grad():
        theirs = reference(texts).logits
    cache = SlotCache(model, slots=3)
    first, second = texts.tolist()
    states = [read(model, cache, [Work(0, 0, first[:7], wanted=7)])]
    states.append(read(model, cache, [Work(0, 7, first[7:160], wanted=153)]))
    # The second text goes on from what they have in common, as a prompt whose beginning is still in the cache.
    cache.copy(0, 2, 0, 140)
    others = [read(model, cache, [Work(2, 140, second[140:290], wanted=150)])]
    for at in range(160, 170):
        works = [Work(0, at, first[at : at + 1]), Work(2, at + 130, second[at + 130 : at + 131])]
        both = read(model, cache, works)
        states.append(both[:1])
        others.append(both[1:])
    states.append(read(model, cache, [Work(0, 170, first[170:], wanted=130)]))
    assert_equal_logits(wanted_logits(model, torch.cat(states)), theirs[0])
    assert_equal_logits(wanted_logits(model, torch.cat(others)), theirs[1, 140:])


def test_texts_packed_for_training_equal_transformers(reference: transformers.PreTrainedModel) -> None:
    """The way that fine-tuning computes: texts one after another, and the gradient of their loss."""
    model = ours_of(reference)
    texts = [torch.randint(0, 300, (length,), generator=torch.Generator().manual_seed(length)) for length in (90, 41)]
    lengths = torch.tensor([len(text) for text in texts])
    positions = torch.cat([torch.arange(len(text)) for text in texts]).unsqueeze(0)
    logits = model(torch.cat(texts).unsqueeze(0), positions, partial(packed_attention, lengths=lengths))[0]
    theirs = [reference(text.unsqueeze(0)).logits[0] for text in texts]
    assert_equal_logits(logits.detach(), torch.cat(theirs).detach())
    model.zero_grad()
    reference.zero_grad()
    functional.cross_entropy(logits[:-1], torch.cat(texts)[1:]).backward()
    functional.cross_entropy(torch.cat(theirs)[:-1], torch.cat(texts)[1:]).backward()
    gradients = {name: tensor.grad for name, tensor in reference.named_parameters()}
    found = dict(from_hugging_face(model.config, iter(gradients.items())))
    for name, parameter in model.named_parameters():
        expected = found[name]
        assert (parameter.grad - expected).abs().max() <= 1e-3 * expected.abs().max() + 1e-6, name


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "mistral-window", "phi4-mini", "gpt-neox", "olmo2", "granite"])
def test_rows_have_the_same_bits_in_every_batch(name: str) -> None:
    model = ours_of(reference_of(name))
    prepare(model)
    assert calibrate(model), "a text read at once, in chunks and among others must give identical logits"


# One of each way to store and to configure.
EXCHANGED = [
    "gpt2-tied", "gpt2-untied", "llama-tied-biased", "llama-longrope", "mistral-window", "qwen2-layer-types",
    "qwen3-window-yarn", "gemma2", "gemma2-uncapped", "gemma3", "phi3-window", "phi4-mini", "olmo2-biased",
    "smollm3-window", "gpt-neox", "gpt-neox-sequential", "granite-biased", "nanochat", "nanochat-tied",
]  # fmt: skip


@pytest.mark.parametrize("reference", EXCHANGED, indirect=True)
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
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"rope_scaling": {"rope_type": "proportional", "factor": 4.0}}, "rope_scaling"),
        ({"layer_types": ["sliding_attention"] * 3}, "layer_types"),
        ({"num_key_value_heads": 3}, "num_kv_heads"),
    ],
)
def test_what_is_not_computed_exactly_is_refused(change: dict, field: str) -> None:
    config = {"model_type": "llama", **SMALL, **change}
    with pytest.raises(CheckpointError) as caught:
        ModelConfig.from_hugging_face(config)
    assert caught.value.field == field


WITH_IMAGES: dict[str, Any] = {
    "text_config": {
        **PADLESS, "model_type": "gemma3_text", "head_dim": 24, "sliding_window": 25, "sliding_window_pattern": 2,
        "query_pre_attn_scalar": 30, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "vision_config": {
        "model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 8, "patch_size": 4, "vision_use_head": False,
    },
    "mm_tokens_per_image": 4, "image_token_index": 299, "boi_token_index": 297, "eoi_token_index": 298,
    "eos_token_id": [1, 106],
}  # fmt: skip


@pytest.mark.parametrize("tied", [True, False])
def test_the_text_of_a_model_with_images_is_read_alone(tied: bool, tmp_path: Path) -> None:
    """As files name its tensors, and as transformers does in memory."""
    torch.manual_seed(7)
    config = transformers.Gemma3Config(**WITH_IMAGES, tie_word_embeddings=tied)
    whole = transformers.Gemma3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    whole.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    tokens = torch.randint(0, 290, (2, 90), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = whole(tokens).logits
    for state in (load_file(tmp_path / "model.safetensors"), whole.state_dict()):
        read = ModelConfig.from_hugging_face(raw)
        assert (read.family, read.end_token_ids, read.tie_embeddings) == ("gemma3_text", (1, 106), tied)
        model = Decoder(read)
        found = dict(from_hugging_face(read, iter(state.items())))
        model.load_state_dict(found | ({"lm_head.weight": found["embed_tokens.weight"]} if tied else {}))
        assert_equal_logits(logits_of(model.eval(), tokens), theirs)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"text_config": None}, "text_config"),
        ({"text_config": {"model_type": "gemma2"}}, "text_config"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    ],
)
def test_of_a_model_with_images_what_is_wrong_is_named(change: dict[str, Any], field: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        ModelConfig.from_hugging_face({"model_type": "gemma3", **WITH_IMAGES, **change})
    assert caught.value.field == field
