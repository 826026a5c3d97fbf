"""Adapters in PEFT's format: PEFT computes with ours what we do, and we merge what PEFT wrote."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import tiny_model
from topkapi.model import native
from topkapi.model.adapter import TARGETS, Adapter, attach
from topkapi.model.cache import SlotCache, Work, outputs
from topkapi.model.errors import CheckpointError
from topkapi.model.families import FAMILIES
from topkapi.model.live_adapter import LiveAdapter
from topkapi.model.storage.beside import load_adapter
from topkapi.model.storage.checkpoint import load_checkpoint, save_adapter, save_checkpoint, weights_digest
from topkapi.model.text.tokenizer import Tokenizer
from topkapi.model.transformer import Decoder


@pytest.fixture(scope="module")
def peft() -> Any:
    """The oracle for its own format; imported late, for it takes seconds."""
    return pytest.importorskip("peft", reason="needs peft, the library whose format this is")


TOKENS = torch.arange(3, 99, 4).view(2, 12)
RANK, ALPHA = 3, 9.0


def positions(tokens: torch.Tensor) -> torch.Tensor:
    return torch.arange(tokens.shape[1]).expand_as(tokens)


@pytest.fixture(scope="module")
def tokenizer(english: str) -> Tokenizer:
    """A vocabulary that leaves the tiny networks rows to spare."""
    return Tokenizer.train([english[:2_000]], 300)


@pytest.fixture
def base(tmp_path: Path, tokenizer: Tokenizer) -> Callable[..., Path]:
    def make(family: Any = "llama", **changes: Any) -> Path:
        # Of normalised embeddings small matrices change little.
        scale = 6.0 if family == "nanochat" else 2.0
        model = tiny_model(family, scale=scale, vocab_size=304, **changes)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.uniform_(-0.5, 0.5)
        return save_checkpoint(
            tmp_path / "base", model=model, tokenizer=tokenizer, chat=None, generation={}, details={}
        )

    return make


def adapted(base: Path, *, decomposed: bool, token_ids: list[int] | None = None) -> Decoder:
    """The network at `base` with adapters that change something everywhere."""
    model = load_checkpoint(base, dtype=torch.float32).model
    generator = torch.Generator().manual_seed(1)
    options: dict[str, Any] = {"rank": RANK, "scale": ALPHA / RANK, "dropout": 0.5, "decomposed": decomposed}
    attach(model, TARGETS, lambda linear: Adapter(linear, generator=generator, **options), token_ids or [])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("up.weight") or "trained_rows" in name:
                parameter.normal_(0, 0.05, generator=generator)
            elif name.endswith("magnitude"):
                parameter.mul_(torch.empty_like(parameter).uniform_(0.5, 1.5, generator=generator))
    return model.eval()


def stored(model: Decoder, base: Path, tokenizer: Tokenizer, **details: Any) -> Path:
    details = {"parent": {"sha256": weights_digest(base)}, **details}
    return save_adapter(
        base.parent / "adapter",
        model=model,
        base=base,
        rank=RANK,
        alpha=ALPHA,
        dropout=0.5,
        tokenizer=tokenizer,
        chat=None,
        generation={"temperature": 0.5},
        details=details,
    )


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()


def logits_of_peft(
    peft: Any, base: Path, adapter: Path, tokens: torch.Tensor = TOKENS, vocab_size: int = 304
) -> torch.Tensor:
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if vocab_size != theirs.config.vocab_size:
        theirs.resize_token_embeddings(vocab_size)
    model = peft.PeftModel.from_pretrained(theirs, adapter).eval()
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize("held", ["PyTorch", "native"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_beside_its_base_an_adapter_computes_what_peft_does(
    family: Any, held: str, base: Callable[..., Path], tokenizer: Tokenizer, peft: Any
) -> None:
    path = base(family)
    adapter = stored(adapted(path, decomposed=False), path, tokenizer)
    checkpoint = load_checkpoint(path, dtype=torch.float32)
    matrices = load_adapter(adapter, checkpoint).matrices
    if held == "native":
        if not native.levels():
            pytest.skip("the native core was not built")
        native.hold(checkpoint.model, "float32")
    live, cache = LiveAdapter(checkpoint.model, matrices), SlotCache(checkpoint.model, 2)
    works = [Work(slot, 0, row.tolist(), wanted=len(row), adapter=live) for slot, row in enumerate(TOKENS)]
    found = torch.stack([output.logits for output in outputs(checkpoint.model, cache, works)])
    assert_close(found, logits_of_peft(peft, path, adapter))


@pytest.mark.parametrize("decomposed", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_computes_what_we_trained_and_so_does_the_merged_checkpoint(
    family: Any, decomposed: bool, base: Callable[..., Path], tokenizer: Tokenizer, peft: Any
) -> None:
    """Queries, keys and values of gpt2 are one matrix there; biases are not scaled by DoRA."""
    path = base(family)
    model = adapted(path, decomposed=decomposed)
    with torch.no_grad():
        ours = model(TOKENS, positions(TOKENS))
    adapter = stored(model, path, tokenizer)
    assert_close(logits_of_peft(peft, path, adapter), ours)
    merged = load_checkpoint(adapter)
    assert_close(merged.model(TOKENS, positions(TOKENS)), ours)
    untouched = load_checkpoint(path).model(TOKENS, positions(TOKENS))
    assert (untouched - ours).abs().max() > 0.02 * ours.abs().max()
    assert merged.generation == {"temperature": 0.5} and merged.name == "adapter"


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_rows_of_new_tokens_train_whole(tied: bool, base: Callable[..., Path], tokenizer: Tokenizer, peft: Any) -> None:
    """Rows that the base has to spare and rows that it lacks, also in an output matrix of its own."""
    path = base(tie_embeddings=tied)
    small = load_checkpoint(path, dtype=torch.float32)
    grown = Decoder(type(small.config)(**{**vars(small.config), "vocab_size": 306}))
    with torch.no_grad():
        for name, parameter in grown.named_parameters():
            old = small.model.state_dict()[name]
            parameter[: len(old)] = old
            parameter[len(old) :] = 0
    large = save_checkpoint(
        path.parent / "large", model=grown, tokenizer=tokenizer, chat=None, generation={}, details={}
    )
    model = adapted(large, decomposed=False, token_ids=[7, 303, 304, 305])
    tokens = torch.tensor([[5, 7, 303, 9, 305, 304, 7]])
    with torch.no_grad():
        ours = model(tokens, positions(tokens))
    adapter = stored(model, path, tokenizer)
    assert_close(logits_of_peft(peft, path, adapter, tokens, 306), ours)
    merged = load_checkpoint(adapter)
    assert merged.config.vocab_size == 306
    assert_close(merged.model(tokens, positions(tokens)), ours)


def test_only_adapters_and_new_rows_train_and_their_gradients_are_right(base: Callable[..., Path]) -> None:
    """By finite differences, so that dropping a path of the gradient (tied rows have two) would show."""
    model = adapted(base(), decomposed=True, token_ids=[7, 11]).double()
    tokens = torch.tensor([[5, 7, 3, 11, 7]])
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.rsplit(".", 2)[-2] if "adapter" in name else name for name in trained} == {
        "down", "up", "adapter", "trained_rows.embedding",
    }  # fmt: skip
    rows = trained["trained_rows.embedding"]

    def loss() -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(tokens, positions(tokens))[0, :-1].double(), tokens[0, 1:])

    loss().backward()
    assert rows.grad is not None
    found, step = float(rows.grad[0, 4]), 1e-2
    with torch.no_grad():
        rows[0, 4] += step
        above = loss()
        rows[0, 4] -= 2 * step
        below = loss()
    assert found == pytest.approx(float(above - below) / (2 * step), rel=1e-2)
    assert all(parameter.grad is not None for parameter in trained.values())
    assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)


THEIRS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "default": ("llama", {}, {"target_modules": ["q_proj", "v_proj"]}),
    "all": ("qwen2", {}, {"target_modules": "all-linear", "use_dora": True}),
    "rslora": ("llama", {}, {"target_modules": ["o_proj"], "use_rslora": True, "r": 4}),
    "patterns": (
        "qwen3",
        {},
        {
            "target_modules": ["q_proj", "down_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 5},
            "alpha_pattern": {"q_proj": 40, "down_proj": 3},
        },
    ),
    "some layers": ("llama", {}, {"target_modules": ["up_proj"], "layers_to_transform": [1]}),
    "gpt2": ("gpt2", {}, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "gpt2 dora": ("gpt2", {}, {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True}),
    "phi3": ("phi3", {}, {"target_modules": ["qkv_proj", "gate_up_proj", "o_proj"]}),
    "phi3 dora": ("phi3", {}, {"target_modules": ["qkv_proj"], "use_dora": True}),
    "gpt_neox": ("gpt_neox", {}, {"target_modules": ["query_key_value", "dense", "dense_h_to_4h"]}),
    "gpt_neox dora": ("gpt_neox", {}, {"target_modules": ["query_key_value"], "use_dora": True}),
    "gpt_neox tokens": ("gpt_neox", {}, {"target_modules": ["dense"], "trainable_token_indices": {"embed_in": [7]}}),
    "gpt_neox output": (
        "gpt_neox",
        {"tie_embeddings": False},
        {"target_modules": ["dense", "lm_head"], "modules_to_save": ["embed_in"]},
    ),
    "gemma3": ("gemma3_text", {}, {"target_modules": "all-linear"}),
    "whole embedding": (
        "llama",
        {},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "whole modules": (
        "llama",
        {"tie_embeddings": False},
        {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["embed_tokens", "norm"]},
    ),
    "one of two tied matrices": ("llama", {}, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "the other one": ("llama", {}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "both, and apart": ("qwen3", {}, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    "the output of two tied matrices": ("llama", {}, {"target_modules": ["q_proj", "lm_head"]}),
    "tokens": ("qwen3", {}, {"target_modules": ["k_proj"], "trainable_token_indices": [7, 11]}),
}


@pytest.mark.parametrize("kind", THEIRS)
def test_what_peft_wrote_is_merged_as_peft_computes_it(
    kind: str, base: Callable[..., Path], tmp_path: Path, peft: Any
) -> None:
    import transformers

    family, changes, options = THEIRS[kind]
    path = base(family, **changes)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    settings = peft.LoraConfig(**({"r": 2, "lora_alpha": 6, "init_lora_weights": False} | options))
    model = peft.get_peft_model(model, settings).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_A" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
        expected = model(TOKENS).logits
    model.save_pretrained(tmp_path / "theirs")
    found = load_checkpoint(tmp_path / "theirs").model
    assert_close(found(TOKENS, positions(TOKENS)), expected)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "an adapter of kind 'LOHA'"),
        ({"bias": "all"}, "was made with bias = 'all'"),
        ({"init_lora_weights": "pissa"}, "was made with init_lora_weights = 'pissa'"),
        ({"use_qalora": True}, "was made with use_qalora = True"),
        ({"use_dora": True}, "_proj lacks lora_magnitude_vector"),
        ({"base_model_name_or_path": "someone/model"}, "was trained on someone/model, which is not there"),
        ({"base_model_name_or_path": None}, "a base that it does not name, which is not there"),
    ],
)
def test_what_cannot_be_merged_is_said(
    changes: dict[str, Any], message: str, base: Callable[..., Path], tokenizer: Tokenizer
) -> None:
    path = base()
    adapter = stored(adapted(path, decomposed=False), path, tokenizer)
    (adapter / "topkapi.json").unlink()
    edit(adapter / "adapter_config.json", **changes)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(adapter)
    assert message in caught.value.message and caught.value.hint


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("layers.0.self_attn.q_proj.lora_A.weight", "layers.7.self_attn.q_proj.lora_A.weight", "lacks lora_A.weight"),
        ("layers.0.self_attn.q_proj.", "layers.7.self_attn.q_proj.", "which the base does not have"),
        ("layers.0.self_attn.q_proj.", "layers.0.self_attn.rotary.", "which the llama family does not have"),
        ("layers.0.self_attn.q_proj.", "layers.0.self_attn.k_proj.", "is for a layers.0.self_attn.k_proj.weight of"),
        ("q_proj.lora_B.weight", "q_proj.lora_embedding_B", "which is not supported"),
    ],
)
def test_an_adapter_for_another_network_is_named(
    old: str, new: str, message: str, base: Callable[..., Path], tokenizer: Tokenizer
) -> None:
    path = base()
    adapter = stored(adapted(path, decomposed=False), path, tokenizer)
    (adapter / "topkapi.json").unlink()
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    renamed = {name.replace(old, new): tensor for name, tensor in tensors.items() if old in name}
    save_file({name: tensor for name, tensor in tensors.items() if old not in name} | renamed, file)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(adapter)
    assert message in caught.value.message and caught.value.hint


@pytest.mark.parametrize("modules", [["embed_tokens", "lm_head"], ["embed_tokens"], ["lm_head"], None], ids=str)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_after_a_resize_what_peft_wrote_is_loaded_as_peft_loads_it(
    tied: bool, modules: list[str] | None, base: Callable[..., Path], tmp_path: Path, peft: Any
) -> None:
    """PEFT then stores both embeddings, trained or not, and those that are trained three times."""
    import transformers

    path = base("llama", tie_embeddings=tied)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.resize_token_embeddings(310)
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=modules, init_lora_weights=False)
    model = peft.get_peft_model(model, settings).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_A" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
        expected = model(TOKENS).logits
    model.save_pretrained(tmp_path / "theirs")
    assert expected.shape[-1] == 310
    found = load_checkpoint(tmp_path / "theirs").model
    assert_close(found(TOKENS, positions(TOKENS)), expected)


def test_a_changed_or_missing_base_is_refused(base: Callable[..., Path], tokenizer: Tokenizer) -> None:
    path = base()
    adapter = stored(adapted(path, decomposed=False), path, tokenizer)
    moved = path.rename(path.parent / "moved")
    with pytest.raises(CheckpointError, match="which is not there") as caught:
        load_checkpoint(adapter)
    assert f"topkapi merge BASE {adapter}" in (caught.value.hint or "")
    assert load_checkpoint(adapter, base=moved).config.family == "llama"
    other = tiny_model("llama", seed=5, vocab_size=304)
    save_checkpoint(path, model=other, tokenizer=tokenizer, chat=None, generation={}, details={})
    with pytest.raises(CheckpointError, match="its weights have changed"):
        load_checkpoint(adapter)
    with pytest.raises(CheckpointError, match="is not an adapter"):
        load_checkpoint(moved, base=path)


def test_a_fresh_adapter_changes_nothing(base: Callable[..., Path], tokenizer: Tokenizer) -> None:
    """Not even a row of zeros, whose length DoRA divides by."""
    path = base("gpt2")
    model = load_checkpoint(path, dtype=torch.float32).model
    model.layers[1].self_attn.v_proj.weight[3] = 0
    path = save_checkpoint(path, model=model, tokenizer=tokenizer, chat=None, generation={}, details={})
    before = model(TOKENS, positions(TOKENS))
    generator = torch.Generator().manual_seed(3)
    options: dict[str, Any] = {"rank": 4, "scale": 2.0, "dropout": 0.0, "decomposed": True, "generator": generator}
    attach(model, TARGETS, lambda linear: Adapter(linear, **options), [3])
    assert_close(model(TOKENS, positions(TOKENS)), before)
    adapter = stored(model, path, tokenizer)
    assert_close(load_checkpoint(adapter).model(TOKENS, positions(TOKENS)), before)
    down = model.layers[0].mlp.up_proj.adapter.down.weight
    assert 0.9 / math.sqrt(32) < down.abs().max() <= 1 / math.sqrt(32)
